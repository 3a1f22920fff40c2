"""LLaVA-OneVision with another vision tower than SigLIP, and with features of several layers.

With a class token, a merged frame's class token is merged with it, and only its patches go on.
"""

from itertools import product

import pytest
import torch
import transformers
from effort import cases
from generating import new_tokens
from oracle import compressed_generate, compressed_videos
from packaging.version import Version
from tiny_models import tiny_llava_onevision, video_inputs
from transformers import CLIPVisionConfig, Dinov2Config, Dinov2WithRegistersConfig, ViTConfig

import earlytom_compile

OPTIONS = {"variant": "paper", "tau_seg": 0.3, "retain_ratio": 0.3}
SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 24, "patch_size": 4}
CLIP = CLIPVisionConfig(**SIZES, intermediate_size=64)
TOWERS = {
    "CLIP": CLIP,
    "DINOv2": Dinov2Config(**SIZES, layerscale_value=0.7, use_swiglu_ffn=True),
    "ViT": ViTConfig(**SIZES, intermediate_size=64),
}


def tiny(tower=None, **options):
    return tiny_llava_onevision(vision_layers=4, text_layers=1, tower=tower, **options)


def compiled(model, **options):
    return earlytom_compile.compile(model, **{"lowering": "eager", **OPTIONS, **options})


def rows(model, inputs):
    (encoded,) = earlytom_compile.encode_videos(model, inputs["pixel_values_videos"])
    return encoded


def check(model, *, tokens=False, **options):
    options = {"variant": "paper", **OPTIONS, **options}
    inputs = video_inputs(model, 8)
    got = rows(compiled(model, **options), inputs)
    answer = new_tokens(model, inputs) if tokens else None
    frames = earlytom_compile.report(model).to_dict()["videos"][0]["frames"]
    earlytom_compile.restore(model)
    (expected,) = compressed_videos(model, inputs, **options)
    assert frames[1:] == expected.frames_after and frames[-1] < 8
    torch.testing.assert_close(got, expected.features, atol=2e-5, rtol=1e-4)
    if tokens:
        assert torch.equal(answer, compressed_generate(model, inputs, answer.shape[1], **options))


# DINOv2's modules had other names before, which the oracle does not know, and ViT gave its attention a mask.
newer = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"), reason="another DINOv2, and another ViT"
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("CLIP", marks=pytest.mark.long),
        pytest.param("DINOv2", marks=newer),
        pytest.param("ViT", marks=[newer, pytest.mark.long]),
    ],
)
def test_towers(name):
    check(tiny(TOWERS[name]), tokens=True)


@newer
@pytest.mark.long
def test_without_importance():
    check(tiny(TOWERS["DINOv2"]), variant="plus", reuse=False)


BY_ATTENTION = {"variant": "paper", "reuse": True}


@pytest.mark.parametrize(
    "name, way",
    [
        ("CLIP", BY_ATTENTION),
        pytest.param("ViT", {"variant": "plus"}, marks=newer),
        pytest.param("CLIP", {"variant": "plus"}, marks=pytest.mark.long),
        pytest.param("ViT", BY_ATTENTION, marks=[newer, pytest.mark.long]),
        pytest.param("DINOv2", {"variant": "plus"}, marks=[newer, pytest.mark.long]),
        pytest.param("DINOv2", BY_ATTENTION, marks=[newer, pytest.mark.long]),
    ],
)
def test_towers_that_reuse_patches(name, way):
    """The class token is computed in every frame, and everything else when it changes."""
    check_reuse(tiny(TOWERS[name]), **way)


@pytest.mark.long
@pytest.mark.parametrize("name", ["CLIP", pytest.param("DINOv2", marks=newer), pytest.param("ViT", marks=newer)])
def test_towers_that_reuse_patches_through_inductor(name):
    check_reuse(tiny(TOWERS[name]), variant="plus", lowering="staged")


@pytest.mark.parametrize(
    "layer, full_layers", cases(([-2, -1], (2,)), among=list(product([-2, [-2, -1]], [(), (2,), None])))
)
def test_reused_patches_in_an_earlier_layer_and_in_several(layer, full_layers):
    """What leaves a layer in the middle of those that reuse is of all places, too."""
    check_reuse(tiny(CLIP, vision_feature_layer=layer), variant="plus", full_layers=full_layers)


def check_reuse(model, **options):
    options = {"retain_ratio": 0.3, **options}
    inputs = video_inputs(model, 6, changing=0.3)
    got = rows(compiled(model, strict=True, **options), inputs)
    told = earlytom_compile.report(model).to_dict()["videos"][0]
    earlytom_compile.restore(model)
    options.pop("lowering", None)
    (expected,) = compressed_videos(model, inputs, **{**OPTIONS, **options})
    torch.testing.assert_close(got, expected.features, atol=2e-5, rtol=1e-4)
    first, *others = told["patches"]["by_frame"]
    assert first == 37 and all(1 < count < 37 for count in others) and told["frames"] == [6]


@newer
@pytest.mark.long
def test_through_inductor():
    check(tiny(TOWERS["DINOv2"]), lowering="staged")


@pytest.mark.long
@pytest.mark.parametrize("tower", [None, CLIP], ids=["SigLIP", "CLIP"])
def test_an_earlier_layer(tower):
    check(tiny(tower, vision_feature_layer=-2))


@pytest.mark.usefixtures("shared_vision")
def test_several_layers_behind_the_last_merge():
    model = tiny(CLIP, vision_feature_layer=[-2, -1])
    check(model)  # merges after the layers 0 and 2, whose output is the one before the last
    check(model, merge_layers=(0, 1))


@pytest.mark.usefixtures("shared_vision")
def test_layers_between_which_frames_merge():
    """What leaves the earlier ones merges as their frames do later, by the same weights."""
    model = tiny(CLIP, vision_feature_layer=[1, 3, -1])
    check(model)  # merges after the layers 0 and 2; 1 and 3 count what went in
    for layers in ((0,), (1,), (0, 1, 2)):
        check(model, merge_layers=layers)


@pytest.mark.long
def test_what_transformers_cannot_run_is_its_own_error():
    registers = tiny(Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3))
    inputs = video_inputs(registers, 8)
    for model in (registers, compiled(registers)):
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"shape '\[.*\]' is invalid"):
            model.generate(**inputs, max_new_tokens=1)
