"""LLaVA-NeXT-Video in place: a CLIP tower whose last layer and class token are not used, pooling before the projector,
no newline."""

import pytest
import torch
import transformers
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


@pytest.fixture(scope="module", params=["average", "max", "conv"])
def pooled(request):
    return tiny_llava_next_video(pooling=request.param)


@pytest.fixture(scope="module")
def pristine():
    return tiny_llava_next_video()


@pytest.fixture
def model(pristine):
    yield pristine
    earlytom_compile.restore(pristine)


def test_its_family(model):
    family = family_of(model)
    assert family.name == "LLaVA-NeXT-Video"
    assert family.encoder_layers(model.config) == 4  # of 5
    assert family.vision_tower(model) is model.model.vision_tower
    assert family.language_model(model) is model.model.language_model


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
        earlytom_compile.compile(model, merge_layers=(0, 4))


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

    @pytest.mark.parametrize("variant", VARIANTS)
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

    def test_one_compilation_for_all_lengths(self, model):
        compiled(model, variant="paper")
        for frames in (12, 7, 9, 20):
            inputs = video_inputs(model, frames)
            got = new_tokens(model, inputs)
            assert sum(graph["compressed"] for graph in report(model).to_dict()["compilations"]) == 1
            assert torch.equal(got, oracle_tokens(model, inputs, variant="paper"))
            compiled(model, variant="paper")

    def test_lowered(self, model):
        inputs = video_inputs(model, 12)
        expected = oracle_tokens(model, inputs, variant="paper")
        assert torch.equal(new_tokens(compiled(model, variant="paper", lowering="staged"), inputs), expected)

    def test_observed(self, model):
        inputs = video_inputs(model, 12)
        options = {**OPTIONS, "variant": "paper"}
        (oracle,) = compressed_videos(model, inputs, **options)
        (observation,) = observe(model, inputs["pixel_values_videos"], **options)
        side = observation.grid[1]
        assert [(frame, row * side + column) for frame, row, column in observation.kept] == [
            tuple(place) for place in oracle.kept.tolist()
        ]
