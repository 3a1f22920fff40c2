"""Which blocks to average tokens over: all shapes of them, with all frames and with fewer, on the split ``validation``.

    python -m earlytom_compile.toyworld.grids --videos 200

    fewer frames       frames  grid   tokens  right
    frame subsampling       4  4,2,2      16   79.4

For each number of frames and each number of tokens, the best of all shapes. ``pareto_rows.py`` has what was chosen by
this.
"""

import argparse
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import LlavaOnevisionForConditionalGeneration

from earlytom_compile.toyworld.answers import normalized
from earlytom_compile.toyworld.baselines import AVERAGING, POOLING, SUBSAMPLING, Baseline, baseline, pooled
from earlytom_compile.toyworld.evaluate import Questions, load_questions, right_answers
from earlytom_compile.toyworld.installed import Model
from earlytom_compile.toyworld.model import POOLED, WEIGHTS
from earlytom_compile.toyworld.world import FRAMES


class Tried(NamedTuple):
    """A baseline with so many frames and such blocks, and its share of right answers."""

    method: str
    frames: int
    grid: tuple[int, int, int]
    right: float

    @property
    def tokens(self) -> int:
        """That are left of a video."""
        return int(np.prod(self.grid))


def sources() -> Iterator[tuple[str, int]]:
    """All frames, and fewer of them in both ways."""
    yield POOLING, FRAMES
    yield from product((SUBSAMPLING, AVERAGING), range(1, FRAMES))


@torch.no_grad()
def tried(model: Model, questions: Questions, method: str, frames: int) -> list[Tried]:
    """Every shape of blocks behind so many frames."""
    whole: Baseline = baseline(method, model, frames=frames, grid=(frames, POOLED, POOLED))
    videos = [whole.tokens(normalized(video)).unflatten(0, (frames, -1)) for video in questions.frames]
    sides = range(1, POOLED + 1)
    found = []
    for grid in product(range(1, frames + 1), sides, sides):
        right, asked = right_answers(model, [pooled(tokens, grid) for tokens in videos], questions.asked)
        found.append(Tried(method, frames, grid, right.sum() / asked.sum()))
    return found


def best(found: Sequence[Tried]) -> list[Tried]:
    """The best for each number of tokens, if no smaller number does as well."""
    chosen: list[Tried] = []
    for one in sorted(found, key=lambda each: (each.tokens, -each.right)):
        if not chosen or one.right > chosen[-1].right:
            chosen.append(one)
    return chosen


def main() -> None:
    """Print what is best, for each way to so many frames."""
    parser = argparse.ArgumentParser(description="Blocks to average tokens over, on the split validation.")
    parser.add_argument("--model", type=Path, default=WEIGHTS, metavar="FOLDER", help="a trained checkpoint")
    parser.add_argument("--videos", type=int, default=200, metavar="N", help="%(default)s")
    arguments = parser.parse_args()
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(arguments.model).eval()
    questions = load_questions("validation", 0, arguments.videos)
    print(f"{'fewer frames':18} frames  grid   tokens  right")
    for method, frames in sources():
        for one in best(tried(model, questions, method, frames)):
            grid = ",".join(map(str, one.grid))
            print(f"{method:18} {frames:6}  {grid}  {one.tokens:6}  {100 * one.right:5.1f}", flush=True)


if __name__ == "__main__":
    main()
