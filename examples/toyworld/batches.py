"""Training batches: frames with a label for each patch, and videos with many questions in one row.

    patch_batch(seeds)                      # to pretrain the vision encoder
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

from .language import SPECIAL_TOKENS, WORDS, prompt
from .model import GRID, SHAPE
from .questions import TRAINING_CATEGORIES, Question, all_questions, draw
from .world import COLORS, FRAMES, SHAPES, Video, mask_of, rng_of, sample_video

IDS = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *WORDS))}
BEFORE, AFTER = (text.split() for text in prompt("|").split("<video> | "))
"""Words before the video, and behind the question."""
END = IDS["<|im_end|>"]
IGNORED = -100
"""Label of a position without one, as in torch.nn.functional.cross_entropy."""
_FILLS = (0, 0, -1, IGNORED, 0)  # behind the end of a row, in the order of Rows
_LEAST_COVER = 0.12  # share of a patch that a thing must cover to be its label
_NOTHING = 0


@dataclass(frozen=True)
class Batch:
    """A record of tensors."""

    def to(self, device: torch.device) -> Any:
        """The same record there."""
        return type(self)(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


@dataclass(frozen=True)
class PatchBatch(Batch):
    """``frames`` uint8 [F, 96, 96, 3]; ``color``, ``shape`` int64 [F, 64], 0 where there is nothing; ``offset``
    float32 [F, 64, 2]: from the middle of the patch to that of its thing (x, y), in patches."""

    frames: torch.Tensor
    color: torch.Tensor
    shape: torch.Tensor
    offset: torch.Tensor


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
    frames, labels = [], []
    for seed in seeds:
        video = sample_video(split, seed)
        for time in rng_of(split, seed, stream=1).choice(FRAMES, frames_of_each, replace=False):
            frames.append(video.draw(int(time)))
            labels.append(patch_labels(video, int(time)))
    color, shape, offset = (torch.from_numpy(np.stack(column)) for column in zip(*labels, strict=True))
    return PatchBatch(torch.from_numpy(np.stack(frames)), color, shape, offset)


def patch_labels(video: Video, time: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Colour and shape int64 [64], offset float32 [64, 2] of the thing that covers most of each patch."""
    color, shape = (np.full((GRID, GRID), _NOTHING) for _ in range(2))
    offset = np.zeros((GRID, GRID, 2), np.float32)
    most = np.full((GRID, GRID), _LEAST_COVER)
    middle = (np.arange(GRID) + 0.5) * SHAPE.patch
    for thing, (x, y) in video.scene_at(time).visible(time):
        cover = mask_of(thing, (x, y)).reshape(GRID, SHAPE.patch, GRID, SHAPE.patch).mean((1, 3))
        here = cover > most
        most[here] = cover[here]
        color[here] = 1 + list(COLORS).index(thing.color)
        shape[here] = 1 + SHAPES.index(thing.shape)
        away = np.stack(np.broadcast_arrays((x - middle)[None, :], (y - middle)[:, None]), -1) / SHAPE.patch
        offset[here] = away[here]
    return color.reshape(-1), shape.reshape(-1), offset.reshape(-1, 2)


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
        asked.append(_pick(all_questions(video), weights, count, rng_of(split, seed, stream=2)))
    return QuestionBatch(torch.from_numpy(np.stack(frames)), torch.tensor(index), rows_of(asked))


def rows_of(asked: Sequence[Sequence[Question]]) -> Rows:
    """A row for each of these lists of questions."""
    rows = [_row(questions) for questions in asked]
    return Rows(*(_padded(column, fill) for column, fill in zip(zip(*rows, strict=True), _FILLS, strict=True)))


def _pick(
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
