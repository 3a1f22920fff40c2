"""Methods that keep tokens behind the encoder, compiled, against the eager oracle with VisionZip's rules in loops."""

import pytest
import torch
import transformers
from effort import cases
from generating import LAYOUTS, new_tokens, share_vision_paths, trace_of_video_rows
from oracle import compressed_forward, compressed_generate, compressed_videos
from plain_visionzip import keep_in_python
from tiny_models import (
    tiny_llava_next_video,
    tiny_llava_onevision,
    tiny_video_llava,
    tokens_per_frame,
    video_inputs,
)
from torch.torch_version import TorchVersion
from transformers import CLIPVisionConfig
from without_inductor import leave_pieces_as_they_are

import earlytom_compile
from earlytom_compile import EarlyTomConfigError, report
from earlytom_compile.methods import registry
from earlytom_compile.methods.base import FrameTokens, Kept, Method

ZIP = {"method": "visionzip", "retain_ratio": 0.5}
EAGER = {"lowering": "eager", "strict": True}
FRAMES = 6


def zipped(features, importance, keys, budget):
    tokens, places = keep_in_python(*(x.tolist() for x in (features, importance, keys)), budget)
    return torch.tensor(tokens), torch.tensor(places)


def oracle_options(*, method="visionzip", lowering="eager", **options):
    """As ``compiled`` takes them, for the oracle."""
    return {"variant": "paper", "keep": zipped, **options}


def tiny(**options):
    return tiny_llava_onevision(**{"vision_layers": 4, "text_layers": 2, "image_size": 32, **options})


@pytest.fixture(scope="module")
def pristine():
    return tiny()


@pytest.fixture
def model(pristine):
    yield pristine
    earlytom_compile.restore(pristine)


@pytest.fixture(scope="module")
def one_trace():
    return trace_of_video_rows()


@pytest.fixture
def shared(model, one_trace, monkeypatch):
    """The same model, whose vision is traced once for all tests that compile it in place."""
    share_vision_paths(one_trace, monkeypatch)
    return model


@pytest.fixture
def registered(monkeypatch):
    """``registered("mine", keep=...)``: known to this test alone."""
    monkeypatch.setattr(registry, "_registered", {})
    return lambda name, **what: registry.register_method(Method(name=name, paper="none", **what))


def compiled(model, **options):
    return earlytom_compile.compile(model, **{**EAGER, **ZIP, **options})


def equals_oracle(model, inputs, **options):
    options = {**ZIP, **options}
    if "image_sizes" in inputs:
        inputs["image_sizes"] = inputs["image_sizes"].tolist()  # as a tensor, transformers reads it on the host
    fast = torch.compile(model, backend="earlytom", options={**EAGER, **options})
    with torch.no_grad():
        logits = fast(**inputs).logits
        expected = compressed_forward(model, inputs, **oracle_options(**options))
    mask = expected.cut_attention_mask.bool()
    assert logits.shape == expected.logits.shape
    torch.testing.assert_close(logits[mask], expected.logits[mask], atol=1e-4, rtol=1e-4)
    return report(model).to_dict()


