"""Sizes of models by name, so that counting and timing need no checkpoint: only sizes decide what work there is.

shape_of("llava-onevision-7b").frame_tokens      # 729 patch tokens a frame in the encoder
config_of("llava-onevision-7b")                  # transformers' config, for a model with random weights
ModelShape.from_config(model.config)             # the sizes of a model at hand
"""

from dataclasses import dataclass
from typing import Any

from .errors import EarlyTomConfigError


@dataclass(frozen=True)
class ModelShape:
    """What decides how much work a LLaVA-OneVision is: a SigLIP encoder, a projector, 2x2 pooling, a Qwen2."""

    vision_layers: int
    vision_width: int
    vision_heads: int
    vision_mlp: int
    image_size: int
    patch_size: int
    llm_layers: int
    llm_width: int
    llm_heads: int
    llm_kv_heads: int
    llm_mlp: int
    vocab: int
    tied_embeddings: bool = False
    """Whether ``lm_head`` is the embedding: the same work, fewer weights."""
    frames: int = 32
    """Frames the model is used with, unless somebody says otherwise."""

    @property
    def frame_tokens(self) -> int:
        """S: patch tokens of a frame inside the encoder."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def pooled_tokens(self) -> int:
        """P: tokens of a frame after 2x2 pooling, which the language model gets."""
        return (-(-(self.image_size // self.patch_size) // 2)) ** 2

    @classmethod
    def from_config(cls, config: Any) -> "ModelShape":
        """The sizes in a ``LlavaOnevisionConfig``; raises :class:`EarlyTomConfigError` for what cannot be counted."""
        vision, text = config.vision_config, config.text_config
        head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        if head_width * text.num_attention_heads != text.hidden_size or not isinstance(
            config.vision_feature_layer, int
        ):
            raise EarlyTomConfigError(
                f"head_dim={head_width} x {text.num_attention_heads} heads, hidden_size={text.hidden_size}, "
                f"vision_feature_layer={config.vision_feature_layer}: the work of a model can be counted where the "
                "heads fill the width and one encoder layer feeds the projector, as in LLaVA-OneVision."
            )
        return cls(
            vision_layers=vision.num_hidden_layers,
            vision_width=vision.hidden_size,
            vision_heads=vision.num_attention_heads,
            vision_mlp=vision.intermediate_size,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            llm_layers=text.num_hidden_layers,
            llm_width=text.hidden_size,
            llm_heads=text.num_attention_heads,
            llm_kv_heads=text.num_key_value_heads,
            llm_mlp=text.intermediate_size,
            vocab=text.vocab_size,
            tied_embeddings=bool(config.tie_word_embeddings),
        )


_SIGLIP_SO400M: dict[str, Any] = {
    "vision_layers": 26,
    "vision_width": 1152,
    "vision_heads": 16,
    "vision_mlp": 4304,
    "image_size": 384,
    "patch_size": 14,
}
_QWEN2_7B: dict[str, Any] = {"llm_layers": 28, "llm_width": 3584, "llm_heads": 28, "llm_kv_heads": 4, "llm_mlp": 18944}
_QWEN2_05B: dict[str, Any] = {"llm_layers": 24, "llm_width": 896, "llm_heads": 14, "llm_kv_heads": 2, "llm_mlp": 4864}

SHAPES: dict[str, ModelShape] = {
    "llava-onevision-7b": ModelShape(**_SIGLIP_SO400M, **_QWEN2_7B, vocab=152128),
    "llava-onevision-0.5b": ModelShape(**_SIGLIP_SO400M, **_QWEN2_05B, vocab=152000, tied_embeddings=True),
    "llava-video-7b": ModelShape(**_SIGLIP_SO400M, **_QWEN2_7B, vocab=152064, frames=64),
    # The real number of tokens a frame, and everything else small enough for a processor with few cores. The
    # language model has most of the work, as in the 7B model.
    "cpu-medium": ModelShape(
        vision_layers=12, vision_width=384, vision_heads=6, vision_mlp=1536, image_size=384, patch_size=14,
        llm_layers=12, llm_width=896, llm_heads=14, llm_kv_heads=2, llm_mlp=4864, vocab=32768, frames=16,
    ),
    "cpu-small": ModelShape(
        vision_layers=10, vision_width=192, vision_heads=6, vision_mlp=768, image_size=224, patch_size=16,
        llm_layers=6, llm_width=256, llm_heads=4, llm_kv_heads=2, llm_mlp=1408, vocab=8192, frames=16,
    ),
    # A quarter of the work of cpu-medium, with the same number of tokens a frame: for the demo.
    "cpu-demo": ModelShape(
        vision_layers=6, vision_width=256, vision_heads=4, vision_mlp=1024, image_size=384, patch_size=14,
        llm_layers=8, llm_width=640, llm_heads=10, llm_kv_heads=2, llm_mlp=2560, vocab=8192, frames=8,
    ),
    # Nothing to time: whether a program runs.
    "cpu-tiny": ModelShape(
        vision_layers=4, vision_width=32, vision_heads=4, vision_mlp=64, image_size=24, patch_size=4,
        llm_layers=2, llm_width=48, llm_heads=4, llm_kv_heads=2, llm_mlp=96, vocab=128, frames=8,
    ),
}  # fmt: skip
"""Named shapes; the first three are those of the paper's Tables 1, 2 and 6."""

_IMAGE_TOKEN, _VIDEO_TOKEN = 151646, 151647  # of LLaVA-OneVision's tokenizer


def shape_of(name: str) -> ModelShape:
    """A shape by its name; raises :class:`EarlyTomConfigError` with the names there are."""
    if name not in SHAPES:
        raise EarlyTomConfigError(f"no shape {name!r}: there are {', '.join(SHAPES)}.")
    return SHAPES[name]


def config_of(name: str) -> Any:
    """``LlavaOnevisionConfig`` of a named shape, for a model with random weights."""
    # transformers takes seconds to import, and a shape alone needs none of it.
    from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

    shape = shape_of(name)
    vision = SiglipVisionConfig(
        hidden_size=shape.vision_width,
        intermediate_size=shape.vision_mlp,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads,
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.llm_width,
        intermediate_size=shape.llm_mlp,
        num_hidden_layers=shape.llm_layers,
        num_attention_heads=shape.llm_heads,
        num_key_value_heads=shape.llm_kv_heads,
        max_position_embeddings=32768,
        tie_word_embeddings=shape.tied_embeddings,
    )
    real = shape.vocab > _VIDEO_TOKEN
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=_IMAGE_TOKEN if real else shape.vocab - 2,
        video_token_index=_VIDEO_TOKEN if real else shape.vocab - 1,
        image_grid_pinpoints=[[shape.image_size, shape.image_size * columns] for columns in (1, 2)],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=shape.tied_embeddings,
    )
