"""Accuracy by method, ratio and category, with confidence intervals over videos.

    questions = load_questions("test", first=0, videos=1000)
    results = [evaluate(model, questions, "earlytom paper", ratio) for ratio in (0.25, 0.1)]
    results[0].accuracy(), results[0].interval()

An answer is right if it is the word that greedy ``generate`` says, of all words there are. For each video there
is at most one question of each category.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy import stats

from earlytom_compile.errors import EarlyTomConfigError
from earlytom_compile.toyworld.answers import answer_logits, normalized
from earlytom_compile.toyworld.batches import IGNORED, rows_of
from earlytom_compile.toyworld.methods import ALL_TOKENS, METHODS, NO_TOKENS, STAGE_1, Model, method
from earlytom_compile.toyworld.questions import CATEGORIES, Question, ask
from earlytom_compile.toyworld.world import HELD_OUT, rng_of, sample_video

RATIOS = (0.25, 0.20, 0.15, 0.10)
FIXED = (ALL_TOKENS, NO_TOKENS, STAGE_1)
"""Methods without a ratio."""
_AT_ONCE = 50
_RIGHT, _WRONG, _NO = "1", "0", "-"
_CONFIDENCE = 0.95
_RESAMPLES = 2000


@dataclass(frozen=True)
class Questions:
    """Videos as the model sees them, uint8 [V, 8, 96, 96, 3], what is asked about each, and which of them, bool [V],
    show a pair of colour and shape that no training video does."""

    frames: torch.Tensor
    asked: list[list[Question]]
    held_out: np.ndarray

    def first(self, videos: int) -> "Questions":
        """The same for so many videos."""
        return Questions(self.frames[:videos], self.asked[:videos], self.held_out[:videos])

    @property
    def chance(self) -> dict[str, float]:
        """Share of right answers by guessing among the choices, by category; NaN where nothing is asked."""
        every = [question for questions in self.asked for question in questions]
        return {c: float(np.mean([q.chance for q in every if q.category == c] or [np.nan])) for c in CATEGORIES}

    @property
    def overall_chance(self) -> float:
        """The same over all questions."""
        return float(np.mean([question.chance for questions in self.asked for question in questions]))


@dataclass(frozen=True)
class Result:
    """``right`` and ``asked``: bool [V, 5], by video and category; ``tokens``: video tokens a video, on average."""

    method: str
    retain_ratio: float | None
    tokens: float
    right: np.ndarray
    asked: np.ndarray

    def accuracy(self, category: str | None = None) -> float:
        """Share of right answers; overall, every question counts once. NaN where nothing was asked."""
        right, asked = self._columns(category)
        return float(right.sum() / asked.sum()) if asked.any() else float("nan")

    def interval(self, category: str | None = None) -> tuple[float, float]:
        """95 % confidence interval: percentiles of a bootstrap over videos, whose questions belong together.

        NaN for fewer than two videos."""
        right, asked = self._columns(category)
        there = asked.any(1)
        if there.sum() < 2:
            return float("nan"), float("nan")
        found = stats.bootstrap(
            (right[there].sum(1), asked[there].sum(1)),
            lambda r, a, axis=-1: r.sum(axis) / a.sum(axis),
            paired=True,
            vectorized=True,
            n_resamples=_RESAMPLES,
            confidence_level=_CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
        return float(found.low), float(found.high)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Result":
        """The result that :meth:`to_dict` made a dictionary of."""
        answers = np.array([list(video) for video in content["answers"].split()])
        return cls(content["method"], content["retain_ratio"], content["tokens"], answers == _RIGHT, answers != _NO)

    def of(self, videos: np.ndarray) -> "Result":
        """The same for some of the videos, bool [V]."""
        return replace(self, right=self.right[videos], asked=self.asked[videos])

    def _answers(self) -> str:
        letters = np.where(self.asked, np.where(self.right, _RIGHT, _WRONG), _NO)
        return " ".join("".join(video) for video in letters)

    def _columns(self, category: str | None) -> tuple[np.ndarray, np.ndarray]:
        chosen = slice(None) if category is None else [CATEGORIES.index(category)]
        return self.right[:, chosen], self.asked[:, chosen]

    def to_dict(self) -> dict[str, Any]:
        """Everything above, for JSON; ``answers`` has a word for each video and a letter for each category: 1 right,
        0 wrong, - not asked."""
        low, high = self.interval()
        return {
            "method": self.method,
            "retain_ratio": self.retain_ratio,
            "tokens": self.tokens,
            "accuracy": self.accuracy(),
            "interval": [low, high],
            "answers": self._answers(),
            "categories": {c: {"accuracy": self.accuracy(c), "interval": list(self.interval(c))} for c in CATEGORIES},
        }


def arms(
    ratios: tuple[float, ...] = RATIOS, beginnings: tuple[str, ...] | None = None
) -> list[tuple[str, float | None]]:
    """What is compared: (method, ratio), without a ratio where the video decides.

    ``beginnings``: beside all tokens only methods whose names begin so; raises :class:`EarlyTomConfigError` for one
    that no name has.
    """
    fixed: list[tuple[str, float | None]] = [(name, None) for name in FIXED]
    every = fixed + [(name, ratio) for name in METHODS for ratio in ratios]
    if beginnings is None:
        return every
    for beginning in beginnings:
        if not any(name.startswith(beginning) for name, _ in every):
            names = ", ".join((*FIXED, *METHODS))
            raise EarlyTomConfigError(f"methods={beginning!r}: no method begins so; there are {names}.")
    return [(name, ratio) for name, ratio in every if name == ALL_TOKENS or name.startswith(beginnings)]


def load_questions(split: str, first: int, videos: int, advance: Callable[[], None] = lambda: None) -> Questions:
    """Videos ``first`` to ``first + videos - 1`` of ``split``, and one question of each category about each."""
    frames, asked, held_out = [], [], []
    for seed in range(first, first + videos):
        video = sample_video(split, seed)
        frames.append(torch.from_numpy(video.frames()))
        asked.append(list(ask(video, rng_of(split, seed, stream=3)).values()))
        held_out.append(any(thing.pair in HELD_OUT for thing in video.things))
        advance()
    return Questions(torch.stack(frames), asked, np.array(held_out))


@torch.no_grad()
def evaluate(
    model: Model,
    questions: Questions,
    name: str,
    retain_ratio: float | None,
    options: dict[str, Any] | None = None,
    advance: Callable[[int], None] = lambda videos: None,
) -> Result:
    """Ask everything, with the tokens that ``name`` leaves of each video."""
    compress = method(name, model, 0.1 if retain_ratio is None else retain_ratio, **(options or {}))
    device = next(model.parameters()).device
    right, asked = (np.zeros((len(questions.asked), len(CATEGORIES)), bool) for _ in range(2))
    tokens = 0
    for first in range(0, len(questions.asked), _AT_ONCE):
        chunk = questions.asked[first : first + _AT_ONCE]
        videos = [compress(normalized(f.to(device))) for f in questions.frames[first : first + _AT_ONCE]]
        tokens += sum(map(len, videos))
        rows = rows_of(chunk).to(device)
        logits, labels = answer_logits(model, videos, rows)
        hits = (logits.argmax(-1) == labels)[::2].tolist()  # every other label is the end of an answer
        row, _ = (rows.labels != IGNORED).nonzero(as_tuple=True)
        category = rows.category[rows.labels != IGNORED]
        for video, which, hit in zip(row[::2].tolist(), category[::2].tolist(), hits, strict=True):
            asked[first + video, which] = True
            right[first + video, which] = hit
        advance(len(chunk))
    return Result(name, retain_ratio, tokens / len(questions.asked), right, asked)
