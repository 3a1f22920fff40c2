"""Sizes of models by name, so that counting and timing need no checkpoint: only sizes decide what work there is.

shape_of("llava-onevision-7b").frame_tokens      # 729 patch tokens a frame in the encoder
config_of("llava-onevision-7b")                  # transformers' config, for a model with random weights
ModelShape.from_config(model.config)             # the sizes of a model at hand
"""

from typing import Any

from .errors import EarlyTomConfigError
from .model_shape import LlavaShape, ModelShape
from .qwen_shape import LinearAttention, QwenShape

__all__ = ["SHAPES", "LlavaShape", "ModelShape", "QwenShape", "config_of", "shape_of", "sized"]

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
# The tower of Qwen3-VL and Qwen3.5 is SigLIP 2, with larger patches.
_SIGLIP_2: dict[str, Any] = {
    "vision_layers": 27, "vision_width": 1152, "vision_heads": 16, "vision_mlp": 4304, "patch_size": 16,
}  # fmt: skip

SHAPES: dict[str, ModelShape] = {
    "llava-onevision-7b": LlavaShape(**_SIGLIP_SO400M, **_QWEN2_7B, vocab=152128),
    "llava-onevision-0.5b": LlavaShape(**_SIGLIP_SO400M, **_QWEN2_05B, vocab=152000, tied_embeddings=True),
    "llava-video-7b": LlavaShape(**_SIGLIP_SO400M, **_QWEN2_7B, vocab=152064, frames=64),
    # The vision tower is that of transformers' defaults, and of the technical report; the language model is Qwen2's 7B.
    "qwen2.5-vl-7b": QwenShape(
        model_type="qwen2_5_vl", vision_layers=32, vision_width=1280, vision_heads=16, vision_mlp=3420, patch_size=14,
        gated=True, window=8, full_layers=(7, 15, 23, 31), **_QWEN2_7B, llm_head=128, vocab=152064,
    ),
    # Qwen3's 8B behind the tower of transformers' defaults; as torchtitan's "8B" has them, too.
    "qwen3-vl-8b": QwenShape(
        model_type="qwen3_vl", **_SIGLIP_2, deepstack=(8, 16, 24),
        llm_layers=36, llm_width=4096, llm_heads=32, llm_kv_heads=8, llm_mlp=12288, llm_head=128, vocab=151936,
    ),
    # transformers' defaults (Qwen3_5TextConfig, Qwen3_5VisionConfig), which are this model's.
    "qwen3.5-9b": QwenShape(
        model_type="qwen3_5", **_SIGLIP_2,
        llm_layers=32, llm_width=4096, llm_heads=16, llm_kv_heads=4, llm_mlp=12288, llm_head=256, vocab=248320,
        gated_queries=True,
        linear=LinearAttention(
            key_heads=16, key_width=128, value_heads=32, value_width=128, kernel=4, full_layers=tuple(range(3, 32, 4)),
        ),
    ),
    # The real number of tokens a frame, and everything else small enough for a processor with few cores. The
    # language model has most of the work, as in the 7B model.
    "cpu-medium": LlavaShape(
        vision_layers=12, vision_width=384, vision_heads=6, vision_mlp=1536, image_size=384, patch_size=14,
        llm_layers=12, llm_width=896, llm_heads=14, llm_kv_heads=2, llm_mlp=4864, vocab=32768, frames=16,
    ),
    "cpu-small": LlavaShape(
        vision_layers=10, vision_width=192, vision_heads=6, vision_mlp=768, image_size=224, patch_size=16,
        llm_layers=6, llm_width=256, llm_heads=4, llm_kv_heads=2, llm_mlp=1408, vocab=8192, frames=16,
    ),
    # The same for the models of Qwen: 16 temporal patches, border windows smaller than the others.
    "cpu-small-qwen2.5": QwenShape(
        model_type="qwen2_5_vl", vision_layers=10, vision_width=192, vision_heads=6, vision_mlp=512, patch_size=14,
        gated=True, window=8, full_layers=(3, 6, 9), grid=(12, 20), frames=32,
        llm_layers=6, llm_width=256, llm_heads=4, llm_kv_heads=2, llm_mlp=1408, llm_head=64, vocab=8192,
    ),
    "cpu-small-qwen3": QwenShape(
        model_type="qwen3_vl", vision_layers=10, vision_width=192, vision_heads=6, vision_mlp=768, patch_size=16,
        deepstack=(2, 5, 8), grid=(12, 20), frames=32,
        llm_layers=6, llm_width=256, llm_heads=4, llm_kv_heads=2, llm_mlp=1408, llm_head=64, vocab=8192,
    ),
    "cpu-small-qwen3.5": QwenShape(
        model_type="qwen3_5", vision_layers=10, vision_width=192, vision_heads=6, vision_mlp=768, patch_size=16,
        grid=(12, 20), frames=32,
        llm_layers=8, llm_width=256, llm_heads=4, llm_kv_heads=2, llm_mlp=1408, llm_head=64, vocab=8192,
        gated_queries=True,
        linear=LinearAttention(
            key_heads=4, key_width=32, value_heads=8, value_width=32, kernel=4, full_layers=(3, 7),
        ),
    ),
    # A quarter of the work of cpu-medium, with the same number of tokens a frame: for the demo.
    "cpu-demo": LlavaShape(
        vision_layers=6, vision_width=256, vision_heads=4, vision_mlp=1024, image_size=384, patch_size=14,
        llm_layers=8, llm_width=640, llm_heads=10, llm_kv_heads=2, llm_mlp=2560, vocab=8192, frames=8,
    ),
    # Nothing to time: whether a program runs.
    "cpu-tiny": LlavaShape(
        vision_layers=4, vision_width=32, vision_heads=4, vision_mlp=64, image_size=24, patch_size=4,
        llm_layers=2, llm_width=48, llm_heads=4, llm_kv_heads=2, llm_mlp=96, vocab=128, frames=8,
    ),
    "cpu-tiny-qwen2.5": QwenShape(
        model_type="qwen2_5_vl", vision_layers=4, vision_width=32, vision_heads=2, vision_mlp=64, patch_size=4,
        gated=True, window=4, full_layers=(1, 3), grid=(6, 10), frames=16,
        llm_layers=2, llm_width=48, llm_heads=4, llm_kv_heads=2, llm_mlp=96, llm_head=12, vocab=128,
    ),
    "cpu-tiny-qwen3": QwenShape(
        model_type="qwen3_vl", vision_layers=4, vision_width=32, vision_heads=2, vision_mlp=64, patch_size=4,
        deepstack=(0, 2), grid=(6, 10), frames=16,
        llm_layers=3, llm_width=48, llm_heads=4, llm_kv_heads=2, llm_mlp=96, llm_head=12, vocab=128,
    ),
    "cpu-tiny-qwen3.5": QwenShape(
        model_type="qwen3_5", vision_layers=4, vision_width=32, vision_heads=2, vision_mlp=64, patch_size=4,
        grid=(6, 10), frames=16,
        llm_layers=4, llm_width=48, llm_heads=4, llm_kv_heads=2, llm_mlp=96, llm_head=32, vocab=128,
        gated_queries=True,
        linear=LinearAttention(
            key_heads=2, key_width=8, value_heads=4, value_width=8, kernel=4, full_layers=(3,),
        ),
    ),
}  # fmt: skip
"""Named shapes; the first three are those of the paper's Tables 1, 2 and 6, the fourth that of Table 7."""

