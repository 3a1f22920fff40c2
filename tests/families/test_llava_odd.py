"""LLaVA's own code called in odd ways: hooks, subclasses, methods called by hand, what cannot be right."""

import pytest
import torch
from handwritten_llava import handwritten_llava
from llava_calls import CLOSE_LOGITS, Call, clip, compiled, generated

import earlytom_compile
from earlytom_compile import EarlyTomCompileError, EarlyTomConfigError, EarlyTomFallbackWarning, report
from earlytom_compile.families.llava import Llava

ONE = [["text", "video", "text"]]
EVERYTHING = {"retain_ratio": 1.0, "tau_merge": 2.0}
SPLICE = "prepare_inputs_labels_for_multimodal"


@pytest.fixture(autouse=True)
def any_version(monkeypatch):
    monkeypatch.setattr(Llava, "requires", {})


@pytest.fixture
def model():
    return handwritten_llava(newline="grid", pool="average")


def logits(model, call):
    with torch.no_grad():
        return model(**call.forward()).logits


def kept(model, call):
    """Positions that a compressed call leaves."""
    logits(model, call)
    return report(model).to_dict()["prompt"][1]


def subclass(model, **methods):
    """``model`` as one of a class derived from its own."""
    model.__class__ = type("Derived", (type(model),), methods)
    return model


class TestHooks:
    @pytest.mark.parametrize("place", ["tower", pytest.param("projector", marks=pytest.mark.long)])
    def test_one_that_comes_later_is_seen(self, model, place):
        call = Call.of(model, ONE)
        logits(compiled(model, **EVERYTHING), call)
        inner = model.get_model()
        module = inner.mm_projector if place == "projector" else next(inner.vision_tower.children())
        hook = module.register_forward_hook(lambda module, inputs, output: _halved(output))
        changed = logits(model, call)
        earlytom_compile.restore(model)
        own = logits(model, call)
        hook.remove()
        assert not torch.allclose(own, logits(model, call), **CLOSE_LOGITS)
        torch.testing.assert_close(changed, own, **CLOSE_LOGITS)

    def test_one_on_the_tower_leaves_the_prompt_compiled(self, model):
        prefill = compiled(model, lowering="staged")._earlytom.prefill
        assert prefill.left_alone is None
        model.get_vision_tower().register_forward_hook(lambda *_: None)
        assert prefill.left_alone is None
        model.get_model().layers[0].register_forward_hook(lambda *_: None)
        assert "it has hooks" in prefill.left_alone

    def test_a_tower_that_is_not_there(self, model):
        model.get_vision_tower().to("meta")
        with pytest.raises(EarlyTomConfigError, match="meta|not on one device"):
            compiled(model)


def _halved(output):
    return output / 2 if isinstance(output, torch.Tensor) else type(output)(x / 2 for x in output)


class TestPromptMethod:
    def test_called_by_hand_it_compresses(self, model):
        call = Call.of(model, ONE)
        expected = kept(compiled(model), call)
        with torch.no_grad():
            made = getattr(model, SPLICE)(call.ids, None, None, None, None, call.images, call.modalities)
        assert made[4].shape[1] == expected
        assert report(model).to_dict()["last_call"] == "compressed"

    def test_called_by_hand_without_a_video_it_is_the_models_own(self, model):
        ids = torch.tensor([[5, 6, 7]])
        own = getattr(model, SPLICE)(ids, None, None, None, None, None, ["image"])
        made = getattr(compiled(model), SPLICE)(ids, None, None, None, None, None, ["image"])
        assert torch.equal(made[0], own[0]) and made[1:] == own[1:]

    def test_a_generate_that_brings_its_video_otherwise_compresses(self, model):
        def generate(self, inputs=None, pixels=None, **kwargs):
            return super(type(self), self).generate(inputs, images=[pixels], modalities=["video"], **kwargs)

        call = Call.of(model, ONE)
        tokens = generated(compiled(model), call)
        earlytom_compile.restore(model)
        compiled(subclass(model, generate=generate))
        new = model.generate(call.ids, pixels=call.images[0], max_new_tokens=tokens.shape[1], do_sample=False)
        assert torch.equal(new, tokens)
        assert report(model).to_dict()["last_call"] == "compressed"

    def test_one_of_a_subclass_is_used_once(self, model):
        """For the whole prompt: not for the pictures alone, too."""

        def prepare(self, *args, **kwargs):
            *rest, embeds, labels = super(type(self), self).prepare_inputs_labels_for_multimodal(*args, **kwargs)
            return (*rest, None if embeds is None else 1.5 * embeds, labels)

        subclass(model, prepare_inputs_labels_for_multimodal=prepare)
        call = Call.of(model, [["text", "image", "video", "text"]])
        own = logits(model, call)
        torch.testing.assert_close(logits(compiled(model, **EVERYTHING), call), own, **CLOSE_LOGITS)

    def test_one_put_on_the_model_before_is_a_reason(self, model):
        replace(model)
        call = Call.of(model, ONE)
        own = logits(model, call)
        with pytest.warns(EarlyTomFallbackWarning, match="was replaced by another before compile"):
            assert torch.equal(logits(compiled(model, strict=False), call), own)
        with pytest.raises(EarlyTomCompileError, match="was replaced by another before compile"):
            logits(compiled(model), call)

    def test_one_put_on_the_model_later_is_told(self, model):
        call = Call.of(model, ONE)
        compiled(model)
        replace(model)
        with pytest.raises(EarlyTomCompileError, match="is not what it was"):
            logits(model, call)

    def test_what_runs_uncompressed_is_told_once(self, model):
        model.config.add_faster_video = True
        compiled(model, strict=False)
        with pytest.warns(EarlyTomFallbackWarning) as warned:
            logits(model, Call.of(model, ONE))
        assert len([each for each in warned if each.category is EarlyTomFallbackWarning]) == 1


