"""Multiple-choice questions about a video, with answers that follow from what its frames show.

    ask(video, rng)
    -> {"appearance": Question("what color is the ring ?", "red", (...)), "motion": ..., ...}

appearance   colour of a shape, shape of a colour
motion       which way a thing goes, if any; it may stand still for most of its scene
counting     how many things are in a scene
repetition   how many times a thing flashes
order        which of two scenes' things comes first, which of two flashes
needle       colour and shape of what flashes in one frame or two
where        row and column of what stands, or of what flashes
when         in which quarter of the video a thing flashes or appears

Right answers of a template are about equally likely, and test_photo_questions.py counts: knowing the question is worth
little more than guessing.
"""

import itertools
from collections import Counter
from collections.abc import Iterator

import numpy as np

from earlytom_compile.photoworld.drawing import SIZE
from earlytom_compile.photoworld.story import Shot, Story, Track, story_of
from earlytom_compile.photoworld.world import LEAST_MOVE, LEAST_SCENE, LONG_SCENE, QUARTERS, Video
from earlytom_compile.toyworld.questions import NOWHERE, NUMBERS, WAYS, Question, draw
from earlytom_compile.toyworld.world import COLORS, DIRECTIONS, SHAPES, Pair

CATEGORIES = ("appearance", "motion", "counting", "repetition", "order", "needle", "where", "when")
_COLORS = tuple(COLORS)
_STILL = 0.5
"""Pixels by which what stands may move."""
_NEEDLE = 2
"""Frames, in no more than which a needle is seen."""
_CLEAR = 3.0
"""Pixels between a centre and the next row or column, so that its own is certain."""


def all_questions(story: Story) -> list[Question]:
    """Every question that has exactly one right answer."""
    return [
        *_appearance(story),
        *_motion(story),
        *_counting(story),
        *_repetition(story),
        *_order(story),
        *_needle(story),
        *_where(story),
        *_when(story),
    ]


def ask(video: Video | Story, rng: np.random.Generator) -> dict[str, Question]:
    """One question of each category that the video has any of, drawn with ``rng``.

    Among the templates of a category, then among the questions of a template, all are equally likely.
    """
    questions = all_questions(video if isinstance(video, Story) else story_of(video))
    drawn = {}
    for category in CATEGORIES:
        of_category = [question for question in questions if question.category == category]
        if of_category:
            drawn[category] = draw(of_category, rng)
    return drawn


def _tracks(story: Story) -> list[tuple[Shot, Track]]:
    return [(shot, track) for shot in story.shots for track in shot.tracks]


def _single(story: Story) -> set[Pair]:
    """Pairs that one thing has in the whole video, so that they name it."""
    count = Counter(track.pair for _, track in _tracks(story))
    return {pair for pair, number in count.items() if number == 1}


def _name(track: Track) -> str:
    return " ".join(track.pair)


def _everything_stays(shot: Shot) -> bool:
    """Whether nothing flashes, comes or leaves."""
    return all(len(track.seen) == shot.length for track in shot.tracks)


def _stands(track: Track) -> bool:
    places = np.array([place for place in track.places if place is not None])
    return bool(np.ptp(places, axis=0).max() <= _STILL)


def _appearance(story: Story) -> Iterator[Question]:
    pairs = {track.pair for _, track in _tracks(story)}
    standing = {track.pair for _, track in _tracks(story) if not track.glows}
    colors, shapes = Counter(color for color, _ in pairs), Counter(shape for _, shape in pairs)
    for color, shape in sorted(standing):
        if shapes[shape] == 1:
            yield Question(f"what color is the {shape} ?", color, _COLORS, "appearance")
        if colors[color] == 1:
            yield Question(f"what shape is the {color} thing ?", shape, SHAPES, "appearance")


def _motion(story: Story) -> Iterator[Question]:
    single = _single(story)
    for shot in story.shots:
        # Where something flashes or comes, all else stands: asking there would give the answer away.
        if shot.length < LEAST_SCENE or not _everything_stays(shot):
            continue
        for track in shot.tracks:
            way = _way(track)
            if track.pair in single and way:
                yield Question(f"which way does the {_name(track)} go ?", way, WAYS, "motion")


def _way(track: Track) -> str | None:
    """None where it goes too little to tell."""
    first, last = (np.array(place) for place in (track.places[0], track.places[-1]))
    gone = last - first
    if _stands(track):
        return NOWHERE
    if abs(gone).max() < LEAST_MOVE - 1:
        return None
    return next(name for name, way in DIRECTIONS.items() if np.dot(way, gone) > 0)