_IMAGE_TOKEN, _VIDEO_TOKEN = 151646, 151647  # of LLaVA-OneVision's tokenizer


def shape_of(name: str) -> ModelShape:
    """A shape by its name; raises :class:`EarlyTomConfigError` with the names there are."""
    if name not in SHAPES:
        raise EarlyTomConfigError(f"no shape {name!r}: there are {', '.join(SHAPES)}.")
    return SHAPES[name]


def sized(shape: ModelShape | None, size: tuple[int, int] | None) -> ModelShape | None:
    """``shape`` for pictures of ``size``, height and width in pixels; None: those it has. Raises
    :class:`EarlyTomConfigError` where the model gives its pictures one size, or cannot have this one."""
    if size is None:
        return shape
    if not isinstance(shape, QwenShape):
        raise EarlyTomConfigError(
            f"frame_size={size[0]}x{size[1]}: pictures of this model have one size, which is part of its shape; leave "
            "it out."
        )
    return shape.of_size(*size)


def config_of(name: str) -> Any:
    """The configuration of a named shape as transformers has it, for a model with random weights."""
    shape = shape_of(name)
    if isinstance(shape, QwenShape):
        from .qwen_configs import qwen_config

        return qwen_config(shape)
    assert isinstance(shape, LlavaShape)
    return _llava_config(shape)


def _llava_config(shape: LlavaShape) -> Any:
    # transformers takes seconds to import, and a shape alone needs none of it.
    from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

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
