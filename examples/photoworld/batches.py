"""Training batches out of a pool of encoded clips: tokens with labels, and videos with many questions in one row.

token_batch(pool, rng, frames)                       # to pretrain the projector
question_batch(pool, rng, videos, weights, kept)     # to train the language model

Of a video only the tokens that are kept are read and projected, so that a step costs what it keeps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from earlytom_compile.photoworld.answers import rows_of
from earlytom_compile.photoworld.clips import compose
from earlytom_compile.photoworld.pool import Pool
from earlytom_compile.photoworld.questions import all_questions
from earlytom_compile.toyworld.batches import Batch, Cells, Rows, pick
from earlytom_compile.toyworld.questions import Question


@dataclass(frozen=True)
class TokenBatch(Batch):
    """``features`` float16 [F, 64, 4, D] of the four patches of each token, and what the tokens show."""

    features: torch.Tensor
    tokens: Cells

    def to(self, device: torch.device) -> "TokenBatch":
        """The same there."""
        return TokenBatch(self.features.to(device), self.tokens.to(device))


@dataclass(frozen=True)
class QuestionBatch(Batch):
    """``features`` float16 [V, K, 4, D] of the tokens that are kept of each video, their ``places`` int64 [V, K] among
    all of its tokens, and the questions about it."""

    features: torch.Tensor
    places: torch.Tensor
    rows: Rows

    def to(self, device: torch.device) -> "QuestionBatch":
        """The same there."""
        return QuestionBatch(self.features.to(device), self.places.to(device), self.rows.to(device))


@dataclass(frozen=True)
class Kept:
    """``count`` tokens of each video; one that shows a thing is ``favour`` times as likely to stay as another."""

    count: int
    favour: float = 1.0


def token_batch(pool: Pool, rng: np.random.Generator, frames: int) -> TokenBatch:
    """So many frames of the pool."""
    chosen = rng.integers(pool.first[-1], size=frames)
    features = torch.from_numpy(np.stack([pool.features(int(frame), slice(None)) for frame in chosen]))
    return TokenBatch(features, pool.cells(chosen))


def question_batch(
    pool: Pool, rng: np.random.Generator, videos: int, weights: Mapping[str, float], kept: Kept, questions: int
) -> QuestionBatch:
    """``questions`` about each of so many new videos, or all where it has fewer; ``weights`` by category."""
    features, places, asked = [], [], []
    for _ in range(videos):
        story, shown = compose(rng, pool.clips)
        frames = np.array([pool.first[clip] + frame for clip, frame in shown])
        place = kept_places(rng, pool.labels["color"][frames].reshape(-1) > 0, kept)
        features.append(pool.tokens(frames, place))
        places.append(torch.from_numpy(place))
        asked.append(pick(all_questions(story), weights, questions, rng))
    return QuestionBatch(torch.from_numpy(np.stack(features)), torch.stack(places), rows_of(asked))


def kept_places(rng: np.random.Generator, shows: np.ndarray, kept: Kept) -> np.ndarray:
    """Places of the tokens that stay, in their order; ``shows``, bool [T]: which of them show a thing."""
    # The largest of these are a draw without putting back (Gumbel).
    keys = np.where(shows, np.log(kept.favour), 0.0) + rng.gumbel(size=len(shows))
    return np.sort(np.argpartition(-keys, kept.count - 1)[: kept.count])


def whole_batch(pool: Pool, numbers: Sequence[int], asked: Sequence[Sequence[Question]]) -> QuestionBatch:
    """Videos of the pool with all their tokens, and questions about them."""
    features = [pool.tokens(np.arange(pool.first[n], pool.first[n + 1]), None) for n in numbers]
    places = torch.arange(len(features[0])).expand(len(features), -1)
    return QuestionBatch(torch.from_numpy(np.stack(features)), places, rows_of(asked))
