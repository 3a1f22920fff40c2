"""What stays LLaVA's own: calls without a video, the class and its module, a model that was restored; and what cannot
be compressed, with the reason."""

import copy
import inspect

import pytest
import torch
from generating import trace_of_video_rows
from llava_calls import OPTIONS, Call, check_generate, clip, compiled, expected, generated, picture, shared, words
from oracle_llava import compressed_generate
from tiny_llava import llava_arch, llava_qwen, tiny_llava

import earlytom_compile
from earlytom_compile import EarlyTomCompileError, EarlyTomConfigError, EarlyTomFallbackWarning, report
from earlytom_compile.families import base
from earlytom_compile.families.registry import family_of

TEXT, VIDEO, IMAGE, CROPS = "text", "video", "image", "crops"


@pytest.fixture(scope="module")
def pristine():
    return tiny_llava(newline="frame", pool="average")


@pytest.fixture(scope="module")
def one_trace():
    return trace_of_video_rows()


@pytest.fixture
def model(pristine, one_trace, monkeypatch):
    yield from shared(pristine, one_trace, monkeypatch)


def lenient(model, **options):
    """Where a call may run uncompressed, with a warning."""
    return compiled(model, strict=False, **options)


def own_and_compiled(model, kwargs):
    """Logits of a call by LLaVA's own code, and by the model that is compiled in place."""
    with torch.no_grad():
        own = model(**kwargs).logits
        return own, compiled(model)(**kwargs).logits


class TestWithoutAVideo:
    """Bit for bit."""

    def test_text_alone(self, model):
        ids = torch.tensor([words(9, 1)])
        own, got = own_and_compiled(model, {"input_ids": ids})
        assert torch.equal(own, got)
        assert report(model).to_dict()["last_call"] == "no video"
        kwargs = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        tokens = model.generate(ids, **kwargs)
        assert torch.equal(earlytom_compile.restore(model).generate(ids, **kwargs), tokens)

    @pytest.mark.parametrize("rows", [[[TEXT, IMAGE, TEXT]], [[CROPS, TEXT]], [[TEXT, IMAGE, CROPS], [IMAGE, TEXT]]])
    def test_images(self, model, rows):
        call = Call.of(model, rows)
        own, got = own_and_compiled(model, call.forward())
        assert torch.equal(own, got)
        assert torch.equal(generated(model, call), generated(earlytom_compile.restore(model), call))

    def test_crops_as_a_tensor_of_five_dimensions(self, model):
        call = Call.of(model, [[CROPS, TEXT, CROPS]])
        own, got = own_and_compiled(model, call.but(images=torch.stack(call.images)).forward())
        assert torch.equal(own, got)

    def test_a_tensor_of_four_dimensions_is_a_picture_for_each_row(self, model):
        ids = torch.tensor([[5, -200, 6], [-200, 7, 8]])
        pictures = torch.stack([picture(model, seed=1), picture(model, seed=2)])
        own, got = own_and_compiled(model, {"input_ids": ids, "images": pictures, "modalities": ["image", "image"]})
        assert torch.equal(own, got)

    def test_no_images(self, model):
        own, got = own_and_compiled(model, {"input_ids": torch.tensor([words(5, 1)]), "images": None})
        assert torch.equal(own, got)


class TestRestore:
    def test_it_is_exact(self, model):
        before, inner = dict(model.__dict__), dict(model.model.__dict__)
        call = Call.of(model, [[TEXT, VIDEO, TEXT, IMAGE]])
        own = generated(model, call)
        generated(compiled(model, lowering="staged"), call)
        earlytom_compile.restore(model)
        assert model.__dict__.keys() == before.keys() and model.model.__dict__.keys() == inner.keys()
        assert all(model.__dict__[name] is value for name, value in before.items())
        assert all(model.model.__dict__[name] is value for name, value in inner.items())
        assert torch.equal(generated(model, call), own)

    def test_no_class_and_no_module_of_llava_is_changed(self, model):
        kinds = [each for module in (model, model.model, model.get_vision_tower()) for each in type(module).__mro__]
        before = [dict(vars(each)) for each in [*kinds, llava_arch, llava_qwen]]
        generated(compiled(model), Call.of(model, [[TEXT, VIDEO, TEXT]]))
        after = [dict(vars(each)) for each in [*kinds, llava_arch, llava_qwen]]
        for old, new in zip(before, after, strict=True):
            changed = {name for name in old.keys() | new.keys() if old.get(name) is not new.get(name)}
            assert changed <= {"_abc_impl", "__warningregistry__"}

    def test_signatures_stay(self, model):
        before = inspect.signature(model.forward), inspect.signature(model.generate)
        compiled(model)
        assert (inspect.signature(model.forward), inspect.signature(model.generate)) == before


