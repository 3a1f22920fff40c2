"""The toy world's Video-LLM: transformers' own LlavaOnevisionForConditionalGeneration, 1.5 M parameters.

    model = build_model(seed=0)              # random weights, to be trained
    save(model, "folder")                    # the layout of a real checkpoint
    LlavaOnevisionForConditionalGeneration.from_pretrained(WEIGHTS)    # the trained one

A frame of 96 x 96 pixels is 64 tokens in the vision encoder (8 layers of width 64) and 16 behind the 2-D
pooling, so that a video of 8 frames is 128 video tokens and a newline for the language model (4 layers of
width 128).
"""

from pathlib import Path

from transformers import LlavaOnevisionForConditionalGeneration

from earlytom_compile.toyworld.checkpoint import TinySize, save_checkpoint
from earlytom_compile.toyworld.checkpoint import build_model as build_tiny_model
from earlytom_compile.toyworld.language import CHAT_TEMPLATE, build_tokenizer
from earlytom_compile.toyworld.world import FRAMES, SIZE

SHAPE = TinySize(image=SIZE, patch=12, vision_layers=8, vision_width=64, text_layers=4, text_width=128)
GRID = SIZE // SHAPE.patch
"""Patches of a frame in each direction."""
POOLED = (GRID + 1) // 2
"""Video tokens of a frame in each direction."""
VIDEO_TOKENS = FRAMES * POOLED**2
"""Video tokens of a video, the newline behind them not counted."""
WEIGHTS = Path(__file__).parent / "weights"
"""Folder of the trained checkpoint."""


def build_model(seed: int) -> LlavaOnevisionForConditionalGeneration:
    """The model with random weights, in float32."""
    return build_tiny_model(SHAPE, build_tokenizer(), seed=seed)


def save(model: LlavaOnevisionForConditionalGeneration, folder: str | Path) -> Path:
    """Save weights, tokenizer, chat template and processor settings in ``folder``."""
    return save_checkpoint(folder, model, build_tokenizer(), CHAT_TEMPLATE, frames=FRAMES)
