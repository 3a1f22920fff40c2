"""LLaVA's own code as a family, without it: a model with the same seams, written by hand, against the oracle.

``make test-llava`` runs the same with the real one (tests/llava)."""

import pytest
import torch
from effort import cases, diagonal, examples
from generating import trace_of_video_rows
from handwritten_llava import handwritten_llava
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llava_calls import (
    CLOSE,
    CLOSE_LOGITS,
    NEWLINES,
    POOLS,
    VARIANTS,
    WAYS_TO_REUSE,
    Call,
    check_forward,
    check_generate,
    check_rows,
    clip,
    compiled,
    expected,
    generated,
    shared,
    words,
)
from oracle_llava import compressed_generate

import earlytom_compile
from earlytom_compile import EarlyTomCompileError, EarlyTomConfigError, EarlyTomFallbackWarning, report
from earlytom_compile.families.base import Family
from earlytom_compile.families.llava import Llava
from earlytom_compile.families.registry import family_of

TEXT, VIDEO, IMAGE, CROPS = "text", "video", "image", "crops"
LAYOUTS = {
    "two videos and an image": [[TEXT, VIDEO, TEXT, IMAGE, VIDEO, TEXT]],
    "rows with different numbers": [[TEXT, VIDEO, TEXT], [VIDEO, TEXT, VIDEO, CROPS, TEXT], [TEXT, IMAGE, TEXT]],
}


@pytest.fixture(autouse=True)
def any_version(monkeypatch):
    """LLaVA's code wants an old transformers; what is written by hand runs on the one that is here."""
    monkeypatch.setattr(Llava, "requires", {})


@pytest.fixture(scope="module")
def pooled(request):
    return handwritten_llava(pool=request.param)


@pytest.fixture(scope="module")
def pristine():
    return handwritten_llava(newline="grid", pool="average")


@pytest.fixture(scope="module")
def one_trace():
    return trace_of_video_rows()


@pytest.fixture
def model(pristine, one_trace, monkeypatch):
    yield from shared(pristine, one_trace, monkeypatch)


@pytest.fixture
def each_pooling(pooled, one_trace, monkeypatch):
    yield from shared(pooled, one_trace, monkeypatch)


def test_its_family(model):
    family = family_of(model)
    assert isinstance(family, Llava)
    assert family.vision_tower(model) is model.get_vision_tower()
    assert family.language_model(model) is model.model


def test_a_version_of_transformers_that_llava_does_not_run_on(model, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(EarlyTomConfigError, match=r"LLaVA needs transformers >=4.46,<4.56, but 5\.\S+ is installed"):
        earlytom_compile.compile(model)


class TestRows:
    @pytest.mark.parametrize("pooled, newline, variant", diagonal(POOLS, NEWLINES, VARIANTS), indirect=["pooled"])
    def test_they_are_those_of_the_oracle(self, each_pooling, newline, variant):
        each_pooling.config.mm_newline_position = newline
        check_rows(each_pooling, clip(each_pooling, 8), variant=variant)

    @pytest.mark.parametrize("pooled", POOLS, indirect=True)
    @settings(examples(3), suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        newline=st.sampled_from(NEWLINES),
        merge=st.sampled_from(["spatial_unpad", "flat"]),
        variant=st.sampled_from(VARIANTS),
        ratio=st.sampled_from([0.1, 0.15, 0.25, 0.5, 0.75, 1.0]),
        frames=st.integers(2, 12),
        scenes=st.integers(1, 4),
        seed=st.integers(0, 2**20),
    )
    def test_drawn_videos(self, each_pooling, newline, merge, variant, ratio, frames, scenes, seed):
        each_pooling.config.mm_newline_position, each_pooling.config.mm_patch_merge_type = newline, merge
        pixels = clip(each_pooling, frames, scenes=scenes, seed=seed)
        check_rows(each_pooling, pixels, variant=variant, retain_ratio=ratio)

    @pytest.mark.parametrize("pooled, newline", diagonal(POOLS, NEWLINES), indirect=["pooled"])
    def test_a_video_that_keeps_everything_is_the_models_own(self, each_pooling, newline):
        each_pooling.config.mm_newline_position = newline
        pixels, ids = clip(each_pooling, 4), torch.tensor([[5, -200, 7]])
        own = each_pooling.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, [pixels], ["video"])
        everything = compiled(each_pooling, retain_ratio=1.0, tau_merge=2.0)
        (rows,) = earlytom_compile.encode_videos(everything, [pixels])
        torch.testing.assert_close(rows, own[4][0, 1:-1], **CLOSE)

    def test_a_newline_only_where_a_token_is_left(self, model):
        """Of 8 frames of 3 rows, as many lines as have any of the kept tokens."""
        (rows,) = earlytom_compile.encode_videos(compiled(model, retain_ratio=0.1), [clip(model, 8)])
        newlines = int((rows == model.model.image_newline).all(dim=1).sum())
        assert len(rows) == 7 + newlines and 1 < newlines <= 7
        (told,) = report(model).to_dict()["videos"]
        assert 1 < told["frames"][-1] < 8
        assert torch.equal(rows[-1], model.model.image_newline)


