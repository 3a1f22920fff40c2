"""Multiple-choice questions about a video, with answers that follow from how it was made.

    ask(video, rng)
    -> {"appearance": Question("what color is the ring ?", "red", (...)), "motion": ..., ...}

What compression can destroy, one category each: ``appearance`` (colour and shape), ``motion`` (direction and
speed), ``counting``, ``order`` (what came first, what changed after the cut) and ``needle`` (what is seen in one
frame only). The right answers of a template are about equally likely ("nowhere" a third more often than each
direction), and test_questions.py counts: knowing the question is worth no more than guessing. ``place`` questions
are for training only and not balanced.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from earlytom_compile.toyworld.world import COLORS, DIRECTIONS, SHAPES, SIZE, SPEEDS, Scene, Thing, Video

CATEGORIES = ("appearance", "motion", "counting", "order", "needle")
TRAINING_CATEGORIES = (*CATEGORIES, "place")
NUMBERS = ("one", "two", "three", "four")
NOWHERE = "nowhere"
WAYS = (*DIRECTIONS, NOWHERE)
_COLORS = tuple(COLORS)
_SPEEDS = tuple(SPEEDS)


@dataclass(frozen=True)
class Question:
    """``answer`` is one of ``choices``, which are single words."""

    text: str
    answer: str
    choices: tuple[str, ...]
    category: str

    @property
    def chance(self) -> float:
        """Share of right answers by guessing."""
        return 1 / len(self.choices)


def all_questions(video: Video) -> list[Question]:
    """Every question that has exactly one right answer in ``video``."""
    return [
        *_appearance(video),
        *_motion(video),
        *_counting(video),
        *_order(video),
        *_needle(video),
        *_place(video),
    ]


def ask(video: Video, rng: np.random.Generator) -> dict[str, Question]:
    """One question of each category that ``video`` has any of, ``place`` left out; drawn with ``rng``.

    Among the templates of a category, then among the questions of a template, all are equally likely.
    """
    drawn = {}
    questions = all_questions(video)
    for category in CATEGORIES:
        of_category = [question for question in questions if question.category == category]
        if of_category:
            drawn[category] = draw(of_category, rng)
    return drawn


def draw(questions: list[Question], rng: np.random.Generator) -> Question:
    """One of ``questions``: first a set of choices, then a question with those."""
    kinds = sorted({question.choices for question in questions})
    kind = kinds[rng.integers(len(kinds))]
    same = [question for question in questions if question.choices == kind]
    return same[rng.integers(len(same))]


def _name(thing: Thing) -> str:
    return f"{thing.color} {thing.shape}"


def _distinct(video: Video) -> list[Thing]:
    """Things seen over the whole video, one that stays over a cut counted once; flashes left out."""
    found: dict[tuple[str, str], Thing] = {}
    for scene in video.scenes:
        for thing in scene.things:
            found.setdefault(thing.pair, thing)
    return list(found.values())


def _appearance(video: Video) -> Iterator[Question]:
    pairs = {thing.pair for thing in video.things}
    colors, shapes = Counter(color for color, _ in pairs), Counter(shape for _, shape in pairs)
    for thing in _distinct(video):
        if shapes[thing.shape] == 1:
            yield Question(f"what color is the {thing.shape} ?", thing.color, _COLORS, "appearance")
        if colors[thing.color] == 1:
            yield Question(f"what shape is the {thing.color} thing ?", thing.shape, SHAPES, "appearance")


def _motion(video: Video) -> Iterator[Question]:
    seen = Counter(thing.pair for thing in video.things)
    for scene in video.scenes:
        # A recoloured scene and one with a flash stand still as a whole: asking there would give the answer away.
        if scene.pan or scene.flash or scene.last - scene.first < 2 or _follows(video, scene):
            continue
        for thing in scene.things:
            if seen[thing.pair] == 1:
                yield Question(f"which way does the {_name(thing)} go ?", thing.direction or NOWHERE, WAYS, "motion")
                if thing.speed:
                    yield Question(f"how fast does the {_name(thing)} go ?", thing.speed, _SPEEDS, "motion")


def _counting(video: Video) -> Iterator[Question]:
    if len(video.scenes) == 1:
        scenes = {"video": video.scenes[0]}
    else:
        scenes = {"first scene": video.scenes[0], "last scene": video.scenes[-1]}
    for name, scene in scenes.items():
        if not scene.flash:
            text = f"how many things are in the {name} ?"
            yield Question(text, NUMBERS[len(scene.things) - 1], NUMBERS, "counting")


def _order(video: Video) -> Iterator[Question]:
    for before, after in zip(video.scenes, video.scenes[1:], strict=False):
        if not _follows(video, after):
            continue
        changed = next(i for i, thing in enumerate(after.things) if thing.color != before.things[i].color)
        shape = after.things[changed].shape
        named = [t for scene in video.scenes for t in scene.things if t.shape == shape]
        flashes = [scene.flash.shape for scene in video.scenes if scene.flash]
        if len(named) == 2 and shape not in flashes:
            yield Question(f"what color has the {shape} at first ?", before.things[changed].color, _COLORS, "order")
            yield Question(f"what color has the {shape} at last ?", after.things[changed].color, _COLORS, "order")
    yield from _what_came_first(video)


def _what_came_first(video: Video) -> Iterator[Question]:
    """Of colours that one thing each has, first seen in different scenes; what flashes is left out."""
    pairs = Counter(color for color, _ in {thing.pair for thing in video.things})
    flashes = {scene.flash.color for scene in video.scenes if scene.flash}
    first_seen: dict[str, int] = {}
    for index, scene in enumerate(video.scenes):
        for thing in scene.things:
            if pairs[thing.color] == 1 and thing.color not in flashes:
                first_seen.setdefault(thing.color, index)
    for a, b in itertools.permutations(first_seen, 2):  # both ways round: the place in the question says nothing
        if first_seen[a] != first_seen[b]:
            answer = min(a, b, key=lambda color: first_seen[color])
            yield Question(f"which comes first , {a} or {b} ?", answer, tuple(sorted((a, b))), "order")


def _needle(video: Video) -> Iterator[Question]:
    flashes = [scene.flash for scene in video.scenes if scene.flash]
    if len(flashes) == 1:
        yield Question("what color flashes ?", flashes[0].color, _COLORS, "needle")
        yield Question("what shape flashes ?", flashes[0].shape, SHAPES, "needle")


def _place(video: Video) -> Iterator[Question]:
    seen = Counter(thing.pair for thing in video.things)
    for scene in video.scenes:
        if _follows(video, scene):
            continue
        for thing in scene.things:
            if seen[thing.pair] != 1:
                continue
            for when, time in (("start", scene.first), ("end", scene.last)):
                (centre,) = (place for other, place in scene.visible(time) if other is thing)
                for axis, word in enumerate(("column", "row")):
                    quarter = NUMBERS[int(np.clip(centre[axis] * 4 / SIZE, 0, 3))]
                    text = f"in which {word} is the {_name(thing)} at the {when} ?"
                    yield Question(text, quarter, NUMBERS, "place")


def _follows(video: Video, scene: Scene) -> bool:
    """Whether ``scene`` is the one before it with one thing in another colour."""
    index = video.scenes.index(scene)
    if index == 0 or len(scene.things) != len(video.scenes[index - 1].things):
        return False
    pairs = list(zip(scene.things, video.scenes[index - 1].things, strict=True))
    same = [(a.shape, a.radius) == (b.shape, b.radius) for a, b in pairs]
    changed = [a.color != b.color for a, b in pairs]
    return all(same) and sum(changed) == 1
