"""Qwen2.5-VL, Qwen3-VL and Qwen3.5 (and the twins with experts) small enough to run in milliseconds, and prompts with
videos of any size that they can tell apart.

    model = tiny_qwen("qwen3_vl")
    inputs = qwen_inputs(model, [[3, Clip(6, 4, 6), 4], [1, Still(4, 4), Clip(2, 8, 8), 4]])
    logits = model(**inputs).logits

A frame of these models is one temporal patch, two pictures. A row of a prompt is written as what is in it: a number of
text tokens, a Clip, a Still. Shorter rows are padded on the left.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
import transformers
from scenes import spread, video
from torch import Tensor, nn

PAD = 0
FIRST_TEXT_TOKEN = 3
VOCABULARY = 120
VISION_START, VISION_END, IMAGE, VIDEO = range(VOCABULARY - 4, VOCABULARY)
PATCH, TEMPORAL, SIDE = 4, 2, 2
"""Pixels of a patch's side, pictures of a frame, patches of a token's side."""
IMAGES = IMAGE, "pixel_values", "image_grid_thw"
VIDEOS = VIDEO, "pixel_values_videos", "video_grid_thw"

CLASSES = {
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen3_vl": "Qwen3VL",
    "qwen3_vl_moe": "Qwen3VLMoe",
    "qwen3_5": "Qwen3_5",
    "qwen3_5_moe": "Qwen3_5Moe",
}
KINDS = tuple(CLASSES)
PLAIN_KINDS = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")
"""Those without experts."""


def has_deepstack(model: Any) -> bool:
    """Whether earlier layers of the vision encoder reach the language model, too."""
    return hasattr(model.model.visual, "deepstack_merger_list")


def stamps_time(model: Any) -> bool:
    """Whether each frame stands behind a time stamp of its own, or the frames of a video are one run."""
    return not hasattr(model.config.vision_config, "window_size")


def _text_options(kind: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "pad_token_id": PAD,
        "num_hidden_layers": 3,
    }
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
    if kind == "qwen2_5_vl":
        options |= {"num_hidden_layers": 2, "bos_token_id": None, "eos_token_id": None}
    else:
        rope["mrope_interleaved"] = True
        options["head_dim"] = 12
    if "qwen3_5" in kind:
        rope["partial_rotary_factor"] = 0.75
        options |= {"head_dim": 16, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
        options |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
        options |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    if kind.endswith("moe"):
        options |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        options |= {"shared_expert_intermediate_size": 24} if "qwen3_5" in kind else {}
        options.pop("intermediate_size")
    return options | {"rope_parameters": rope}


def _vision_options(kind: str, layers: int, full: Sequence[int], deepstack: Sequence[int]) -> dict[str, Any]:
    options: dict[str, Any] = {
        "depth": layers,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 48,
        "patch_size": PATCH,
        "temporal_patch_size": TEMPORAL,
        "spatial_merge_size": SIDE,
    }
    if kind == "qwen2_5_vl":  # windows of 2 x 2 tokens, those at the border smaller
        return options | {"fullatt_block_indexes": list(full), "window_size": 2 * SIDE * PATCH}
    options["num_position_embeddings"] = 64
    return options | ({"deepstack_visual_indexes": list(deepstack)} if "qwen3_vl" in kind else {})


def tiny_qwen(
    kind: str,
    *,
    vision_layers: int = 6,
    full: Sequence[int] = (2, 5),
    deepstack: Sequence[int] = (0, 2, 4),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A fresh ``...ForConditionalGeneration`` of one of KINDS in eval mode; the same seed gives the same weights.

    ``full``: layers of Qwen2.5-VL's tower that attend beyond a window. ``deepstack``: layers of Qwen3-VL's that reach
    the language model, at most as many as it has layers (3).
    """
    config = getattr(transformers, CLASSES[kind] + "Config")(
        text_config=_text_options(kind),
        vision_config=_vision_options(kind, vision_layers, full, deepstack),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, CLASSES[kind] + "ForConditionalGeneration")(config).eval()
        spread(model)
        _spread_what_is_no_matrix(model)
    return model.to(dtype)


@torch.no_grad()
def _spread_what_is_no_matrix(model: nn.Module) -> None:
    """Positions weigh little beside what is in them; experts are matrices, one behind the other; linear attention
    forgets slowly, since what is left of a state that fades at once is mostly rounding."""
    for name, parameter in model.named_parameters():
        if "pos_embed" in name:
            nn.init.normal_(parameter, std=0.2)
        elif name.endswith(("gate_up_proj", "experts.down_proj")):
            nn.init.normal_(parameter, std=48**-0.5 if "gate_up" in name else 24**-0.5)
        elif name.endswith("A_log"):
            nn.init.uniform_(parameter, -5.0, -2.0)


# --- What is in a prompt --------------------------------------------------------------------------


