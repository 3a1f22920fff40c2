"""Accuracy by method, ratio and category, with confidence intervals over videos.

    questions = load_questions("test", first=0, videos=1000)
    results = [evaluate(model, questions, Arm("earlytom paper", ratio)) for ratio in (0.25, 0.1)]
    results[0].accuracy(), results[0].interval(), results[0].work

An answer is right if it is the word that greedy ``generate`` says, of all words there are. For each video there
is at most one question of each category.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats

from earlytom_compile.errors import EarlyTomConfigError
from earlytom_compile.toyworld.answers import answer_logits, normalized
from earlytom_compile.toyworld.batches import IGNORED, rows_of
from earlytom_compile.toyworld.methods import (
    ALL_TOKENS,
    INSTALLED,
    METHODS,
    NO_TOKENS,
    REUSE,
    STAGE_1,
    Model,
    method,
    taken,
)
from earlytom_compile.toyworld.questions import CATEGORIES, Question, ask
from earlytom_compile.toyworld.world import HELD_OUT, Video, read_sampled, rng_of, sample_video, write_mp4

RATIOS = (0.25, 0.20, 0.15, 0.10)
FIXED = (ALL_TOKENS, NO_TOKENS, STAGE_1, REUSE)
"""Methods without a ratio."""
_AT_ONCE = 50
_ANY_RATIO = 0.1  # of methods without a ratio; it bounds how far frames may merge
_RIGHT, _WRONG, _NO = "1", "0", "-"
_CONFIDENCE = 0.95
_RESAMPLES = 2000


class Arm(NamedTuple):
    """What is compared: a method, its ratio (None where the video decides), and the options of
    :func:`earlytom_compile.compile` that this row alone has, as (name, value)."""

    method: str
    retain_ratio: float | None = None
    settings: tuple[tuple[str, Any], ...] = ()


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
    """``right`` and ``asked``: bool [V, 5], by video and category; ``tokens``: video tokens a video, ``work``: share of
    the work of the vision encoder's layers that was done for it, both on average."""

    arm: Arm
    tokens: float
    work: float
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
        return cls(arm_of(content), content["tokens"], content["work"], answers == _RIGHT, answers != _NO)

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
            "method": self.arm.method,
            "retain_ratio": self.arm.retain_ratio,
            "settings": dict(self.arm.settings),
            "tokens": self.tokens,
            "work": self.work,
            "accuracy": self.accuracy(),
            "interval": [low, high],
            "answers": self._answers(),
            "categories": {c: {"accuracy": self.accuracy(c), "interval": list(self.interval(c))} for c in CATEGORIES},
        }


def arm_of(content: Mapping[str, Any]) -> Arm:
    """The row that :meth:`Result.to_dict` made this dictionary of."""
    settings = ((name, tuple(x) if isinstance(x, list) else x) for name, x in content["settings"].items())
    return Arm(content["method"], content["retain_ratio"], tuple(settings))


def arms(
    ratios: tuple[float, ...] = RATIOS,
    beginnings: tuple[str, ...] | None = None,
    settings: Sequence[Mapping[str, Any]] = (),
) -> list[Arm]:
    """What is compared, all tokens first.

    ``beginnings``: beside all tokens only methods whose names begin so. ``settings``: options that each of those
    methods that take all of them is tried with once more. Raises :class:`EarlyTomConfigError` for a beginning that no
    name has, and for settings that no method takes.
    """
    every = [Arm(name) for name in FIXED] + [Arm(name, ratio) for name in METHODS for ratio in ratios]
    for beginning in beginnings or ():
        if not any(arm.method.startswith(beginning) for arm in every):
            names = ", ".join((*FIXED, *METHODS))
            raise EarlyTomConfigError(f"methods={beginning!r}: no method begins so; there are {names}.")
    chosen = [arm for arm in every if arm.method == ALL_TOKENS or arm.method.startswith(beginnings or "")]
    for options in settings:
        if not any(taken(arm.method, options) == options for arm in chosen):
            given = " ".join(f"{name}={value!r}" for name, value in options.items())
            names = ", ".join(dict.fromkeys(arm.method for arm in chosen))
            raise EarlyTomConfigError(f"settings {given}: none of these takes all of it: {names}.")
    return [row for arm in chosen for row in (arm, *_tried(arm, settings))]


