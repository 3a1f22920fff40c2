"""LLaVA-NeXT-Video in place: a CLIP tower whose last layer and class token are not used, pooling before the projector,
no newline."""

import pytest
import torch
import transformers
from effort import cases, diagonal
from generating import LAYOUTS, OPTIONS, compiled, new_tokens, oracle_tokens
from oracle import compressed_forward, compressed_videos
from tiny_models import tiny_llava_next_video, tokens_per_frame, video_inputs
from torch.torch_version import TorchVersion

import earlytom_compile
from earlytom_compile import EarlyTomConfigError, report
from earlytom_compile.families.registry import family_of
from earlytom_compile.integrations.observe import observe

pytestmark = pytest.mark.skipif(
    TorchVersion(transformers.__version__) < "5.21", reason="LLaVA-NeXT-Video needs transformers 5.21"
)
VARIANTS = ("paper", "released", "plus")


POOLINGS = "average", "max", "conv"


@pytest.fixture(scope="module")
def pooled(request):
    return tiny_llava_next_video(pooling=request.param)


@pytest.fixture(scope="module")
def pristine():
    return tiny_llava_next_video()


def test_its_family(model):
    family = family_of(model)
    assert family.name == "LLaVA-NeXT-Video"
    assert family.encoder_layers(model.config) == 4  # of 5
    assert family.vision_tower(model) is model.model.vision_tower
    assert family.language_model(model) is model.model.language_model


@pytest.mark.parametrize("pooled", POOLINGS, indirect=True)
@pytest.mark.parametrize("frames", [1, 5])
def test_the_rows_are_those_of_the_model_itself(pooled, frames):
    inputs = video_inputs(pooled, frames)
    with torch.no_grad():
        rows = family_of(pooled).rows(pooled, inputs["pixel_values_videos"])[0]
        ids = inputs["input_ids"]
        embeds = pooled.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter((ids == pooled.config.video_token_id).unsqueeze(-1), rows)
        assert rows.shape == (frames * tokens_per_frame(pooled), embeds.shape[-1])
        torch.testing.assert_close(pooled(inputs_embeds=embeds).logits, pooled(**inputs).logits)


def test_layers_that_are_not_used_cannot_merge(model):
    with pytest.raises(EarlyTomConfigError, match="layer 4 does not exist"):
        earlytom_compile.compile(model, variant="paper", merge_layers=(0, 4))


def test_a_video_of_another_size_is_named(model):
    inputs = video_inputs(model, 3)
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"][..., 1:]
    with pytest.raises(EarlyTomConfigError, match=r"takes \(3, 24, 24\)"):
        compiled(model).generate(**inputs, max_new_tokens=1)


def test_a_call_without_a_video_runs_its_own_code(model):
    inputs = video_inputs(model, 4, videos_per_row=(0,), images_per_row=(1,))
    with torch.no_grad():
        logits = model(**inputs).logits
        assert torch.equal(compiled(model)(**inputs).logits, logits)
    assert report(model).to_dict()["last_call"] == "no video"


class TestCompressed:
    """Pooling is in front of the projector, and a class token is cut off."""

    @pytest.mark.parametrize("pooled, variant", diagonal(POOLINGS, VARIANTS), indirect=["pooled"])
    def test_every_pooling_gives_the_tokens_of_the_oracle(self, pooled, variant):
        inputs = video_inputs(pooled, 12)
        expected = oracle_tokens(pooled, inputs, variant=variant)
        assert torch.equal(new_tokens(compiled(pooled, variant=variant), inputs), expected)
        (video,) = report(pooled).to_dict()["videos"]
        (oracle,) = compressed_videos(earlytom_compile.restore(pooled), inputs, **{**OPTIONS, "variant": variant})
        assert video["tokens"] == [108, len(oracle.kept)] and video["frames"] == [12, *oracle.frames_after]

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, model, layout):
        inputs = video_inputs(model, 12, **LAYOUTS[layout])
        expected = oracle_tokens(model, inputs, variant="plus")
        assert torch.equal(new_tokens(compiled(model, variant="plus"), inputs), expected)

    def test_forward(self, model):
        inputs = video_inputs(model, 12, videos_per_row=(1, 2))
        expected = compressed_forward(model, inputs, **{**OPTIONS, "variant": "paper"})
        with torch.no_grad():
            logits = compiled(model, variant="paper")(**inputs).logits
        seen = expected.cut_attention_mask.bool()
        torch.testing.assert_close(logits[seen], expected.logits[seen], atol=1e-4, rtol=1e-4)

    def test_one_compilation_for_all_lengths(self, unshared):
        calls = [video_inputs(unshared, frames) for frames in (12, 7, 9, 20)]
        expected = [oracle_tokens(unshared, inputs, variant="paper") for inputs in calls]
        compiled(unshared, variant="paper")
        for inputs, tokens in zip(calls, expected, strict=True):
            assert torch.equal(new_tokens(unshared, inputs), tokens)
        assert sum(graph["compressed"] for graph in report(unshared).to_dict()["compilations"]) == 1

    @pytest.mark.long
    def test_lowered(self, unshared):
        inputs = video_inputs(unshared, 12)
        expected = oracle_tokens(unshared, inputs, variant="paper")
        assert torch.equal(new_tokens(compiled(unshared, variant="paper", lowering="staged"), inputs), expected)

    def test_observed(self, model):
        inputs = video_inputs(model, 12)
        options = {**OPTIONS, "variant": "paper"}
        (oracle,) = compressed_videos(model, inputs, **options)
        (observation,) = observe(model, inputs["pixel_values_videos"], **options)
        side = observation.grid[1]
        assert [(frame, row * side + column) for frame, row, column in observation.kept] == [
            tuple(place) for place in oracle.kept.tolist()
        ]