class TestPrompts:
    @pytest.mark.parametrize("left", [True, False])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_forward(self, model, layout, left):
        model.config.tokenizer_padding_side = "left" if left else "right"
        call = Call.of(model, LAYOUTS[layout])
        check_forward(model, call.but(labels=torch.where(call.ids < 0, -100, call.ids)))

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_generate(self, model, layout):
        model.config.tokenizer_padding_side = "left"
        check_generate(model, Call.of(model, LAYOUTS[layout], left=True))

    @pytest.mark.long
    def test_generate_lowered(self, model):
        check_generate(model, Call.of(model, [[TEXT, VIDEO, TEXT]]), lowering="staged")

    def test_a_prompt_longer_than_the_model_takes(self, model):
        model.config.tokenizer_model_max_length = 20
        call = Call.of(model, [[TEXT, VIDEO, VIDEO, TEXT], [TEXT, TEXT, VIDEO]])
        assert expected(model, call).embeddings.shape[1] == 20
        check_forward(model, call)

    def test_videos_as_one_tensor_and_a_modality_as_a_string(self, model):
        call = Call.of(model, [[TEXT, VIDEO, TEXT]])
        tokens = compressed_generate(model, expected(model, call), 4)
        assert torch.equal(generated(compiled(model), call.but(images=torch.stack(call.images))), tokens)
        assert torch.equal(generated(model, call.but(modalities="video")), tokens)

    def test_encoded_videos_are_given_back(self, model):
        call = Call.of(model, [[TEXT, VIDEO, IMAGE, VIDEO]])
        tokens = generated(compiled(model), call)
        first, image, second = call.images
        first, second = earlytom_compile.encode_videos(model, [first, second])
        assert torch.equal(generated(model, call.but(images=[first, image, second])), tokens)

    def test_what_the_report_says(self, model):
        call = Call.of(model, [[TEXT, VIDEO, TEXT]], frames=8)
        prompt = expected(model, call)
        generated(compiled(model), call)
        told = report(model).to_dict()
        assert told["prompt"] == [3 + 8 * 3 * 4 + 3, prompt.embeddings.shape[1]]

    def test_everything_kept_is_the_models_own(self, model):
        call = Call.of(model, LAYOUTS["rows with different numbers"])
        with torch.no_grad():
            own = model(**call.forward()).logits
            got = compiled(model, retain_ratio=1.0, tau_merge=2.0)(**call.forward()).logits
        torch.testing.assert_close(got, own, **CLOSE_LOGITS)


class TestLeftAlone:
    @pytest.mark.parametrize("rows", [[[TEXT, IMAGE, TEXT]], [[CROPS, TEXT], [TEXT, IMAGE]]])
    def test_images(self, model, rows):
        call = Call.of(model, rows)
        own = generated(model, call)
        assert torch.equal(generated(compiled(model), call), own)
        assert report(model).to_dict()["last_call"] == "no video"

    def test_text(self, model):
        ids = torch.tensor([words(9, 1)])
        with torch.no_grad():
            own = model(ids).logits
            assert torch.equal(compiled(model)(ids).logits, own)

    def test_faster_video(self, model):
        model.config.add_faster_video, call = True, Call.of(model, [[TEXT, VIDEO, TEXT]])
        own = generated(model, call)
        with pytest.warns(EarlyTomFallbackWarning, match="add_faster_video"):
            assert torch.equal(generated(compiled(model, strict=False), call), own)
        with pytest.raises(EarlyTomCompileError, match="add_faster_video"):
            generated(compiled(model), call)

    def test_an_unknown_place_of_newlines_is_the_models_own_error(self, model):
        model.config.mm_newline_position, call = "everywhere", Call.of(model, [[TEXT, VIDEO, TEXT]])
        with pytest.warns(EarlyTomFallbackWarning), pytest.raises(ValueError, match="mm_newline_position: everywhere"):
            generated(compiled(model, strict=False), call)

    def test_restore_is_exact(self, model):
        before, kind = dict(model.__dict__), dict(vars(type(model)))
        generated(compiled(model), Call.of(model, [[TEXT, VIDEO, TEXT]]))
        assert dict(vars(type(model))) == kind
        earlytom_compile.restore(model)
        assert model.__dict__.keys() == before.keys()
        assert all(model.__dict__[name] is value for name, value in before.items())