def _counting(story: Story) -> Iterator[Question]:
    named = {"video": story.shots[0]}
    if len(story.shots) > 1:
        named = {"first scene": story.shots[0], "last scene": story.shots[-1]}
    for name, shot in named.items():
        if _everything_stays(shot):
            text = f"how many things are in the {name} ?"
            yield Question(text, NUMBERS[len(shot.tracks) - 1], NUMBERS, "counting")


def _repetition(story: Story) -> Iterator[Question]:
    for shot in story.shots:
        flashing = [track for track in shot.tracks if track.glows]
        # Only in a long scene with one that flashes all four numbers are equally likely.
        if shot.length < LONG_SCENE or len(flashing) != 1 or flashing[0].pair not in _single(story):
            continue
        (track,) = flashing
        times = len(_runs(track))
        if times == len(track.seen):
            text = f"how many times does the {_name(track)} flash ?"
            yield Question(text, NUMBERS[times - 1], NUMBERS, "repetition")


def _runs(track: Track) -> list[list[int]]:
    """Frames that show it, those together that follow one another."""
    runs: list[list[int]] = []
    for frame in track.seen:
        if runs and runs[-1][-1] == frame - 1:
            runs[-1].append(frame)
        else:
            runs.append([frame])
    return runs


def _order(story: Story) -> Iterator[Question]:
    pairs = Counter(color for color, _ in {track.pair for _, track in _tracks(story)})
    glowing = {track.pair[0] for _, track in _tracks(story) if track.glows}
    comes: dict[str, int] = {}
    for index, shot in enumerate(story.shots):
        for track in shot.tracks:
            if pairs[track.pair[0]] == 1 and track.pair[0] not in glowing:
                comes.setdefault(track.pair[0], index)
    yield from _first_of(comes, "comes")
    for shot in story.shots:
        flashing = {t.pair[0]: t.seen[0] for t in shot.tracks if t.glows and pairs[t.pair[0]] == 1}
        yield from _first_of(flashing, "flashes")


def _first_of(times: dict[str, int], verb: str) -> Iterator[Question]:
    for a, b in itertools.permutations(times, 2):  # both ways round: the place in the question says nothing
        if times[a] != times[b]:
            answer = min(a, b, key=lambda color: times[color])
            yield Question(f"which {verb} first , {a} or {b} ?", answer, tuple(sorted((a, b))), "order")


def _flashing(story: Story) -> list[tuple[int, Track]]:
    """What flashes, and the first frame of its shot."""
    shots = zip(story.starts, story.shots, strict=True)
    return [(start, track) for start, shot in shots for track in shot.tracks if track.glows]


def _needle(story: Story) -> Iterator[Question]:
    flashing = _flashing(story)
    if len(flashing) == 1 and len(flashing[0][1].seen) <= _NEEDLE:
        color, shape = flashing[0][1].pair
        yield Question("what color flashes ?", color, _COLORS, "needle")
        yield Question("what shape flashes ?", shape, SHAPES, "needle")


def _where(story: Story) -> Iterator[Question]:
    single = _single(story)
    for _, track in _tracks(story):
        if track.pair not in single or not _stands(track):
            continue
        verb = ("does", "flash ?") if track.glows else ("is", "?")
        (place,) = {place for place in track.places if place is not None}
        for axis, word in enumerate(("column", "row")):
            if _clear(place[axis]):
                quarter = NUMBERS[int(place[axis] * QUARTERS / SIZE)]
                yield Question(f"in which {word} {verb[0]} the {_name(track)} {verb[1]}", quarter, NUMBERS, "where")


def _clear(value: float) -> bool:
    side = SIZE / QUARTERS
    return _CLEAR <= value % side <= side - _CLEAR


def _when(story: Story) -> Iterator[Question]:
    single, length = _single(story), story.length
    for start, shot in zip(story.starts, story.shots, strict=True):
        for track in shot.tracks:
            if track.pair not in single or not track.glows and not _comes(track, shot):
                continue
            frames = [start + frame for frame in (track.seen if track.glows else track.seen[:1])]
            quarters = {frame * QUARTERS // length for frame in frames}
            verb = "flash" if track.glows else "appear"
            if len(quarters) == 1 and len(_runs(track)) == 1:
                (quarter,) = quarters
                text = f"in which quarter does the {_name(track)} {verb} ?"
                yield Question(text, NUMBERS[quarter], NUMBERS, "when")


def _comes(track: Track, shot: Shot) -> bool:
    """Whether it is not there at first and stays once it is."""
    return track.seen[0] > 0 and track.seen == list(range(track.seen[0], shot.length))
