"""Videos that look a little like filmed ones: shaded things before textured backgrounds, a camera that shakes, light
that changes, sensor noise, and what H.264 leaves of all that.

    video = sample_video("test", seed=3)
    video.frames()                 # uint8 [16, 224, 224, 3], decoded, what the model sees
    write_mp4(video, "a.mp4")      # 61 frames; every fourth is one of the frames above   (film.py)

One to three scenes with cuts between them. In most, things stand still for a long time; then one moves, appears, or
flashes for a frame or two. Everything in a video follows from (split, seed), and colours, shapes and the pairs of them
that never occur in the split ``train`` are those of the toy world. Time is counted in sampled frames, in a scene from
its first frame on; it may lie between two.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from earlytom_compile.photoworld import drawing, film
from earlytom_compile.photoworld.drawing import SIZE, Look
from earlytom_compile.toyworld.world import DIRECTIONS, HELD_OUT, PAIRS, Pair, rng_of

FRAMES = 16
"""Frames of a video as the model samples it."""
MOST_THINGS = 4
"""In a scene without flashes."""
MOST_FLASHES = 4
"""Times that one thing flashes."""
QUARTERS = 4
"""Rows and columns of the picture, and parts of the video, that questions ask for."""
RADII = (19.0, 28.0)
LEAST_SCENE = 4
"""Frames of the shortest scene where there are several."""
LONG_SCENE = 9
"""Frames of a scene in which a thing may flash any number of times."""
LEAST_MOVE = 20.0
"""Pixels that a thing goes if it goes anywhere."""
_MOST_MOVE = 90.0
_FASTEST = 14.0  # pixels a sampled frame
_MARGIN = 5.0  # pixels between the centre of what stands still and the next row or column
_TRIES = 400

Place = tuple[float, float]


@dataclass(frozen=True)
class Thing:
    """A shape, in pixels and frames of its scene: it stands at ``start``, goes by ``way`` from ``moves[0]`` to
    ``moves[1]``, and stands there; it is seen from ``appears`` on."""

    color: str
    shape: str
    radius: float
    start: Place
    way: Place = (0.0, 0.0)
    moves: tuple[float, float] = (0.0, 1.0)
    appears: float = -1.0

    @property
    def pair(self) -> Pair:
        return self.color, self.shape

    def at(self, time: float) -> Place:
        """Its centre."""
        first, last = self.moves
        share = min(max((time - first) / (last - first), 0.0), 1.0)
        return self.start[0] + share * self.way[0], self.start[1] + share * self.way[1]


@dataclass(frozen=True)
class Flash:
    """A thing that is seen in these ``frames`` of its scene only, with a glow around it."""

    thing: Thing
    frames: tuple[int, ...]


@dataclass(frozen=True)
class Scene:
    """``length`` sampled frames without a cut."""

    length: int
    things: tuple[Thing, ...]
    flashes: tuple[Flash, ...]
    look: Look

    def visible(self, time: float) -> list[tuple[Thing, Place, bool]]:
        """Things, their centres, and whether they glow, at ``time`` of the scene."""
        standing = [(thing, thing.at(time), False) for thing in self.things if time >= thing.appears]
        now = int(np.floor(time + 0.5))
        return standing + [(flash.thing, flash.thing.start, True) for flash in self.flashes if now in flash.frames]

    def draw(self, time: float) -> np.ndarray:
        """uint8 RGB [224, 224, 3]; before any encoding."""
        seen = [drawing.Shape(t.color, t.shape, t.radius, place, glows) for t, place, glows in self.visible(time)]
        return drawing.picture(self.look, seen, time)


@dataclass(frozen=True)
class Video:
    """Scenes one after another."""

    scenes: tuple[Scene, ...]

    @property
    def length(self) -> int:
        """Sampled frames."""
        return sum(scene.length for scene in self.scenes)

    def at(self, time: float) -> tuple[Scene, float]:
        """The scene seen at ``time`` and the time in it; cuts lie half way between two sampled frames."""
        for scene in self.scenes[:-1]:
            if time < scene.length - 0.5:
                return scene, time
            time -= scene.length
        return self.scenes[-1], time

    def draw(self, time: float) -> np.ndarray:
        """uint8 RGB [224, 224, 3]; before any encoding."""
        scene, inside = self.at(time)
        return scene.draw(inside)

    def frames(self, count: int | None = None) -> np.ndarray:
        """Evenly spaced frames of the encoded video, uint8 RGB [count, 224, 224, 3]; all sampled ones if not said."""
        return film.sampled(self.draw, self.length, self.length if count is None else count)


def sample_video(split: str, seed: int) -> Video:
    """Video number ``seed`` of ``split``, always the same one."""
    rng = rng_of(split, seed)
    pairs = pairs_of(split)
    scenes = [sample_scene(rng, length, pairs) for length in spans(rng)]
    return Video(tuple(scenes))


def sample_still_video(split: str, seed: int, *, flash: bool) -> Video:
    """One scene that stands quite still but for the noise of its sensor; ``flash``: but for one frame too."""
    rng = rng_of(split, seed, stream=3)
    count = int(rng.integers(1, MOST_THINGS))
    standing, (extra,) = _standing(rng, pairs_of(split), count, 1)
    flashes = (Flash(extra, (int(rng.integers(FRAMES)),)),) if flash else ()
    look = replace(drawing.sample_look(rng), shake=0.0, lighting=0.0)
    return Video((Scene(FRAMES, standing, flashes, look),))


def pairs_of(split: str) -> list[Pair]:
    """Colours and shapes that occur there."""
    return [pair for pair in PAIRS if split != "train" or pair not in HELD_OUT]


def spans(rng: np.random.Generator) -> list[int]:
    """Lengths of the scenes of a video: one to three."""
    count = int(rng.choice([1, 2, 3], p=[0.45, 0.4, 0.15]))
    while True:
        cuts = sorted(rng.choice(np.arange(1, FRAMES), count - 1, replace=False).tolist())
        lengths = np.diff([0, *cuts, FRAMES]).tolist()
        if min(lengths) >= LEAST_SCENE:
            return lengths


def sample_scene(rng: np.random.Generator, length: int, pairs: Sequence[Pair]) -> Scene:
    """Things that move or stand, or stand still while one flashes, or until one appears."""
    kind = rng.choice(["moves", "flashes", "appears"], p=[0.45, 0.35, 0.2])
    if kind == "moves":
        return moving_scene(rng, length, pairs)
    standing, (first, second) = _standing(rng, pairs, int(rng.integers(1, MOST_THINGS)), 2)
    look = drawing.sample_look(rng)
    if kind == "appears":
        late = replace(first, appears=int(rng.integers(1, length)) - 0.5)
        return Scene(length, (*standing, late), (), look)
    return Scene(length, standing, _flashes(rng, length, (first, second)), look)


def _flashes(rng: np.random.Generator, length: int, things: Sequence[Thing]) -> tuple[Flash, ...]:
    times = flash_times(rng, length)
    frames = [tuple(frame for frame, which in times if which == number) for number in range(len(things))]
    return tuple(Flash(thing, at) for thing, at in zip(things, frames, strict=True) if at)


def flash_times(rng: np.random.Generator, length: int) -> list[tuple[int, int]]:
    """Frames of a scene in which one of two things flashes, and which: one once, one several times, or both once."""
    kind = rng.choice(["one", "several", "two"], p=[0.3, 0.45, 0.25])
    if kind == "several" and length >= LONG_SCENE:
        return [(frame, 0) for frame in _apart(rng, length, int(rng.integers(1, MOST_FLASHES + 1)))]
    if kind == "two":
        return list(zip(_apart(rng, length, 2), rng.permutation(2).tolist(), strict=True))
    # Two frames of a long scene: were it often one, once would be the usual answer to how many times.
    lasts = 2 if length >= LONG_SCENE else int(rng.integers(1, 3))
    start = int(rng.integers(length - lasts + 1))
    return [(frame, 0) for frame in range(start, start + lasts)]


def _apart(rng: np.random.Generator, length: int, count: int) -> tuple[int, ...]:
    """So many of the frames of a scene, no two of which follow one another."""
    chosen = np.sort(rng.choice(length - count + 1, count, replace=False)) + np.arange(count)
    return tuple(chosen.tolist())


def staged_scene(rng: np.random.Generator, pairs: Sequence[Pair], shows: Sequence[int]) -> Scene:
    """A scene that stands still in ``shows[0]`` frames, then shows one thing that glows in ``shows[1]``, then another
    in ``shows[2]``: its frames in another order are another scene (clips.py)."""
    standing, extra = _standing(rng, pairs, int(rng.integers(1, MOST_THINGS)), 2)
    ends = np.cumsum(shows).tolist()
    flashes = [Flash(t, tuple(range(a, b))) for t, a, b in zip(extra, ends, ends[1:], strict=False)]
    return Scene(ends[-1], standing, tuple(flashes), drawing.sample_look(rng))


def appearing_scene(rng: np.random.Generator, pairs: Sequence[Pair], before: int, after: int) -> Scene:
    """A scene that stands still, into which one thing comes after ``before`` frames and stays for ``after``."""
    standing, (late,) = _standing(rng, pairs, int(rng.integers(1, MOST_THINGS)), 1)
    return Scene(before + after, (*standing, replace(late, appears=before - 0.5)), (), drawing.sample_look(rng))


def moving_scene(rng: np.random.Generator, length: int, pairs: Sequence[Pair]) -> Scene:
    """One to four things, each of which goes one of four ways or stands."""
    count = int(rng.integers(1, MOST_THINGS + 1))
    chosen = [pairs[i] for i in rng.choice(len(pairs), count, replace=False)]
    # Settled before places are tried: whatever fits seldom would otherwise become a rare answer.
    ways = [_way(rng, length) for _ in chosen]
    things = _placed(rng, chosen, ways)
    return Scene(length, things, (), drawing.sample_look(rng))


Way = tuple[Place, tuple[float, float]]


def _way(rng: np.random.Generator, length: int) -> Way:
    """How far, and from when to when: all the time, or a few frames of it."""
    direction = str(rng.choice([*DIRECTIONS, ""]))
    last = length - 1
    short = rng.random() < 0.5 and length > LEAST_SCENE
    lasts = int(rng.integers(2, max(3, length // 3) + 1)) if short else last
    first = int(rng.integers(0, last - lasts + 1))
    pixels = float(rng.uniform(LEAST_MOVE, min(_MOST_MOVE, _FASTEST * lasts)))
    dx, dy = DIRECTIONS.get(direction, (0, 0))
    return (dx * pixels, dy * pixels), (float(first), float(first + lasts))


_STANDS: Way = ((0.0, 0.0), (0.0, 1.0))


def _standing(
    rng: np.random.Generator, pairs: Sequence[Pair], count: int, more: int
) -> tuple[tuple[Thing, ...], tuple[Thing, ...]]:
    """``count`` things that stand and ``more`` that have a place of their own."""
    chosen = [pairs[i] for i in rng.choice(len(pairs), count + more, replace=False)]
    placed = _placed(rng, chosen, [_STANDS] * len(chosen))
    return placed[:count], placed[count:]


def _placed(rng: np.random.Generator, pairs: Sequence[Pair], ways: Sequence[Way]) -> tuple[Thing, ...]:
    """Things that stay in the picture and apart all the way."""
    while True:
        radius = rng.uniform(*RADII, len(pairs)) * (1 if len(pairs) < MOST_THINGS else 0.85)
        for _ in range(_TRIES):
            placed: list[Thing] = []
            for pair, (way, moves), r in zip(pairs, ways, radius.tolist(), strict=True):
                thing = Thing(*pair, r, (_start(rng, r, way[0]), _start(rng, r, way[1])), way, moves)
                if any(_touch(thing, other) for other in placed):
                    break
                placed.append(thing)
            else:
                return tuple(placed)


def _start(rng: np.random.Generator, radius: float, drift: float) -> float:
    """Where to start along an axis so as to stay inside all the way, in any of its quarters equally often."""
    least, most = radius + max(0.0, -drift) + 2, SIZE - radius - max(0.0, drift) - 2
    if drift:
        return float(rng.uniform(least, most))
    quarter, side = int(rng.integers(QUARTERS)), SIZE / QUARTERS
    return float(rng.uniform(max(least, quarter * side + _MARGIN), min(most, (quarter + 1) * side - _MARGIN)))


def _touch(a: Thing, b: Thing) -> bool:
    times = np.linspace(0, FRAMES, 2 * FRAMES + 1)
    (ax, ay), (bx, by) = _path(a, times), _path(b, times)
    return bool(((ax - bx) ** 2 + (ay - by) ** 2 < (a.radius + b.radius + 3) ** 2).any())


def _path(thing: Thing, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    share = np.clip((times - thing.moves[0]) / (thing.moves[1] - thing.moves[0]), 0, 1)
    return thing.start[0] + share * thing.way[0], thing.start[1] + share * thing.way[1]