class TestReuse:
    """Of unchanged patches, instead of merging frames; a newline still ends a line that has a token."""

    @pytest.mark.parametrize("pooled, newline, way", diagonal(POOLS, NEWLINES, WAYS_TO_REUSE), indirect=["pooled"])
    def test_rows(self, each_pooling, newline, way):
        each_pooling.config.mm_newline_position = newline
        computed = []
        for changing in (0.0, 0.3, 1.0):
            check_rows(each_pooling, clip(each_pooling, 8, changing=changing), **WAYS_TO_REUSE[way])
            (told,) = report(each_pooling).to_dict()["videos"]
            computed.append(sum(told["patches"]["by_frame"]))
        assert computed[0] == 49 < computed[1] < 8 * 49 == computed[2]

    @pytest.mark.parametrize("pooled", POOLS, indirect=True)
    @settings(examples(3), suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        newline=st.sampled_from(NEWLINES),
        way=st.sampled_from(list(WAYS_TO_REUSE)),
        more=st.sampled_from([{}, {"encode_ratio": 0.3}, {"encode_ratio": 1.0}, {"full_layers": ()}, {"tau_reuse": 2}]),
        ratio=st.sampled_from([0.1, 0.25, 1.0]),
        frames=st.integers(2, 12),
        changing=st.floats(0, 1),
        seed=st.integers(0, 2**20),
    )
    def test_drawn_videos(self, each_pooling, newline, way, more, ratio, frames, changing, seed):
        each_pooling.config.mm_newline_position = newline
        pixels = clip(each_pooling, frames, changing=changing, seed=seed)
        check_rows(each_pooling, pixels, **{**WAYS_TO_REUSE[way], **more, "retain_ratio": ratio})

    @pytest.mark.parametrize("way", cases(("plus",), among=[(way,) for way in WAYS_TO_REUSE]))
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_prompts(self, model, layout, way):
        model.config.tokenizer_padding_side = "left"
        call = Call.of(model, LAYOUTS[layout], changing=0.3, left=True)
        check_forward(model, call.but(labels=torch.where(call.ids < 0, -100, call.ids)), **WAYS_TO_REUSE[way])
        check_generate(model, call, **WAYS_TO_REUSE[way])

    def test_videos_of_different_lengths(self, model):
        call = Call.of(model, [[TEXT, VIDEO, VIDEO, TEXT, VIDEO]], frames=(7, 1, 4), changing=0.3)
        check_forward(model, call, **WAYS_TO_REUSE["plus"])

    def test_lowered(self, model):
        call = Call.of(model, [[TEXT, VIDEO, TEXT]], changing=0.3)
        check_generate(model, call, lowering="staged", **WAYS_TO_REUSE["plus"])

    def test_where_everything_moves_and_stays_it_is_the_models_own(self, model):
        call = Call.of(model, LAYOUTS["rows with different numbers"], changing=1.0)
        with torch.no_grad():
            own = model(**call.forward()).logits
            got = compiled(model, **WAYS_TO_REUSE["plus"], retain_ratio=1.0)(**call.forward()).logits
        torch.testing.assert_close(got, own, **CLOSE_LOGITS)


def test_two_models_with_different_options():
    models = handwritten_llava(newline="grid"), handwritten_llava(newline="no_token", pool="max", seed=3)
    options = {"variant": "plus", "retain_ratio": 0.1}, {"variant": "released", "retain_ratio": 0.5}
    call = Call.of(models[0], [[TEXT, VIDEO, TEXT]])
    pairs = list(zip(models, options, strict=True))
    wanted = [compressed_generate(each, expected(each, call, **chosen), 4) for each, chosen in pairs]
    for each, chosen in pairs:
        compiled(each, **chosen)
    for each, tokens in [*zip(models, wanted, strict=True)] * 2:
        assert torch.equal(generated(each, call), tokens)


def test_a_family_that_does_not_say_where_videos_are_keeps_all_tokens_inside(monkeypatch):
    model = handwritten_llava(text_layers=2)
    call = Call.of(model, [[TEXT, VIDEO, TEXT]])
    plain = generated(compiled(model, retain_ratio=0.3), call)
    monkeypatch.setattr(Llava, "prompt_videos", Family.prompt_videos)
    inner = {"retain_ratio": 0.3, "inner_layer": 1}
    with pytest.warns(EarlyTomFallbackWarning, match="LLaVA does not say where videos are.*prompt_videos"):
        assert torch.equal(generated(compiled(model, strict=False, **inner), call), plain)
    with pytest.raises(EarlyTomCompileError, match="does not say where videos are"):
        generated(compiled(model, strict=True, **inner), call)