@pytest.mark.parametrize(
    "layout",
    cases(("different numbers of videos",), ("images beside videos",), among=[(layout,) for layout in LAYOUTS]),
)
def test_forward_equals_the_oracle(model, layout):
    inputs = video_inputs(model, FRAMES, **LAYOUTS[layout])
    content = equals_oracle(model, inputs)
    every = FRAMES * tokens_per_frame(model)
    for video in content["videos"]:
        assert video == {"frames": [FRAMES], "tokens": [every, round(0.5 * every)]}
    assert content["inserted"]["keep_by_method"] == 1 and "merge_frames" not in content["inserted"]
    assert len(content["videos"]) == sum(LAYOUTS[layout].get("videos_per_row", (1,)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_generate_equals_the_oracle_and_each_row_alone(shared, layout):
    inputs = video_inputs(shared, FRAMES, **LAYOUTS[layout])
    expected = compressed_generate(shared, inputs, 6, **oracle_options(**ZIP))
    own = new_tokens(shared, inputs)
    assert torch.equal(new_tokens(compiled(shared), inputs), expected)
    assert not torch.equal(own, expected), "half of the tokens do the same, which shows nothing"
    earlytom_compile.restore(shared)
    assert torch.equal(new_tokens(shared, inputs), own)


@pytest.mark.parametrize("frames", [1, 2, 9])
def test_one_compilation_serves_every_number_of_frames(shared, frames):
    """Of a graph for every length, K is computed in the graph."""
    inputs = {count: video_inputs(shared, count) for count in (4, frames)}
    expected = {n: compressed_videos(shared, x, **oracle_options(**ZIP))[0].features for n, x in inputs.items()}
    compiled(shared)
    for count in (4, frames):
        (rows,) = earlytom_compile.encode_videos(shared, inputs[count]["pixel_values_videos"])
        (video,) = report(shared).to_dict()["videos"]
        every = count * tokens_per_frame(shared)
        assert video["tokens"] == [every, round(0.5 * every)] and len(rows) == round(0.5 * every) + 1
        torch.testing.assert_close(rows, expected[count], atol=2e-5, rtol=1e-4)
    assert report(shared).to_dict()["graphs"] == 1 + (frames == 1)  # one picture has a graph of its own


CLIP = CLIPVisionConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, image_size=32, patch_size=4
)
MODELS = {
    "an odd grid": lambda: tiny(image_size=36),
    "a class token": lambda: tiny(tower=CLIP),
    "the last layer is not used": lambda: tiny(vision_feature_layer=-2),
    "features of two layers": lambda: tiny(vision_feature_layer=[1, -1]),
    "averages before the projector": lambda: tiny_llava_next_video(pooling="average", image_size=32),
    "a class token among the tokens": lambda: tiny_video_llava(image_size=32),
    "maxima": lambda: tiny_llava_next_video(pooling="max", image_size=32),
}


@pytest.mark.parametrize(
    "kind",
    cases(
        *[("features of two layers",), ("a class token among the tokens",), ("maxima",)],
        among=[(kind,) for kind in MODELS],
    ),
)
def test_attention_and_keys_are_carried_as_the_model_pools(kind):
    if kind in ("averages before the projector", "maxima") and TorchVersion(transformers.__version__) < "5.21":
        pytest.skip("LLaVA-NeXT-Video needs transformers 5.21")
    model = MODELS[kind]()
    inputs = video_inputs(model, FRAMES)
    (expected,) = compressed_videos(model, inputs, **oracle_options(**ZIP))
    (rows,) = earlytom_compile.encode_videos(compiled(model), inputs["pixel_values_videos"])
    torch.testing.assert_close(rows, expected.features, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", cases((torch.bfloat16,), among=[(torch.bfloat16,), (torch.float16,)]))
def test_in_half_precision_tokens_have_its_dtype(dtype):
    model = tiny(dtype=dtype)
    inputs = video_inputs(model, FRAMES)
    (expected,) = compressed_videos(model, inputs, **oracle_options(**ZIP, keep=halved(dtype)))
    (rows,) = earlytom_compile.encode_videos(compiled(model), inputs["pixel_values_videos"])
    assert rows.dtype == dtype
    torch.testing.assert_close(rows, expected.features, atol=2e-2, rtol=2e-2)


def halved(dtype):
    def keep(*given):
        tokens, places = zipped(*given)
        return tokens.to(dtype), places

    return keep


@pytest.mark.parametrize(
    "reuse",
    [
        pytest.param({"full_layers": ()}, marks=pytest.mark.long),
        pytest.param({"full_layers": (0, 3)}, marks=pytest.mark.long),
        {"full_layers": (), "encode_ratio": 0.5},
        pytest.param({}, marks=pytest.mark.long),
    ],
    ids=["packed", "whole", "budget", "default"],
)
def test_unchanged_patches_are_reused_where_somebody_asks(model, reuse):
    inputs = video_inputs(model, FRAMES, videos_per_row=(2,), changing=0.3)
    inputs["pixel_values_videos"][0, 2] = inputs["pixel_values_videos"][0, 1]  # a frame that repeats another
    content = equals_oracle(model, inputs, reuse=True, **reuse)
    assert all(sum(v["patches"]["by_frame"]) < 0.9 * FRAMES * 64 for v in content["videos"])


@pytest.mark.parametrize("lowering", ["staged", pytest.param("whole", marks=pytest.mark.long)])
def test_lowered_in_pieces(model, monkeypatch, lowering):
    leave_pieces_as_they_are(monkeypatch)
    equals_oracle(model, video_inputs(model, FRAMES, videos_per_row=(2, 2), images_per_row=(0, 1)), lowering=lowering)


@pytest.mark.long
@pytest.mark.parametrize("lowering", ["staged", "whole"])
def test_lowered_by_inductor(model, lowering):
    equals_oracle(model, video_inputs(model, FRAMES, videos_per_row=(2,)), lowering=lowering)


@pytest.mark.parametrize("ways", cases(("generate",), among=[("forward",), ("generate",)]))
def test_with_every_token_nothing_changes(shared, ways):
    inputs = video_inputs(shared, FRAMES, videos_per_row=(1, 1), left_padding=(0, 5))
    with torch.no_grad():
        own = shared(**inputs).logits if ways == "forward" else new_tokens(shared, inputs)
        if ways == "generate":
            assert torch.equal(new_tokens(compiled(shared, retain_ratio=1.0), inputs), own)
            return
        fast = torch.compile(shared, backend="earlytom", options={**EAGER, **ZIP, "retain_ratio": 1})
        mask = inputs["attention_mask"].bool()
        torch.testing.assert_close(fast(**inputs).logits[mask], own[mask], atol=1e-4, rtol=1e-4)
    assert report(shared).to_dict()["inserted"]["keep_by_method"] == 1


def test_a_method_without_keep_leaves_every_token_behind_the_encoder(shared, registered):
    registered("inside_only", inside=lambda ratio, layers: ())
    inputs = video_inputs(shared, FRAMES, videos_per_row=(2, 1), images_per_row=(0, 1))
    own = new_tokens(shared, inputs)
    compiled(shared, method="inside_only", retain_ratio=0.1)
    assert torch.equal(new_tokens(shared, inputs), own)
    every = FRAMES * tokens_per_frame(shared)
    content = report(shared).to_dict()
    assert [video["tokens"] for video in content["videos"]] == [[every, every]] * 3
    assert content["prompt"][0] == content["prompt"][1]


def by_norm(video, budget):
    """K longest tokens, by the features alone."""
    size = video.features.shape[1]
    place = video.features.flatten(0, 1).norm(dim=1).topk(budget).indices.sort().values
    return Kept(video.features.flatten(0, 1)[place], torch.stack([place // size, place % size], dim=1))


@pytest.mark.parametrize("layer", cases((0,), (2,), among=[(0,), (2,), (-1,)]))
def test_a_method_gets_what_it_asks_for_of_the_layer_it_names(model, registered, layer):
    """And nothing else is computed for it."""
    inputs, asked, told = video_inputs(model, FRAMES), [], []

    def keep(video, budget):
        asked.append(video)
        return by_norm(video, budget)

    registered("asking", keep=keep, importance=True, keys=layer != 0, scored_layer=layer)
    earlytom_compile.encode_videos(compiled(model, method="asking"), inputs["pixel_values_videos"])
    earlytom_compile.restore(model)
    (got,) = asked

    def note(features, importance, keys, budget):
        told.append((features, importance, keys))
        return by_norm(FrameTokens(features, None, None), budget)

    compressed_videos(model, inputs, variant="paper", keep=note, scored_layer=layer, retain_ratio=0.2)
    features, importance, keys = told[0]
    torch.testing.assert_close(got.features, features, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(got.importance, importance, atol=1e-6, rtol=1e-4)
    if layer == 0:
        assert got.keys is None
    else:
        torch.testing.assert_close(got.keys, keys, atol=1e-5, rtol=1e-4)


def test_a_layer_that_does_not_exist(model, registered):
    registered("deep", keep=by_norm, importance=True, scored_layer=4)
    with pytest.raises(EarlyTomConfigError, match="method='deep' looks at layer 4 .* has layers 0 to 3. Choose"):
        compiled(model, method="deep")


def test_another_method_takes_the_place_of_the_first(shared, registered):
    registered("by_norm", keep=by_norm)
    inputs = video_inputs(shared, FRAMES)
    first = new_tokens(compiled(shared), inputs)
    second = new_tokens(compiled(shared, method="by_norm"), inputs)
    assert not torch.equal(first, second)
    assert torch.equal(new_tokens(compiled(shared), inputs), first)
    plain = new_tokens(compiled(shared, method="earlytom"), inputs)
    assert "select_representatives" in report(shared).to_dict()["inserted"] and not torch.equal(plain, first)


def test_what_a_method_does_wrong_reaches_the_caller(shared, registered):
    registered("greedy", keep=lambda video, budget: by_norm(video, budget + 1))
    with pytest.raises(ValueError, match="method 'greedy' returned tokens"):
        new_tokens(compiled(shared, method="greedy"), video_inputs(shared, FRAMES))


def test_a_tower_alone_selects_nothing(model):
    with pytest.raises(EarlyTomConfigError, match="method=.visionzip. with compile_tower.*selects nothing: .*Leave"):
        earlytom_compile.compile_tower(model.model.vision_tower, method="visionzip")
