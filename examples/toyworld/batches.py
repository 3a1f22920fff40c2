"""Training batches: frames with a label for each patch, and videos with many questions in one row.

    patch_batch(seeds)                      # to pretrain the vision encoder and the projector
    question_batch(seeds, weights, count)   # to train the language model, and to check it

A row of questions is one sequence, ``user <video> | question answer | question answer | ...``, in which each
question sees the video and itself and has the positions it would have if it were alone. Frames that occur
several times are encoded once.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from earlytom_compile.toyworld.language import SPECIAL_TOKENS, WORDS, prompt
from earlytom_compile.toyworld.model import GRID, POOLED
from earlytom_compile.toyworld.questions import TRAINING_CATEGORIES, Question, all_questions, draw
from earlytom_compile.toyworld.world import COLORS, FRAMES, SHAPES, SIZE, Video, mask_of, rng_of, sample_video

IDS = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *WORDS))}
BEFORE, AFTER = (text.split() for text in prompt("|").split("<video> | "))
"""Words before the video, and behind the question."""
END = IDS["<|im_end|>"]
IGNORED = -100
"""Label of a position without one, as in torch.nn.functional.cross_entropy."""
_FILLS = (0, 0, -1, IGNORED, 0)  # behind the end of a row, in the order of Rows
_LEAST_PIXELS = 17  # of a thing, more than which make it a cell's label
_NOTHING = 0


@dataclass(frozen=True)
class Batch:
    """A record of tensors."""

    def to(self, device: torch.device) -> Any:
        """The same record there."""
        return type(self)(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


@dataclass(frozen=True)
class Cells(Batch):
    """What is seen in each cell of a square grid, row by row: ``color``, ``shape`` int64 [F, cells], 0 where there is
    nothing; ``flashes`` int64 [F, cells], 1 where that is a flash; ``offset`` float32 [F, cells, 2]: from the middle of
    the cell to that of its thing (x, y), in cells."""

    color: torch.Tensor
    shape: torch.Tensor
    flashes: torch.Tensor
    offset: torch.Tensor


@dataclass(frozen=True)
class PatchBatch(Batch):
    """``frames`` uint8 [F, 96, 96, 3], and what is in their ``patches`` and in the squares of the video ``tokens``."""

    frames: torch.Tensor
    patches: Cells
    tokens: Cells


@dataclass(frozen=True)
class Rows(Batch):
    """Questions, int64 [V, L] each, rows padded on the right: ``ids``; ``position`` from the end of the video on;
    ``question`` numbers the questions of a row, -1 for padding; ``labels`` of the answers' words and ends, IGNORED
    elsewhere; ``category`` by its place in TRAINING_CATEGORIES."""

    ids: torch.Tensor
    position: torch.Tensor
    question: torch.Tensor
    labels: torch.Tensor
    category: torch.Tensor


@dataclass(frozen=True)
class QuestionBatch(Batch):
    """``frames`` uint8 [U, 96, 96, 3] are the distinct ones; ``index`` int64 [V, 8] says which a video shows when."""

    frames: torch.Tensor
    index: torch.Tensor
    rows: Rows


def patch_batch(seeds: Iterable[int], split: str = "train", frames_of_each: int = 2) -> PatchBatch:
    """A few frames of each of these videos, labelled."""
    frames, patches, tokens = [], [], []
    for seed in seeds:
        video = sample_video(split, seed)
        for time in rng_of(split, seed, stream=1).choice(FRAMES, frames_of_each, replace=False):
            frames.append(video.draw(int(time)))
            patches.append(cells(video, int(time), GRID))
            tokens.append(cells(video, int(time), POOLED))
    return PatchBatch(torch.from_numpy(np.stack(frames)), _stacked(patches), _stacked(tokens))


def cells(video: Video, time: int, grid: int) -> tuple[np.ndarray, ...]:
    """A row of :class:`Cells`: of the thing that covers most of each cell."""
    color, shape, flashes = (np.full((grid, grid), _NOTHING) for _ in range(3))
    offset = np.zeros((grid, grid, 2), np.float32)
    most = np.full((grid, grid), _LEAST_PIXELS)
    side = SIZE // grid
    middle = (np.arange(grid) + 0.5) * side
    scene = video.scene_at(time)
    for thing, (x, y) in scene.visible(time):
        cover = mask_of(thing, (x, y)).reshape(grid, side, grid, side).sum((1, 3))
        here = cover > most
        most[here] = cover[here]
        color[here] = 1 + list(COLORS).index(thing.color)
        shape[here] = 1 + SHAPES.index(thing.shape)
        flashes[here] = thing is scene.flash
        away = np.stack(np.broadcast_arrays((x - middle)[None, :], (y - middle)[:, None]), -1) / side
        offset[here] = away[here]
    return color.reshape(-1), shape.reshape(-1), flashes.reshape(-1), offset.reshape(-1, 2)


def _stacked(labels: Sequence[tuple[np.ndarray, ...]]) -> Cells:
    return Cells(*(torch.from_numpy(np.stack(column)) for column in zip(*labels, strict=True)))


def question_batch(
    seeds: Iterable[int], weights: Mapping[str, float], count: int, split: str = "train"
) -> QuestionBatch:
    """``count`` questions about each of these videos, or all where it has fewer; ``weights`` by category."""
    frames: list[np.ndarray] = []
    index, asked = [], []
    for seed in seeds:
        video = sample_video(split, seed)
        known: dict[bytes, int] = {}
        where = []
        for frame in video.frames():
            if (key := frame.tobytes()) not in known:
                known[key] = len(frames)
                frames.append(frame)
            where.append(known[key])
        index.append(where)
        asked.append(pick(all_questions(video), weights, count, rng_of(split, seed, stream=2)))
    return QuestionBatch(torch.from_numpy(np.stack(frames)), torch.tensor(index), rows_of(asked))


def rows_of(asked: Sequence[Sequence[Question]]) -> Rows:
    """A row for each of these lists of questions."""
    rows = [_row(questions) for questions in asked]
    return Rows(*(_padded(column, fill) for column, fill in zip(zip(*rows, strict=True), _FILLS, strict=True)))


def pick(
    questions: list[Question], weights: Mapping[str, float], count: int, rng: np.random.Generator
) -> list[Question]:
    """Draws a category, then a question of it, without putting back."""
    left = {c: [q for q in questions if q.category == c] for c in weights if weights[c] > 0}
    picked: list[Question] = []
    while len(picked) < count and (categories := [c for c in left if left[c]]):
        chances = np.array([weights[c] for c in categories])
        category = categories[rng.choice(len(categories), p=chances / chances.sum())]
        picked.append(draw(left[category], rng))
        left[category].remove(picked[-1])
    return picked


def _row(questions: Sequence[Question]) -> list[np.ndarray]:
    """ids, position, question, labels and category of a row."""
    columns: list[list[int]] = [[] for _ in range(5)]
    for number, question in enumerate(questions):
        ids = [IDS[word] for word in (*question.text.split(), *AFTER, question.answer)]
        labels = [IGNORED] * (len(ids) - 2) + [ids[-1], END]
        category = [TRAINING_CATEGORIES.index(question.category)] * len(ids)
        parts = (ids, range(len(ids)), [number] * len(ids), labels, category)
        for column, values in zip(columns, parts, strict=True):
            column.extend(values)
    return [np.array(column, np.int64) for column in columns]


def _padded(rows: tuple[np.ndarray, ...], fill: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.from_numpy(np.stack([np.pad(row, (0, longest - len(row)), constant_values=fill) for row in rows]))
