"""Checkpoint folders of Qwen2.5-VL, Qwen3-VL and Qwen3.5 with random weights: model, tokenizer, chat template, and
transformers' own processors, which read videos of any size."""

from pathlib import Path

import pytest
import torch
from scenes import spread
from tiny_checkpoint import build_byte_tokenizer

from earlytom_compile import EarlyTomConfigError
from earlytom_compile.benchmarks.workload import random_model
from earlytom_compile.families.registry import BUILT_IN
from earlytom_compile.qwen_configs import qwen_config
from earlytom_compile.qwen_shape import QwenShape
from earlytom_compile.shapes import shape_of

# In order of their ids, from 0 on.
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip

# One turn per message, as Qwen's own: a video or a picture stands where it was said.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% for part in message.content -%}
{%- if part.type == "text" %}{{ part.text }}{% else %}<|vision_start|><|{{ part.type }}_pad|><|vision_end|>{% endif -%}
{%- endfor %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


def require_family(shape: str) -> None:
    """Skip the test where this transformers is too old for models of the named ``shape``."""
    kind = shape_of(shape).model_type
    try:
        next(family for family in BUILT_IN if family.model_type == kind).require_versions()
    except EarlyTomConfigError as reason:
        pytest.skip(str(reason))


def write_qwen_checkpoint(folder: str | Path, shape: str | QwenShape, *, most_tokens: int = 12, seed: int = 0) -> Path:
    """A model of a ``shape`` or of a named one, such as ``"cpu-tiny-qwen2.5"``, for pictures of ``most_tokens`` tokens
    at most; Qwen3 and later count those of a whole video of 8 pictures."""
    tokenizer = build_byte_tokenizer(SPECIAL_TOKENS, "<|im_end|>", "<|endoftext|>")
    sizes = shape_of(shape) if isinstance(shape, str) else shape
    config = qwen_config(sizes)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in zip(
        ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"), SPECIAL_TOKENS[3:],
        strict=True,
    )}  # fmt: skip
    for name, token in ids.items():
        setattr(config, name, token)
    config.text_config.vocab_size = len(tokenizer)
    model = random_model(config, device="cpu", dtype=torch.float32, seed=seed)
    spread(model)
    model.generation_config.suppress_tokens = list(range(len(SPECIAL_TOKENS)))
    model.save_pretrained(folder)
    _processor(sizes, tokenizer, most_tokens).save_pretrained(folder)
    return Path(folder)


def _processor(sizes, tokenizer, most_tokens):
    # These need torchvision.
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen3VLProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    patches = {"patch_size": sizes.patch_size, "merge_size": sizes.merge, "temporal_patch_size": sizes.temporal}
    token = (sizes.patch_size * sizes.merge) ** 2
    budget = {"shortest_edge": token, "longest_edge": most_tokens * token}
    images = Qwen2VLImageProcessor(size=budget, **patches)
    if sizes.model_type == "qwen2_5_vl":
        videos = Qwen2VLVideoProcessor(size=budget, **patches, cap_pixels_per_frame=False)
        return Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=CHAT_TEMPLATE)
    whole = {"shortest_edge": token, "longest_edge": 8 * most_tokens * token}
    videos = Qwen3VLVideoProcessor(size=whole, **patches, cap_pixels_per_frame=False)
    return Qwen3VLProcessor(images, tokenizer, videos, chat_template=CHAT_TEMPLATE)