def _tried(arm: Arm, settings: Sequence[Mapping[str, Any]]) -> list[Arm]:
    """The same once more with each of the ``settings`` that it takes."""
    return [arm._replace(settings=tuple(s.items())) for s in settings if taken(arm.method, s) == s]


def load_questions(
    split: str,
    first: int,
    videos: int,
    advance: Callable[[], None] = lambda: None,
    *,
    encoded: bool = False,
    noise: float = 0.0,
) -> Questions:
    """Videos ``first`` to ``first + videos - 1`` of ``split``, and one question of each category about each.

    ``encoded``: frames as they come out of an H.264 file. ``noise``: standard deviation of what is added to each pixel
    of each frame, in the model's units, in which black is -1 and white 1.
    """
    frames, asked, held_out = [], [], []
    for seed in range(first, first + videos):
        video = sample_video(split, seed)
        drawn = _through_mp4(video) if encoded else video.frames()
        frames.append(torch.from_numpy(_noisy(drawn, noise, rng_of(split, seed, stream=4)) if noise else drawn))
        asked.append(list(ask(video, rng_of(split, seed, stream=3)).values()))
        held_out.append(any(thing.pair in HELD_OUT for thing in video.things))
        advance()
    return Questions(torch.stack(frames), asked, np.array(held_out))


def _through_mp4(video: Video) -> np.ndarray:
    with tempfile.TemporaryDirectory(prefix="earlytom-eval-") as folder:
        write_mp4(video, Path(folder) / "video.mp4")
        return read_sampled(Path(folder) / "video.mp4")


def _noisy(frames: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    noisy = frames + 127.5 * noise * rng.standard_normal(frames.shape)
    return noisy.round().clip(0, 255).astype(np.uint8)


def options_of(arm: Arm, options: Mapping[str, Any]) -> dict[str, Any]:
    """All that its method is made with; of ``options`` those that it takes and its settings do not replace."""
    known = INSTALLED.get(arm.method, {})
    ratio = _ANY_RATIO if arm.retain_ratio is None else arm.retain_ratio
    return {"retain_ratio": ratio, **known, **taken(arm.method, {**options, **dict(arm.settings)})}


@torch.no_grad()
def evaluate(
    model: Model,
    questions: Questions,
    arm: Arm,
    options: Mapping[str, Any] | None = None,
    advance: Callable[[int], None] = lambda videos: None,
) -> Result:
    """Ask everything, with the tokens that the method of ``arm`` leaves of each video; of ``options`` it gets those
    that it takes and ``arm`` does not set."""
    compress = method(arm.method, model, **options_of(arm, options or {}))
    device = next(model.parameters()).device
    right, asked = (np.zeros((len(questions.asked), len(CATEGORIES)), bool) for _ in range(2))
    tokens, work = 0, 0.0
    for first in range(0, len(questions.asked), _AT_ONCE):
        chunk = questions.asked[first : first + _AT_ONCE]
        left = [compress(normalized(f.to(device))) for f in questions.frames[first : first + _AT_ONCE]]
        videos = [compressed.tokens for compressed in left]
        tokens += sum(map(len, videos))
        work += sum(compressed.work for compressed in left)
        rows = rows_of(chunk).to(device)
        logits, labels = answer_logits(model, videos, rows)
        hits = (logits.argmax(-1) == labels)[::2].tolist()  # every other label is the end of an answer
        row, _ = (rows.labels != IGNORED).nonzero(as_tuple=True)
        category = rows.category[rows.labels != IGNORED]
        for video, which, hit in zip(row[::2].tolist(), category[::2].tolist(), hits, strict=True):
            asked[first + video, which] = True
            right[first + video, which] = hit
        advance(len(chunk))
    return Result(arm, tokens / len(questions.asked), work / len(questions.asked), right, asked)