class TestSeveralModels:
    def test_two_with_different_options(self):
        first, second = tiny_llava(newline="grid"), tiny_llava(newline="no_token", pool="max", seed=3)
        call = Call.of(first, [[TEXT, VIDEO, TEXT]])
        options = [{"variant": "plus", "retain_ratio": 0.1}, {"variant": "released", "retain_ratio": 0.5}]
        models = [first, second]
        wanted = [
            compressed_generate(each, expected(each, call, **chosen), 4)
            for each, chosen in zip(models, options, strict=True)
        ]
        for each, chosen in zip(models, options, strict=True):
            compiled(each, **chosen)
        for _ in range(2):
            for each, tokens in zip(models, wanted, strict=True):
                assert torch.equal(generated(each, call), tokens)
        earlytom_compile.restore(first)
        assert torch.equal(generated(second, call), wanted[1])

    def test_a_copy_compiles_for_itself(self, model):
        call = Call.of(model, [[TEXT, VIDEO, TEXT]])
        tokens = generated(compiled(model), call)
        twin = copy.deepcopy(model)
        earlytom_compile.restore(model)
        assert torch.equal(generated(twin, call), tokens)

    def test_other_options_replace_those_before(self, model):
        call = Call.of(model, [[TEXT, VIDEO, TEXT]])
        for ratio in (0.1, 0.5):
            check_generate(model, call, retain_ratio=ratio)


class TestNotCompressed:
    def test_faster_video(self, model):
        model.config.add_faster_video, call = True, Call.of(model, [[TEXT, VIDEO, TEXT]])
        own = generated(model, call)
        with pytest.warns(EarlyTomFallbackWarning, match="add_faster_video"):
            assert torch.equal(generated(lenient(model), call), own)
        with pytest.raises(EarlyTomCompileError, match="add_faster_video"):
            generated(compiled(model), call)

    def test_an_unknown_place_of_newlines_is_llavas_own_error(self, model):
        model.config.mm_newline_position, call = "everywhere", Call.of(model, [[TEXT, VIDEO, TEXT]])
        with pytest.warns(EarlyTomFallbackWarning), pytest.raises(ValueError, match="mm_newline_position: everywhere"):
            generated(lenient(model), call)

    def test_an_unknown_pooling_is_llavas_own_error(self, model):
        model.config.mm_spatial_pool_mode, call = "median", Call.of(model, [[TEXT, VIDEO, TEXT]])
        with pytest.warns(EarlyTomFallbackWarning), pytest.raises(ValueError, match="mm_spatial_pool_mode: median"):
            generated(lenient(model), call)

    def test_newlines_that_the_model_has_not(self):
        model, ids = tiny_llava(newline="grid", merge="spatial"), torch.tensor([[5, -200, 6]])
        with pytest.warns(EarlyTomFallbackWarning, match="needs a newline"), pytest.raises(AttributeError):
            generated(lenient(model), Call(ids, [clip(model)], ["video"]))

    def test_gradients(self, model):
        call = Call.of(model, [[TEXT, VIDEO, TEXT]])
        with pytest.warns(EarlyTomFallbackWarning, match="gradients are enabled"):
            assert lenient(model)(**call.forward()).logits.requires_grad

    @pytest.mark.parametrize("version", ["4.45.2", "4.56.0", "5.24.0"])
    def test_a_version_of_transformers_that_llava_does_not_run_on(self, model, monkeypatch, version):
        monkeypatch.setattr(base, "_version_of", lambda package: version)
        with pytest.raises(EarlyTomConfigError, match=f"LLaVA needs transformers >=4.46,<4.56, but {version} is"):
            earlytom_compile.compile(model)
        assert "_earlytom" not in model.__dict__

    def test_a_tower_that_is_not_loaded(self, model):
        compiled(model)
        model.get_vision_tower().is_loaded = False
        try:
            with pytest.raises(EarlyTomCompileError, match="the vision tower is not loaded"):
                generated(model, Call.of(model, [[TEXT, VIDEO, TEXT]]))
        finally:
            model.get_vision_tower().is_loaded = True


def test_its_family(model):
    family = family_of(model)
    assert family.name == "LLaVA"
    assert family.vision_tower(model) is model.get_vision_tower()
    assert family.language_model(model) is model.model


def test_rows_of_another_width_are_refused(model):
    with pytest.raises(EarlyTomConfigError, match=r"must be \[rows, 48\]"):
        generated(compiled(model), Call(torch.tensor([[5, -200, 6]]), [torch.zeros(7, 8)], ["video"]))


def test_fewer_videos_than_placeholders_are_llavas_own_rule(model):
    """It takes the last one again."""
    ids, pixels = torch.tensor([[5, -200, 6, -200]]), clip(model)
    once = generated(compiled(model), Call(ids, [pixels], ["video"]))
    assert torch.equal(once, generated(model, Call(ids, [pixels, pixels], ["video", "video"])))


def test_observe(model):
    (observed,) = earlytom_compile.observe(model, [clip(model)], **OPTIONS)
    assert observed.grid == (13, 13) and observed.frame_counts[0] == 6
