"""Operations of a whole prefill, as they are counted by ``flops.count(protocol="exact")``: a multiply-add is two.

    of_report(shape, report(model).to_dict(), config)    # all before the language model, of a call with one video
    of_frames(shape, (8, 6, 6), (1, 6))                  # the same of frames that merge, without the choice of tokens
    of_prompt(shape, 27, 13, steps)                      # the language model's: 27 positions, 13 of them the video's

Numbers of frames, patches and tokens are those of a call. Counts are remembered, since thousands of questions share
few numbers.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from earlytom_compile.config import EarlyTomConfig, Variant
from earlytom_compile.flops import Reuse, count, reuse_of
from earlytom_compile.flops_inside import lengths_inside, operations_inside, rows_left
from earlytom_compile.methods.base import Step
from earlytom_compile.methods.registry import EARLYTOM
from earlytom_compile.shapes import ModelShape

NEWLINE = 1
"""Rows that LLaVA-OneVision puts behind a video."""
EMBEDDING = -1
"""A place where frames merge: behind the patch embedding, before layer 0."""


def of_report(shape: ModelShape, report: Mapping[str, Any], config: EarlyTomConfig) -> float:
    """Of the only video of the report's last call: vision encoder, operators of ours, projector."""
    (video,), (reuse,) = report["videos"], reuse_of(report)
    method = None if config.method == EARLYTOM else (config.method, video["tokens"][1])
    return _before(shape, tuple(video["frames"]), tuple(report["merge_layers"]), config.variant, method, reuse)


def of_frames(shape: ModelShape, schedule: Sequence[int], merge_layers: Sequence[int]) -> float:
    """Vision encoder, projector, and the similarities by which frames merge, if any do; ``schedule``: frames at first,
    and after each of the ``merge_layers``, of which EMBEDDING may be the first."""
    merging = sum(similarities(shape, frames) for frames in schedule[:-1])
    embedded = 0.0
    if EMBEDDING in merge_layers:
        embedded = 2.0 * shape.patch_embedding(schedule[0] - schedule[1])  # of those that no layer sees
        schedule, merge_layers = schedule[1:], merge_layers[1:]
    return _layers(shape, tuple(schedule), tuple(merge_layers)) + embedded + merging


@functools.cache
def _layers(shape: ModelShape, schedule: tuple[int, ...], merge_layers: tuple[int, ...]) -> float:
    counted = count(shape, protocol="exact", frames_schedule=schedule, llm_tokens=0, merge_layers=merge_layers)
    return counted.encoder + counted.projector


@functools.cache
def _before(
    shape: ModelShape,
    schedule: tuple[int, ...],
    merge_layers: tuple[int, ...],
    variant: Variant | None,
    method: tuple[str, int] | None,
    reuse: Reuse | None,
) -> float:
    """``method``: another than EarlyTom, and how many tokens it keeps."""
    name, kept = method or (EARLYTOM, None)
    counted = count(
        shape,
        protocol="exact",
        frames_schedule=schedule,
        llm_tokens=0,
        merge_layers=merge_layers,
        variant=variant,
        method=name,
        kept=kept,
        reuse=reuse,
    )
    return counted.encoder + counted.operators + counted.projector


def similarities(shape: ModelShape, frames: int) -> float:
    """Of every frame with every other."""
    return 2 * frames**2 * shape.frame_tokens * shape.vision_width


def importance(shape: ModelShape, frames: int) -> float:
    """Scores of one layer's attention, which nobody keeps."""
    return 2 * frames * shape.frame_tokens**2 * shape.vision_width


def representatives(shape: ModelShape, frames: int) -> float:
    """What ``plus`` selects by: every token beside every other of its block."""
    every = Reuse(frames * shape.frame_tokens)  # with reuse no frames merge: all that is counted is the selection
    return count(
        shape, protocol="exact", frames_schedule=(frames,), llm_tokens=0, variant="plus", reuse=every
    ).operators


@functools.cache
def of_prompt(shape: ModelShape, positions: int, video_tokens: int, steps: tuple[Step, ...] = ()) -> float:
    """Of the language model and the logits of the last position; ``video_tokens`` of the ``positions``, and the newline
    behind them, become fewer by ``steps``."""
    lengths = lengths_inside(positions, [video_tokens + NEWLINE], steps)
    counted = count(shape, protocol="exact", frames_schedule=(1,), llm_tokens=lengths)
    return counted.llm + counted.lm_head + operations_inside(shape, lengths, steps)


def mean_over_layers(video_tokens: int, steps: Sequence[Step], layers: int) -> float:
    """Video tokens that a layer of the language model sees, on average over its ``layers``; behind a step, the newline
    is one of those that stayed or it is gone."""
    left = [video_tokens] * layers
    for step in steps:
        left[step.layer :] = [rows_left(video_tokens + NEWLINE, step)] * (layers - step.layer)
    return sum(left) / layers
