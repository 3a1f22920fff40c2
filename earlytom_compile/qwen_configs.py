"""Configurations of Qwen2.5-VL, Qwen3-VL and Qwen3.5 as transformers has them, from the sizes of a shape.

qwen_config(shape_of("qwen2.5-vl-7b"))       # Qwen2_5_VLConfig, for a model with random weights
"""

from typing import Any

from .qwen_shape import QwenShape

_SPECIAL = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def qwen_config(shape: QwenShape) -> Any:
    """``shape`` without experts."""
    from transformers import CONFIG_MAPPING  # takes seconds to import

    kind = CONFIG_MAPPING[shape.model_type]
    known = kind()
    # The ids of the real tokenizer where it fits, else the last there are.
    real = max(getattr(known, name) for name in _SPECIAL) < shape.vocab
    ids = {} if real else {name: shape.vocab - 1 - place for place, name in enumerate(_SPECIAL)}
    return kind(
        vision_config=_vision(shape), text_config=_text(shape), tie_word_embeddings=shape.tied_embeddings, **ids
    )


def _vision(shape: QwenShape) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "depth": shape.vision_layers,
        "hidden_size": shape.vision_width,
        "intermediate_size": shape.vision_mlp,
        "num_heads": shape.vision_heads,
        "patch_size": shape.patch_size,
        "spatial_merge_size": shape.merge,
        "temporal_patch_size": shape.temporal,
        "out_hidden_size": shape.llm_width,
    }
    if shape.window is not None:
        sizes |= {"window_size": shape.window * shape.patch_size, "fullatt_block_indexes": list(shape.full_layers)}
    if shape.model_type.startswith("qwen3_vl"):
        sizes["deepstack_visual_indexes"] = list(shape.deepstack)
    return sizes


def _text(shape: QwenShape) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.llm_width,
        "intermediate_size": shape.llm_mlp,
        "num_hidden_layers": shape.llm_layers,
        "num_attention_heads": shape.llm_heads,
        "num_key_value_heads": shape.llm_kv_heads,
        "max_position_embeddings": 128000,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    half = shape.llm_head // 2  # of the channels turn together
    if shape.model_type == "qwen2_5_vl":
        third = 3 * half // 8
        return {**sizes, "rope_scaling": {"type": "mrope", "mrope_section": [half - 2 * third, third, third]}}
    rope: dict[str, Any] = {"rope_type": "default", "mrope_interleaved": True}
    if shape.linear is not None:
        kinds = ["linear_attention"] * shape.llm_layers
        for layer in shape.linear.full_layers:
            kinds[layer] = "full_attention"
        sizes |= {
            "layer_types": kinds,
            "linear_num_key_heads": shape.linear.key_heads,
            "linear_key_head_dim": shape.linear.key_width,
            "linear_num_value_heads": shape.linear.value_heads,
            "linear_value_head_dim": shape.linear.value_width,
            "linear_conv_kernel_dim": shape.linear.kernel,
        }
        half //= 4
        rope |= {"partial_rotary_factor": 0.25, "rope_theta": 1e7}
    third = 5 * half // 16
    rope["mrope_section"] = [half - 2 * third, third, third]
    return {**sizes, "head_dim": shape.llm_head, "rope_parameters": rope}
