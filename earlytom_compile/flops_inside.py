"""What steps inside the language model leave of a prompt, and what they cost themselves (protocol ``exact``).

    lengths = lengths_inside(141, [129], (Step(3, 0.5, "mean"),))      # {0: 141, 3: 76}
    count(shape, ..., llm_tokens=lengths).total + operations_inside(shape, lengths, steps)

A video's rows are its tokens and the newline that some models put behind them, which is one of them here.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from .methods.base import Step
from .shapes import ModelShape


def rows_left(rows: int, step: Step) -> int:
    """Of a video that entered the language model with so many."""
    return max(1, round(rows * step.keep_ratio))


def lengths_inside(positions: int, videos: Sequence[int], steps: Sequence[Step]) -> dict[int, int]:
    """Length of a prompt from each 0-based layer on, as ``llm_tokens`` of :func:`flops.count`; ``videos``: rows of each
    of its videos."""
    words = positions - sum(videos)
    left = {step.layer: words + sum(rows_left(rows, step) for rows in videos) for step in steps}
    return {0: positions, **left}


def layer_lengths(lengths: Mapping[int, int], layers: int) -> list[int]:
    """Of each of so many layers, from the lengths from each layer on."""
    return [lengths[max(first for first in lengths if first <= layer)] for layer in range(layers)]


def operations_inside(shape: ModelShape, lengths: Mapping[int, int], steps: Sequence[Step]) -> float:
    """Products of the steps' own operators for one prompt: scores of the attention that ranks its positions, which
    nobody keeps; similarities of every position with those that stay, and the sums by which others join them."""
    return sum(
        _of_step(shape, step, before, after)
        for step, (before, after) in zip(steps, pairwise(lengths.values()), strict=True)
    )


def _of_step(shape: ModelShape, step: Step, before: int, after: int) -> float:
    asking = before if step.scores == "all" else 1
    scores = 2 * asking * before * shape.llm_width
    return scores if step.merge == "drop" else scores + 4 * before * after * shape.llm_width