def replace(model):
    """A method of one's own on the model, which does what that of the class does."""
    own = getattr(type(model), SPLICE)
    model.prepare_inputs_labels_for_multimodal = lambda *args, **kwargs: own(model, *args, **kwargs)


class TestWhatCannotBeRight:
    def test_frames_are_no_videos(self, model):
        compiled(model)
        with pytest.raises(EarlyTomConfigError, match=r"images have shape \(6, 3, "):
            earlytom_compile.encode_videos(model, clip(model))

    def test_a_video_that_is_no_list(self, model):
        call = Call.of(model, ONE)
        flat = call.but(images=call.images[0])
        own = logits(model, flat)
        with pytest.raises(EarlyTomCompileError, match=r"Give a list: images=\[video\]"):
            logits(compiled(model), flat)
        with pytest.warns(EarlyTomFallbackWarning, match="a picture to the model's own code"):
            assert torch.equal(logits(compiled(model, strict=False), flat), own)

    @pytest.mark.parametrize(
        "option, value, says",
        [
            ("mm_newline_position", "oops", "mm_newline_position='oops'"),
            ("mm_patch_merge_type", "unpad", "neither 'flat' nor 'spatial...'"),
            ("mm_spatial_pool_mode", None, "mm_spatial_pool_mode=None"),
            ("add_faster_video", True, "add_faster_video"),
        ],
    )
    def test_encoding_asks_for_the_same(self, model, option, value, says):
        compiled(model)
        setattr(model.config, option, value)
        with pytest.raises(EarlyTomConfigError, match=says):
            earlytom_compile.encode_videos(model, [clip(model)])
        with pytest.raises(EarlyTomCompileError, match=says):
            logits(model, Call.of(model, ONE))

    def test_a_tower_that_is_not_loaded(self, model):
        compiled(model)
        model.get_vision_tower().is_loaded = False
        with pytest.raises(EarlyTomConfigError, match=r"load_model\(\)"):
            earlytom_compile.encode_videos(model, [clip(model)])

    def test_rows_beside_pixels(self, model):
        call = Call.of(model, [["video", "text", "video"]])
        rows = earlytom_compile.encode_videos(compiled(model), call.images[:1])
        with pytest.raises(EarlyTomConfigError, match="others pixels"):
            logits(model, call.but(images=[rows[0], call.images[1]]))

    def test_another_dtype(self, model):
        call = Call.of(model, ONE)
        compiled(model)
        with pytest.raises(EarlyTomConfigError, match="a video is torch.float64 and the model torch.float32"):
            logits(model, call.but(images=[call.images[0].double()]))

    def test_sizes_of_pictures_that_need_none(self, model):
        call = Call.of(model, [["video", "text", "image"]])
        full = logits(compiled(model), call)
        assert torch.equal(logits(model, call.but(image_sizes=call.image_sizes[:1])), full)


def test_videos_that_were_encoded_before_are_put_into_one_prompt(model, monkeypatch):
    """The second one, of the uncut length, is for limits and the report of what is cut now."""
    call = Call.of(model, ONE)
    rows = earlytom_compile.encode_videos(compiled(model), call.images)
    counted = []
    monkeypatch.setattr(Llava, "prompt_length", lambda *arguments: counted.append(1) or 1000)
    logits(model, call.but(images=rows))
    assert not counted
    logits(model, call)
    assert len(counted) == 1
