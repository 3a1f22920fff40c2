"""Accuracy by method, ratio and category, with confidence intervals over videos.

    questions = load_questions("test", first=0, videos=1000)
    results = [evaluate(model, questions, Arm("earlytom paper", ratio)) for ratio in (0.25, 0.1)]
    results[0].accuracy(), results[0].interval(), results[0].flops

An answer is right if it is the word that greedy ``generate`` says, of all words there are. For each video there
is at most one question of each category.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats

from earlytom_compile.errors import EarlyTomConfigError
from earlytom_compile.methods.base import Step
from earlytom_compile.shapes import ModelShape
from earlytom_compile.toyworld import cost
from earlytom_compile.toyworld.answers import generated, normalized, prompt_length
from earlytom_compile.toyworld.installed import (
    REUSE,
    Compress,
    Compressed,
    Installed,
    Model,
    other_methods,
    own_options,
)
from earlytom_compile.toyworld.methods import ALL_TOKENS, METHODS, NO_TOKENS, STAGE_1, UNCONFIGURED, method, taken
from earlytom_compile.toyworld.questions import Question
from earlytom_compile.toyworld.world import rng_of
from earlytom_compile.toyworld.worlds import TOY, World

RATIOS = (0.25, 0.20, 0.15, 0.10)
FIXED = (ALL_TOKENS, NO_TOKENS, STAGE_1, REUSE)
"""Methods without a ratio."""
EVERY = "all"
"""In the place of a method's beginning: those that are compared anyhow, and other papers' methods."""
_AT_ONCE = 50
_TOKENS_AT_ONCE = 6400  # what 50 videos of the toy world come to; a mask needs the square of a row
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
    """Videos as the model sees them, uint8 [V, F, H, W, 3], what is asked about each, and which of them, bool [V],
    show a pair of colour and shape that no training video does."""

    frames: torch.Tensor
    asked: list[list[Question]]
    held_out: np.ndarray
    world: World = TOY

    def first(self, videos: int) -> "Questions":
        """The same for so many videos."""
        return replace(self, frames=self.frames[:videos], asked=self.asked[:videos], held_out=self.held_out[:videos])

    @property
    def chance(self) -> dict[str, float]:
        """Share of right answers by guessing among the choices, by category; NaN where nothing is asked."""
        every = [question for questions in self.asked for question in questions]
        return {
            category: float(np.mean([q.chance for q in every if q.category == category] or [np.nan]))
            for category in self.world.categories
        }

    @property
    def overall_chance(self) -> float:
        """The same over all questions."""
        return float(np.mean([question.chance for questions in self.asked for question in questions]))


class Cost(NamedTuple):
    """What a row costs on average: ``tokens`` of a video that enter the language model, and how many of them a layer of
    it sees (``layer_tokens``); ``work``: share of the work of the vision encoder's layers that is done for a video;
    ``flops``: operations of a whole prefill, exactly (``cost.py``)."""

    tokens: float
    layer_tokens: float
    work: float
    flops: float


@dataclass(frozen=True)
class Result:
    """``right`` and ``asked``: bool [V, C], by video and category, or how often, where several models were asked
    (``seeds.py``); ``ttft``: seconds to the first token of the first question about each of the first videos, as far as
    they were timed; ``categories``: names of the C columns."""

    arm: Arm
    cost: Cost
    right: np.ndarray
    asked: np.ndarray
    ttft: tuple[float, ...] = ()
    categories: tuple[str, ...] = TOY.categories

    def accuracy(self, category: str | None = None) -> float:
        """Share of right answers; overall, every question counts once. NaN where nothing was asked."""
        right, asked = self._columns(category)
        return float(right.sum() / asked.sum()) if asked.any() else float("nan")

    def interval(self, category: str | None = None) -> tuple[float, float]:
        """95 % confidence interval: percentiles of a bootstrap over videos, whose questions belong together.

        NaN for fewer than two videos."""
        right, asked = self._columns(category)
        return interval(right, asked)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Result":
        """The result that :meth:`to_dict` made a dictionary of."""
        answers = np.array([list(video) for video in content["answers"].split()])
        means = Cost(*(content[name] for name in Cost._fields))
        categories = tuple(content["categories"])
        return cls(arm_of(content), means, answers == _RIGHT, answers != _NO, tuple(content["ttft"]), categories)

    def of(self, videos: np.ndarray) -> "Result":
        """The same for some of the videos, bool [V]."""
        return replace(self, right=self.right[videos], asked=self.asked[videos])

    @functools.cached_property  # a table is written after each of its rows
    def _answers(self) -> str:
        letters = np.where(self.asked, np.where(self.right, _RIGHT, _WRONG), _NO)
        return " ".join("".join(video) for video in letters)

    def _columns(self, category: str | None) -> tuple[np.ndarray, np.ndarray]:
        chosen = slice(None) if category is None else [self.categories.index(category)]
        return self.right[:, chosen], self.asked[:, chosen]

    def to_dict(self) -> dict[str, Any]:
        """Everything above, for JSON; ``answers`` has a word for each video and a letter for each category: 1 right,
        0 wrong, - not asked."""
        return {**self.summary(), "ttft": list(self.ttft), "answers": self._answers}

    def summary(self) -> dict[str, Any]:
        """The same without what there is of each video."""
        low, high = self.interval()
        return {
            "method": self.arm.method,
            "retain_ratio": self.arm.retain_ratio,
            "settings": dict(self.arm.settings),
            **self.cost._asdict(),
            "accuracy": self.accuracy(),
            "interval": [low, high],
            "categories": {
                category: {"accuracy": self.accuracy(category), "interval": list(self.interval(category))}
                for category in self.categories
            },
        }


def interval(right: np.ndarray, asked: np.ndarray) -> tuple[float, float]:
    """95 % confidence interval of the sum of ``right`` as a share of that of ``asked``, [V, ...] each: percentiles of a
    bootstrap over the V videos in which something was asked. NaN for fewer than two of them."""
    parts = [each.sum(tuple(range(1, each.ndim)), dtype=np.float64) for each in (right, asked)]
    there = parts[1] > 0
    return _interval(parts[0][there].tobytes(), parts[1][there].tobytes())


@functools.lru_cache(maxsize=1 << 14)
def _interval(right: bytes, asked: bytes) -> tuple[float, float]:
    """Of float64 [V] each; a table is written after each of its rows, and a row's interval stays what it is."""
    counts = np.frombuffer(right), np.frombuffer(asked)
    if len(counts[0]) < 2:
        return float("nan"), float("nan")
    found = stats.bootstrap(
        counts,
        lambda r, a, axis=-1: r.sum(axis) / a.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=_RESAMPLES,
        confidence_level=_CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def arm_of(content: Mapping[str, Any]) -> Arm:
    """The row that :meth:`Result.to_dict` made this dictionary of."""
    settings = ((name, tuple(x) if isinstance(x, list) else x) for name, x in content["settings"].items())
    return Arm(content["method"], content["retain_ratio"], tuple(settings))


def arms(
    ratios: tuple[float, ...] = RATIOS,
    beginnings: tuple[str, ...] | None = None,
    settings: Sequence[Mapping[str, Any]] = (),
    world: World = TOY,
) -> list[Arm]:
    """What is compared, all tokens first.

    ``beginnings``: beside all tokens only methods whose names begin so; a whole name is the beginning of that method
    and its forms alone (``fastv`` not of ``fastvid``), and ``"all"`` that of every one; None: all but other papers'.
    ``settings``: options that each of those methods that take all of them is tried with once more. Raises
    :class:`EarlyTomConfigError` for a beginning that no name has, and for settings that no method takes. Methods that
    the ``world`` says are unreadable are none of them.
    """
    names = METHODS if beginnings is None else (*METHODS, *other_methods())
    names = tuple(name for name in names if name not in world.unreadable)
    every = [Arm(name) for name in FIXED] + [Arm(name, ratio) for name in names for ratio in ratios]
    return chosen(every, beginnings, settings)


def chosen(
    every: Sequence[Arm], beginnings: tuple[str, ...] | None, settings: Sequence[Mapping[str, Any]] = ()
) -> list[Arm]:
    """Those of ``every`` row that :func:`arms` would choose, and raises as it does."""
    known = tuple(dict.fromkeys(arm.method for arm in every))
    for beginning in beginnings or ():
        if beginning != EVERY and not any(_begins(name, beginning, known) for name in known):
            raise EarlyTomConfigError(
                f"methods={beginning!r}: no method begins so; there are {', '.join(known)}, and {EVERY}."
            )
    if beginnings is None or EVERY in beginnings:
        beginnings = ("",)
    found = [
        arm
        for arm in every
        if arm.method == ALL_TOKENS or any(_begins(arm.method, beginning, known) for beginning in beginnings)
    ]
    for options in settings:
        if not any(taken(arm.method, options) == options for arm in found):
            given = " ".join(f"{name}={value!r}" for name, value in options.items())
            these = ", ".join(dict.fromkeys(arm.method for arm in found))
            raise EarlyTomConfigError(f"settings {given}: none of these takes all of it: {these}.")
    return [row for arm in found for row in (arm, *_tried(arm, settings))]


def _begins(name: str, beginning: str, known: Sequence[str]) -> bool:
    """Whether ``name`` begins so; behind a whole name of those that are ``known`` only what tells its forms apart."""
    if beginning in known:
        return name == beginning or name.startswith(f"{beginning},")
    return name.startswith(beginning)


def _tried(arm: Arm, settings: Sequence[Mapping[str, Any]]) -> list[Arm]:
    """The same once more with each of the ``settings`` that it takes, unless it has some of its own."""
    if arm.settings:
        return []
    return [arm._replace(settings=tuple(s.items())) for s in settings if taken(arm.method, s) == s]


def load_questions(
    split: str,
    first: int,
    videos: int,
    advance: Callable[[], None] = lambda: None,
    *,
    encoded: bool = False,
    noise: float = 0.0,
    world: World = TOY,
) -> Questions:
    """Videos ``first`` to ``first + videos - 1`` of ``split``, and one question of each category about each.

    ``encoded``: frames as they come out of an H.264 file. ``noise``: standard deviation of what is added to each pixel
    of each frame, in the model's units, in which black is -1 and white 1. Raises :class:`EarlyTomConfigError` where
    ``encoded`` means nothing to the ``world``.
    """
    if encoded and world.encoded is None:
        raise EarlyTomConfigError(f"encoded=True: frames of the world {world.name} come out of a file anyhow.")
    frames, asked, held_out = [], [], []
    for seed in range(first, first + videos):
        video = world.sample_video(split, seed)
        drawn = world.encoded(video) if encoded and world.encoded else video.frames()
        frames.append(torch.from_numpy(_noisy(drawn, noise, rng_of(split, seed, stream=4)) if noise else drawn))
        asked.append(list(world.ask(video, rng_of(split, seed, stream=3)).values()))
        held_out.append(world.shows_held_out(video))
        advance()
    return Questions(torch.stack(frames), asked, np.array(held_out), world)


def _noisy(frames: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    noisy = frames + 127.5 * noise * rng.standard_normal(frames.shape)
    return noisy.round().clip(0, 255).astype(np.uint8)


def options_of(arm: Arm, options: Mapping[str, Any]) -> dict[str, Any]:
    """All that its method is made with; of ``options`` those that it takes and its settings do not replace."""
    own = own_options(arm.method)
    if own is None:
        own = {} if arm.method in UNCONFIGURED else {"variant": "paper"}  # whose parts they are
    bounded = arm.retain_ratio is not None or arm.method in UNCONFIGURED
    ratio = arm.retain_ratio if bounded else _ANY_RATIO
    return {"retain_ratio": ratio, **own, **taken(arm.method, {**options, **dict(arm.settings)})}


def made(model: Model, arm: Arm, options: Mapping[str, Any]) -> Compress:
    """The method of ``arm``; of ``options`` it gets those that it takes and ``arm`` does not set."""
    return method(arm.method, model, **options_of(arm, options))


@torch.no_grad()
def evaluate(
    model: Model,
    questions: Questions,
    arm: Arm,
    options: Mapping[str, Any] | None = None,
    advance: Callable[[int], None] = lambda videos: None,
    compress: Compress | None = None,
) -> Result:
    """Ask everything, with the tokens that the method of ``arm`` leaves of each video: ``compress``, or None to have it
    :func:`made` with ``options``."""
    compress = made(model, arm, options or {}) if compress is None else compress
    device = next(model.parameters()).device
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    costs: list[Cost] = []
    for first in range(0, len(questions.asked), _AT_ONCE):
        chunk = questions.asked[first : first + _AT_ONCE]
        left = [compress(normalized(f.to(device))) for f in questions.frames[first : first + _AT_ONCE]]
        inside = compress.model if isinstance(compress, Installed) and compress.steps else None
        parts.append(right_answers(model, [each.tokens for each in left], chunk, inside, questions.world))
        costs += [_cost(model, compress, each, about) for each, about in zip(left, chunk, strict=True)]
        advance(len(chunk))
    right, asked = map(np.concatenate, zip(*parts, strict=True))
    tokens, layer_tokens, work, _ = np.mean(costs, axis=0).tolist()
    flops = np.average([each.flops for each in costs], weights=asked.sum(1)).item()
    means = Cost(tokens, layer_tokens, work, flops)
    return Result(arm, means, right, asked, categories=questions.world.categories)


def _cost(model: Model, compress: Compress, left: Compressed, asked: Sequence[Question]) -> Cost:
    """Of one video, with the mean of its questions."""
    shape, steps = ModelShape.from_config(model.config), _steps(compress)
    tokens = len(left.tokens)
    prompts = [cost.of_prompt(shape, prompt_length(question, tokens), tokens, steps) for question in asked]
    seen = cost.mean_over_layers(tokens, steps, shape.llm_layers)
    return Cost(tokens, seen, left.work, left.flops + float(np.mean(prompts)))


def _steps(compress: Compress) -> tuple[Step, ...]:
    """Where tokens leave inside the language model."""
    return compress.steps if isinstance(compress, Installed) else ()


def right_answers(
    model: Model,
    videos: Sequence[torch.Tensor],
    asked: Sequence[Sequence[Question]],
    inside: Any = None,
    world: World = TOY,
) -> tuple[np.ndarray, np.ndarray]:
    """Which answers are right and which questions were asked, bool [V, C] each, by video and category.

    ``videos``: the tokens of each, [K, C]. ``inside``: the compiled model, where tokens leave inside the language
    model.
    """
    right, there = (np.zeros((len(asked), len(world.categories)), bool) for _ in range(2))
    for video, (about, said) in enumerate(zip(asked, _words(model, videos, asked, inside, world), strict=True)):
        for question, word in zip(about, said, strict=True):
            column = world.categories.index(question.category)
            there[video, column] = True
            right[video, column] = word == world.ids[question.answer]
    return right, there


def _words(
    model: Model, videos: Sequence[torch.Tensor], asked: Sequence[Sequence[Question]], inside: Any, world: World
) -> list[list[int]]:
    """The word said to each question about each video, by its id."""
    if inside is not None:
        return [generated(inside, tokens, about, world.ids) for tokens, about in zip(videos, asked, strict=True)]
    said: list[list[int]] = []
    longest = max(1, *map(len, videos))
    at_once = max(1, min(_AT_ONCE, _TOKENS_AT_ONCE // longest))
    for first in range(0, len(videos), at_once):
        chunk, about = videos[first : first + at_once], asked[first : first + at_once]
        logits, _ = world.answer_logits(model, chunk, world.rows_of(about).to(chunk[0].device))
        words = iter(logits[::2].argmax(-1).tolist())  # every other one is behind the end of an answer
        said += [[next(words) for _ in questions] for questions in about]
    return said
