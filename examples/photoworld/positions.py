"""Whether tokens that stay should keep their positions or be numbered anew: this model was trained with both.

    python -m earlytom_compile.photoworld.positions --pool cache --model runs/0/checkpoint

Videos of the pool's split ``validation``, every patch computed; those tokens stay that ``plus`` selects.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from earlytom_compile.kernels.select_representatives import select_representatives
from earlytom_compile.photoworld.answers import answer_logits
from earlytom_compile.photoworld.batches import whole_batch
from earlytom_compile.photoworld.model import VIDEO_TOKENS, Model, load
from earlytom_compile.photoworld.pool import TOKENS, Pool
from earlytom_compile.photoworld.questions import all_questions
from earlytom_compile.photoworld.story import story_of
from earlytom_compile.toyworld.batches import IGNORED
from earlytom_compile.toyworld.evaluate import interval

RATIOS = (0.25, 0.1, 0.05)


@torch.no_grad()
def answered(model: Model, pool: Pool, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Of each of the V videos, how many of all questions about it are answered right with kept positions and with new
    ones, int64 [V, 2], and how many there are, int64 [V]."""
    right, asked = [], []
    for number in range(len(pool.clips)):
        batch = whole_batch(pool, [number], [all_questions(story_of(pool.clips[number]))])
        tokens = model.model.multi_modal_projector(batch.features[0].float()).mean(-2)
        places = _selected(tokens, ratio)
        labels = batch.rows.labels[batch.rows.labels != IGNORED][::2]
        hits = [
            (answer_logits(model, [tokens[places]], batch.rows, at)[0][::2].argmax(-1) == labels).sum().item()
            for at in ([places], None)
        ]
        right.append(hits)
        asked.append(len(labels))
    return np.array(right), np.array(asked)


def _selected(tokens: torch.Tensor, ratio: float) -> torch.Tensor:
    """Which of the tokens, [1024, C], stay: their places, in order."""
    if ratio == 1:
        return torch.arange(VIDEO_TOKENS)
    frames = tokens.unflatten(0, (-1, TOKENS))
    _, kept = select_representatives(frames, torch.tensor([len(frames)]), round(ratio * VIDEO_TOKENS))
    return kept[0] @ torch.tensor([TOKENS, 1])


def main(given: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", required=True, type=Path, metavar="FOLDER", help="that photoworld.pool filled")
    parser.add_argument("--model", required=True, type=Path, metavar="FOLDER", help="a checkpoint of photoworld.train")
    parser.add_argument("--videos", type=int, help="how many (all that are in the pool)")
    arguments = parser.parse_args(given)
    model, pool = load(arguments.model), Pool(arguments.pool, "validation", arguments.videos)
    table = Table("kept", "positions kept", "numbered anew", title="right answers (95 % interval over videos)")
    for ratio in (1.0, *RATIOS):
        right, asked = answered(model, pool, ratio)
        table.add_row(f"{ratio:.0%}", *(_share(column, asked) for column in right.T))
    Console().print(table)


def _share(right: np.ndarray, asked: np.ndarray) -> str:
    low, high = interval(right[:, None], asked[:, None])
    return f"{right.sum() / asked.sum():.1%} ({100 * low:.1f}-{100 * high:.1f})"


if __name__ == "__main__":
    main()
