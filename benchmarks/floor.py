"""How fast a first token could be on a machine that always ran at its measured best.

    work_of(model, schedules=[(32, 27, 25, 24)], prompt=660)   ->   {"encoder": Work(17.2e12, 3.1e9), ...}
    floor(work, {"matmul": 7e14, "copy": 4e12})                ->   seconds

A part takes at least its operations at the rate of a large matrix product, or its bytes at that of a large copy,
whichever is more, and the parts wait for each other.

Operations are those of ``flops.count(protocol="exact")``, but causal attention is the triangle that it needs and not
the full square; what the square counts beyond that stands beside them. Bytes are what must move if nothing outlives a
layer in a cache: every weight once, pixels once, the sequence into and out of every layer, keys and values into the
cache, what the projector reads and writes. What goes on inside a layer, and the small operands of our operators, move
nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from earlytom_compile.benchmarks.model_parts import LLM, TOKENS, VISION, weight_bytes
from earlytom_compile.config import Variant
from earlytom_compile.flops import Reuse, count
from earlytom_compile.flops_inside import layer_lengths, operations_inside
from earlytom_compile.methods.base import Step
from earlytom_compile.methods.registry import EARLYTOM
from earlytom_compile.shapes import ModelShape


@dataclass(frozen=True)
class Work:
    """Operations (a multiply-add counts as two) and bytes."""

    flops: float
    bytes: float
    not_needed: float = 0.0
    """Operations that ``flops.count`` counts beyond ``flops``: causal attention above the diagonal."""


@dataclass(frozen=True)
class Floor:
    """All work of a first token, and the seconds below which no machine with these ceilings comes."""

    flops: float
    bytes: float
    seconds: float
    encoder_flops: float
    """Of the vision encoder alone."""
    exact_flops: float
    """All work as ``flops.count(protocol="exact")`` counts it."""


def floor(work: Mapping[str, Work], ceilings: Mapping[str, float]) -> Floor:
    """``work`` as :func:`work_of` gives it; ``ceilings``: ``matmul`` in operations and ``copy`` in bytes per second."""
    seconds = sum(max(part.flops / ceilings["matmul"], part.bytes / ceilings["copy"]) for part in work.values())
    flops, moved = (sum(getattr(part, name) for part in work.values()) for name in ("flops", "bytes"))
    not_needed = sum(part.not_needed for part in work.values())
    return Floor(flops, moved, seconds, work["encoder"].flops, flops + not_needed)


def work_of(
    model: Any,
    *,
    schedules: Sequence[Sequence[int]],
    prompt: int | Mapping[int, int],
    merge_layers: Sequence[int] | None = None,
    variant: Variant | None = None,
    method: str = EARLYTOM,
    kept: Sequence[int] = (),
    steps: Sequence[Step] = (),
    reuse: Sequence[Reuse] = (),
    shape: ModelShape | None = None,
) -> dict[str, Work]:
    """Work of one batch of prompts with one video each.

    Args:
        model: a LLaVA-OneVision, or one of Qwen; its weights are counted as they are stored.
        schedules: frames of each video, at first and after each merge layer; just the first where nothing merges.
        prompt: positions in the language model, the same in every row; or, where ``steps`` inside make them fewer, from
            each 0-based layer on.
        merge_layers: 0-based encoder layers after which frames merge; None = the default for the depth.
        variant, method: those of ``EarlyTomConfig``, by which the operators are counted.
        kept: tokens of each video that another ``method`` keeps behind the encoder.
        steps: what those operators inside the language model are.
        reuse: what is computed of each video where unchanged patches are not computed again; else empty.
        shape: the model's, for pictures of the size they have; None: what its configuration says.

    Raises:
        EarlyTomConfigError: a model whose work cannot be counted, see :meth:`ModelShape.from_config`.
    """
    shape, item = shape or ModelShape.from_config(model.config), model.dtype.itemsize
    merges = shape.merges(merge_layers)
    reused: list[Reuse | None] = [*reuse] or [None] * len(schedules)
    starts = {0: prompt} if isinstance(prompt, int) else prompt
    options: dict[str, Any] = {"protocol": "exact", "llm_tokens": starts, "merge_layers": merges, "variant": variant}
    if method != EARLYTOM:
        options["method"] = method
    left: list[int | None] = [*kept] if method != EARLYTOM else [None] * len(schedules)
    counts = [
        count(shape, frames_schedule=schedule, reuse=each, kept=tokens, **options)
        for schedule, each, tokens in zip(schedules, reused, left, strict=True)
    ]
    pixels = shape.frame_pixels * sum(schedule[0] for schedule in schedules)
    tokens = sum(
        _tokens_of_all_layers(schedule, each, merges, shape) for schedule, each in zip(schedules, reused, strict=True)
    )
    projected = sum(shape.projector_moves(schedule[-1]) for schedule in schedules)
    rows, lengths = len(schedules), list(enumerate(layer_lengths(starts, shape.llm_layers)))
    cached = rows * sum(shape.cache_numbers(layer, length) for layer, length in lengths)
    through = rows * sum(length for _, length in lengths)
    above_diagonal = rows * sum(2 * shape.above_diagonal(layer, length) for layer, length in lengths)
    weights = weight_bytes(model.model)
    moved = {
        "encoder": weights[VISION] + item * (pixels + 2 * tokens * shape.vision_width),
        "operators": 0,
        "projector": weights[TOKENS] + item * projected,
        "llm": weights[LLM] + item * (2 * through * shape.llm_width + cached),
        "lm_head": model.lm_head.weight.nbytes,
    }
    done = {part: sum(getattr(counted, part) for counted in counts) for part in moved}
    done["llm"] -= above_diagonal
    done["operators"] += rows * operations_inside(shape, starts, steps)
    return {part: Work(done[part], moved[part], above_diagonal if part == "llm" else 0.0) for part in moved}


def _tokens_of_all_layers(
    schedule: Sequence[int], reuse: Reuse | None, merges: Sequence[int], shape: ModelShape
) -> float:
    """Patch tokens that go through a layer of the encoder, summed over its layers."""
    if reuse is not None:
        full, distinct = len(set(reuse.full_layers)), schedule[0] if reuse.distinct is None else reuse.distinct
        return full * distinct * shape.frame_tokens + (shape.vision_layers - full) * reuse.computed
    starts = [0, *(layer + 1 for layer in merges)] if len(schedule) > 1 else [0]
    layers = (end - start for start, end in pairwise([*starts, shape.vision_layers]))
    return shape.frame_tokens * sum(frames * length for frames, length in zip(schedule, layers, strict=True))