@dataclass(frozen=True)
class Clip:
    """A video: T frames of ``height`` x ``width`` patches, both even. ``still``: all frames are equal bit for bit.
    ``interval``: seconds of a frame."""

    frames: int
    height: int
    width: int
    scenes: int | None = None
    drift: float = 0.25
    still: bool = False
    interval: float = 1.0

    @property
    def patches(self) -> int:
        """S, of a frame."""
        return self.height * self.width

    @property
    def tokens(self) -> int:
        """P, of a frame."""
        return self.patches // SIDE**2

    def pictures(self, generator: torch.Generator) -> Tensor:
        """``[2 T, 3, H, W]``."""
        scenes = max(1, self.frames // 4) if self.scenes is None else self.scenes
        size = self.height * PATCH, self.width * PATCH
        drawn = {"scenes": scenes, "drift": self.drift, "static": self.still}
        return video(TEMPORAL * self.frames, size, **drawn, generator=generator)


@dataclass(frozen=True)
class Still:
    """An image of ``height`` x ``width`` patches."""

    height: int
    width: int
    frames: int = field(default=1, init=False)

    @property
    def tokens(self) -> int:
        return self.height * self.width // SIDE**2

    def pictures(self, generator: torch.Generator) -> Tensor:
        return torch.randn(1, 3, self.height * PATCH, self.width * PATCH, generator=generator).expand(2, -1, -1, -1)


def patches_of(pictures: Tensor) -> Tensor:
    """``[2 T, 3, H, W]`` -> ``[T S, 3 * 2 * PATCH**2]``, as the processors cut them: the frames one after the other, in
    a frame the tokens row by row, in a token its patches row by row."""
    frames, channels, height, width = len(pictures) // TEMPORAL, *pictures.shape[1:]
    rows, columns = height // PATCH // SIDE, width // PATCH // SIDE
    cut = pictures.view(frames, TEMPORAL, channels, rows, SIDE, PATCH, columns, SIDE, PATCH)
    return cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(frames * height * width // PATCH**2, -1)


def qwen_inputs(
    model: Any, rows: Sequence[Sequence[int | Clip | Still]], *, seed: int = 1, padding: int = 0
) -> dict[str, Any]:
    """What the model's processor would give for these rows, the longest of which has ``padding`` in front."""
    generator = torch.Generator().manual_seed(seed)
    sequences = [list(chain.from_iterable(_ids(model, item, generator) for item in row)) for row in rows]
    length = padding + max(map(len, sequences))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in sequences])
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in sequences]),
        "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int(),
    }
    for kind, pixels, grid in (
        (Still, "pixel_values", "image_grid_thw"),
        (Clip, "pixel_values_videos", "video_grid_thw"),
    ):
        seen = [item for item in chain.from_iterable(rows) if isinstance(item, kind)]
        if seen:
            inputs[pixels] = torch.cat([patches_of(item.pictures(generator)) for item in seen]).to(model.dtype)
            inputs[grid] = torch.tensor([[item.frames, item.height, item.width] for item in seen])
        if seen and kind is Clip and not stamps_time(model):
            inputs["second_per_grid_ts"] = torch.tensor([item.interval for item in seen])
    return inputs


def _ids(model: Any, item: int | Clip | Still, generator: torch.Generator) -> list[int]:
    def text(count: int) -> list[int]:
        return torch.randint(FIRST_TEXT_TOKEN, VISION_START, (count,), generator=generator).tolist()

    if isinstance(item, int):
        return text(item)
    if isinstance(item, Still):
        return [VISION_START, *[IMAGE] * item.tokens, VISION_END]
    if not stamps_time(model):
        return [VISION_START, *[VIDEO] * (item.frames * item.tokens), VISION_END]
    frame = [VISION_START, *[VIDEO] * item.tokens, VISION_END]
    return list(chain.from_iterable(text(2) + frame for _ in range(item.frames)))  # a time stamp and a frame


def row_alone(inputs: dict[str, Any], row: int) -> dict[str, Any]:
    """The inputs of one row of a batch, without padding."""
    seen = inputs["attention_mask"][row].bool()
    alone = {name: inputs[name][row : row + 1, seen] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    for token, pixels, grid in (
        (IMAGE, "pixel_values", "image_grid_thw"),
        (VIDEO, "pixel_values_videos", "video_grid_thw"),
    ):
        if grid not in inputs:
            continue
        first, count = _of_row(inputs["input_ids"], inputs[grid], token, row)
        if count:
            patches = inputs[grid].prod(1)
            begin, end = int(patches[:first].sum()), int(patches[: first + count].sum())
            alone |= {pixels: inputs[pixels][begin:end], grid: inputs[grid][first : first + count]}
        if count and token == VIDEO and "second_per_grid_ts" in inputs:
            alone["second_per_grid_ts"] = inputs["second_per_grid_ts"][first : first + count]
    return alone


def _of_row(ids: Tensor, grids: Tensor, token: int, row: int) -> tuple[int, int]:
    """Which of the videos (or images) of a batch a row has: the first, and how many."""
    sizes, used = (grids.prod(1) // SIDE**2).tolist(), 0
    for index, row_ids in enumerate(ids):
        left, first = int((row_ids == token).sum()), used
        while left > 0:
            left -= sizes[used]
            used += 1
        assert left == 0
        if index == row:
            break
    return first, used - first
