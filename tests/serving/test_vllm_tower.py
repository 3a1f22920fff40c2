"""The video path that vLLM's workers run: transformers' tower with a checkpoint's weights; needs no vLLM."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoint import TinySize, write_checkpoint
from transformers import AutoConfig, LlavaOnevisionForConditionalGeneration

import earlytom_compile
from earlytom_compile import EarlyTomCompileError, EarlyTomConfigError, EarlyTomError
from earlytom_compile.families.llava_onevision import LlavaOnevision
from earlytom_compile.integrations.vllm import tower
from earlytom_compile.integrations.vllm.tower import VideoPath

OPTIONS = {"retain_ratio": 0.1}
SMALL = TinySize(image=48, patch=8, vision_layers=4, vision_width=64, text_layers=2, text_width=64)  # 9 tokens a frame


def path_with(folder, eager=True, change=lambda name, weight: weight):
    path = VideoPath(AutoConfig.from_pretrained(folder), LlavaOnevision(), eager=eager)
    weights = {name: change(name, weight) for name, weight in load_file(folder / "model.safetensors").items()}
    given = {name: weight for name, weight in weights.items() if weight is not None}
    handed_on = dict(path.taking(given.items()))
    assert handed_on.keys() == given.keys() and all(handed_on[name] is given[name] for name in given)
    path.require_all()
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "small", SMALL)


@pytest.fixture(scope="module")
def path(checkpoint):
    return path_with(checkpoint)


@pytest.fixture(scope="module")
def model(checkpoint):
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(checkpoint).eval()
    return earlytom_compile.compile(model, lowering="eager", **OPTIONS)


@pytest.fixture
def one_trace(path, model):
    """Both keep what Dynamo has traced of them."""


def clip(frames, seed=0):
    """[F, 3, 48, 48]: a still part and a moving one."""
    video = torch.rand(frames, 3, 48, 48, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    video[frames // 2 :] = video[:1]
    return video


def test_tensors_of_both_kinds_have_one_graph(checkpoint):
    """Those that were made in inference mode, and others."""
    path = path_with(checkpoint)
    with torch.inference_mode():
        (made_inside,) = path.videos({"pixel_values_videos": clip(8)[None] + 0})
        assert made_inside.pixels.is_inference()
        path.encode(made_inside, OPTIONS)
    (made_outside,) = path.videos({"pixel_values_videos": clip(5)[None]})
    with torch.inference_mode():
        path.encode(made_outside, OPTIONS)
    assert len(path.records()) == 1


@pytest.mark.parametrize("frames", [1, 2, 8, 13])
def test_rows_are_those_of_the_model_in_transformers(path, model, one_trace, frames):
    for seed in range(3):
        (video,) = path.videos({"pixel_values_videos": clip(frames, seed)[None]})
        with torch.inference_mode():  # as in vLLM
            rows = path.encode(video, OPTIONS).rows
        (expected,) = earlytom_compile.encode_videos(model, clip(frames, seed)[None])
        assert torch.equal(rows, expected)


def test_checkpoints_of_all_names_are_read(checkpoint, path):
    """Published ones and those that transformers 5.24 saves; with and without the model around it."""
    published = load_file(checkpoint / "model.safetensors")
    assert any("vision_tower.vision_model." in name for name in published)
    today = {name.replace("vision_model.", ""): weight for name, weight in published.items()}
    for names in (today, {f"model.{name}": weight for name, weight in published.items()}):
        other = VideoPath(AutoConfig.from_pretrained(checkpoint), LlavaOnevision(), eager=True)
        list(other.taking(names.items()))
        other.require_all()
        for name, weight in other.model.named_parameters():
            if not tower._is_language(name):
                assert torch.equal(weight, path.model.get_parameter(name)), name


def test_language_model_is_left_out(path):
    assert sum(weight.numel() for weight in path.model.model.language_model.parameters()) < 1000


def test_no_module_of_it_is_found_by_vllm(path):
    holder = torch.nn.Module()
    holder.path = path
    assert len(list(holder.modules())) == 1


def test_each_set_of_options_has_graphs_of_its_own_and_the_last_are_kept(path, one_trace, monkeypatch):
    monkeypatch.setattr(tower, "MOST_SETS_OF_OPTIONS", 2)
    (video,) = path.videos({"pixel_values_videos": clip(8)[None]})
    for ratio in (0.1, 0.25, 1.0, 0.1):
        assert len(path.encode(video, {"retain_ratio": ratio}).rows) == round(ratio * 8 * 9) + 1
    assert len(path._encoders) == 2


class TestRefuses:
    def test_a_quantised_tower(self, checkpoint):
        def quantised(name, weight):
            return weight.to(torch.int8) if name.endswith("layers.3.mlp.fc1.weight") else weight

        with pytest.raises(EarlyTomError, match=r"layers\.3\.mlp\.fc1\.weight.*torch\.int8.*tower is quantised"):
            path_with(checkpoint, change=quantised)

    def test_a_checkpoint_of_another_shape(self, checkpoint):
        def packed(name, weight):
            return weight[:4] if name.endswith("layers.0.mlp.fc2.weight") else weight

        with pytest.raises(EarlyTomError, match=r"takes floating point \[64, \d+\]"):
            path_with(checkpoint, change=packed)

    def test_a_checkpoint_that_lacks_weights(self, checkpoint):
        with pytest.raises(EarlyTomError, match="2 weights .* are not in the checkpoint: multi_modal_projector"):
            path_with(checkpoint, change=lambda name, weight: None if "linear_1" in name else weight)

    def test_layers_that_do_not_exist(self, path):
        (video,) = path.videos({"pixel_values_videos": clip(8)[None]})
        with pytest.raises((EarlyTomConfigError, EarlyTomCompileError), match="layer 40 does not exist"):
            path.encode(video, {"full_layers": [40]})

    def test_rows_that_are_not_compressed(self, checkpoint):
        """Never uncompressed rows: vLLM would cut them to the planned number without a word."""
        fresh = path_with(checkpoint)
        (video,) = fresh.videos({"pixel_values_videos": clip(8)[None]})
        with torch.compiler.set_stance("force_eager"), pytest.raises(EarlyTomCompileError, match="Dynamo did not"):
            fresh.encode(video, OPTIONS)


def test_post_norm_may_be_missing(checkpoint):
    """Published checkpoints leave out what lies behind the layer that is read."""
    path_with(checkpoint, change=lambda name, weight: None if "post_layernorm" in name else weight)