PLACES = 37  # 36 patches and a class token, which is computed in every frame
REUSE = {
    "plus": {"variant": "plus", "reuse": None, "merge_layers": None},
    "paper": {"variant": "paper", "reuse": True},
    "released": {"variant": "released", "reuse": True},
}


def rows(model, inputs):
    (encoded,) = earlytom_compile.encode_videos(model, inputs["pixel_values_videos"])
    (told,) = report(model).to_dict()["videos"]
    return encoded, told["patches"]["by_frame"]


class TestReused:
    """Patches that do not change are computed once; the class token, which sees all of them, in every frame."""

    @pytest.mark.parametrize("pooled, variant", diagonal(POOLINGS, REUSE), indirect=["pooled"])
    def test_every_pooling_gives_the_tokens_of_the_oracle(self, pooled, variant):
        inputs = video_inputs(pooled, 6, videos_per_row=(1, 1), changing=0.3)
        expected = oracle_tokens(pooled, inputs, **REUSE[variant])
        assert torch.equal(new_tokens(compiled(pooled, **REUSE[variant]), inputs), expected)
        content = report(pooled).to_dict()
        assert content["full_layers"] == [2, 3], "of the four that are used"
        for video in content["videos"]:
            first, *others = video["patches"]["by_frame"]
            assert first == PLACES and all(1 < count < PLACES for count in others) and video["frames"] == [6]

    @pytest.mark.parametrize("layout", cases(("left padding",), among=[(layout,) for layout in LAYOUTS]))
    def test_layouts(self, model, layout):
        inputs = video_inputs(model, 5, changing=0.3, **LAYOUTS[layout])
        expected = oracle_tokens(model, inputs, **REUSE["plus"])
        assert torch.equal(new_tokens(compiled(model, **REUSE["plus"]), inputs), expected)

    @pytest.mark.parametrize("full_layers, variant", diagonal([(), (1,), (0, 1, 2, 3)], REUSE))
    def test_any_layers_in_full(self, model, variant, full_layers):
        inputs, options = video_inputs(model, 5, changing=0.3), {**REUSE[variant], "full_layers": full_layers}
        got, _ = rows(compiled(model, **options), inputs)
        (oracle,) = compressed_videos(earlytom_compile.restore(model), inputs, **{**OPTIONS, **options})
        torch.testing.assert_close(got, oracle.features, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("encode_ratio, places", [(0.01, PLACES + 5), (0.5, 111), (1.0, 6 * PLACES)])
    def test_a_budget_has_room_for_the_class_token_of_every_frame(self, model, encode_ratio, places):
        options = {**REUSE["plus"], "encode_ratio": encode_ratio}
        calls = [video_inputs(model, 6, changing=changing) for changing in (0.0, 0.3, 1.0)]
        oracles = [compressed_videos(model, inputs, **{**OPTIONS, **options}) for inputs in calls]
        compiled(model, **options)
        for inputs, (oracle,) in zip(calls, oracles, strict=True):
            got, computed = rows(model, inputs)
            assert sum(computed) == places
            torch.testing.assert_close(got, oracle.features, atol=1e-5, rtol=1e-5)

    def test_a_video_that_stands_still(self, model):
        inputs = video_inputs(model, 6, changing=0.0)
        _, computed = rows(compiled(model, **REUSE["plus"]), inputs)
        assert computed == (PLACES, 1, 1, 1, 1, 1)

    def test_lowered(self, unshared):
        inputs = video_inputs(unshared, 6, changing=0.3)
        expected = oracle_tokens(unshared, inputs, **REUSE["plus"])
        assert torch.equal(new_tokens(compiled(unshared, lowering="staged", **REUSE["plus"]), inputs), expected)
