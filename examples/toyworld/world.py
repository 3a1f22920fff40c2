"""Videos of coloured shapes: scenes with cuts between them, motion, camera pans, flashes, flicker.

    video = sample_video("test", seed=3)
    video.frames()                 # uint8 [8, 96, 96, 3], what the model sees
    write_mp4(video, "a.mp4")      # 64 frames; eight evenly spaced ones are the frames above

Everything in a video follows from (split, seed). Four of the thirty pairs of colour and shape never occur in
the split ``train``. Time is counted in sampled frames; it may lie between two.
"""

import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np

SIZE = 96
"""Height and width in pixels."""
FRAMES = 8
"""Frames of a video as the model samples it."""
FRAMES_BETWEEN = 9
"""Frames of an mp4 from one sampled frame to the next."""
FILE_FRAMES = (FRAMES - 1) * FRAMES_BETWEEN + 1
"""Frames of an mp4."""
FPS = 12

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 190, 70),
    "blue": (60, 90, 235),
    "yellow": (240, 215, 50),
    "purple": (185, 60, 200),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS = {"slow": 3.0, "fast": 8.0}
"""Pixels a sampled frame."""
PAN_SPEED = 3.0

Pair = tuple[str, str]
"""Colour and shape."""
PAIRS: tuple[Pair, ...] = tuple((color, shape) for color in COLORS for shape in SHAPES)
HELD_OUT: frozenset[Pair] = frozenset([("red", "ring"), ("blue", "triangle"), ("yellow", "cross"), ("white", "circle")])
"""Pairs that never occur in the split ``train``."""
SPLITS = ("train", "validation", "test")

_BACKGROUNDS = ((20, 24, 34), (58, 46, 36), (34, 56, 48), (84, 84, 92), (52, 34, 62))
_TEXTURES = ("plain", "columns", "rows", "checks")
_PERIOD = 24  # pixels from one dark stripe to the next
_CONTRAST = 12
_RADII = (9.0, 12.0)
_MOST_THINGS = 4
GLOW = (250, 140, 30)
"""Colour around a thing that flashes."""
_GLOW_WIDTH = 4.0  # pixels
_Y, _X = np.mgrid[:SIZE, :SIZE].astype(np.float32)
_Y.setflags(write=False)
_X.setflags(write=False)


@dataclass(frozen=True)
class Thing:
    """A shape. Pixels and sampled frames; ``start`` is its centre in the first frame of its scene."""

    color: str
    shape: str
    radius: float
    start: tuple[float, float]
    direction: str | None = None
    speed: str | None = None

    @property
    def pair(self) -> Pair:
        return self.color, self.shape

    def at(self, time: float) -> tuple[float, float]:
        """Centre ``time`` sampled frames after the scene began."""
        if self.direction is None or self.speed is None:
            return self.start
        (dx, dy), pixels = DIRECTIONS[self.direction], SPEEDS[self.speed] * time
        return self.start[0] + dx * pixels, self.start[1] + dy * pixels


@dataclass(frozen=True)
class Scene:
    """What is seen between two cuts: sampled frames ``first`` to ``last``, both inclusive.

    ``flash`` is seen in one of them only, with a glow around it.
    """

    first: int
    last: int
    background: tuple[int, int, int]
    texture: str
    things: tuple[Thing, ...]
    pan: str | None = None
    flash: Thing | None = None
    flash_frame: int | None = None

    def visible(self, time: float) -> list[tuple[Thing, tuple[float, float]]]:
        """Things and their centres at ``time`` (of the video), back to front."""
        shift = self._shift(time)
        seen = list(self.things)
        if self.flash is not None and self.flash_frame == int(np.floor(time + 0.5)):
            seen.append(self.flash)
        places = [(thing, thing.at(time - self.first)) for thing in seen]
        return [(thing, (x + shift[0], y + shift[1])) for thing, (x, y) in places]

    def _shift(self, time: float) -> tuple[float, float]:
        """How far the picture has moved: opposite to the camera."""
        if self.pan is None:
            return 0.0, 0.0
        dx, dy = DIRECTIONS[self.pan]
        return -dx * PAN_SPEED * (time - self.first), -dy * PAN_SPEED * (time - self.first)

    def draw(self, time: float) -> np.ndarray:
        """uint8 RGB [96, 96, 3]."""
        picture = self._draw_background(time)
        seen = self.visible(time)
        for thing, centre in seen:
            if thing is self.flash:
                picture[_disc(centre, thing.radius + _GLOW_WIDTH)] = GLOW
        for thing, centre in seen:
            picture[mask_of(thing, centre)] = COLORS[thing.color]
        return picture

    def _draw_background(self, time: float) -> np.ndarray:
        dark = np.array(self.background, np.uint8)
        return np.stack([dark, dark + np.uint8(_CONTRAST)])[self._pattern(time)]

    def _pattern(self, time: float) -> np.ndarray:
        """Which pixels are bright, 0 or 1, [96, 96]."""
        x, y = self._shift(time)
        columns = ((_X[:1] - x) // (_PERIOD / 2) % 2).astype(np.int8)
        rows = ((_Y[:, :1] - y) // (_PERIOD / 2) % 2).astype(np.int8)
        pattern = {"plain": np.int8(0), "columns": columns, "rows": rows, "checks": columns ^ rows}[self.texture]
        return np.broadcast_to(pattern, (SIZE, SIZE))


@dataclass(frozen=True)
class Video:
    """Scenes one after another, and grey specks that flicker over single frames."""

    scenes: tuple[Scene, ...]
    specks: dict[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)  # by sampled frame: (x, y)

    @property
    def things(self) -> list[Thing]:
        """Everything that is ever seen, flashes included."""
        flashes = [scene.flash for scene in self.scenes if scene.flash is not None]
        return [thing for scene in self.scenes for thing in scene.things] + flashes

    def scene_at(self, time: float) -> Scene:
        """The scene seen at ``time``; cuts lie half way between two sampled frames."""
        return next(scene for scene in self.scenes if time < scene.last + 0.5 or scene is self.scenes[-1])

    def draw(self, time: float) -> np.ndarray:
        """uint8 RGB [96, 96, 3]."""
        picture = self.scene_at(time).draw(time)
        for x, y in self.specks.get(int(np.floor(time + 0.5)), ()):
            picture[y : y + 4, x : x + 4] = 150
        return picture

    def frames(self) -> np.ndarray:
        """The sampled frames, uint8 RGB [8, 96, 96, 3]."""
        return np.stack([self.draw(time) for time in range(FRAMES)])


def mask_of(thing: Thing, centre: tuple[float, float]) -> np.ndarray:
    """bool [96, 96]: where ``thing`` is drawn when its centre is there."""
    dx, dy, r = _X[:1] - centre[0], _Y[:, :1] - centre[1], thing.radius  # a row and a column: shapes broadcast
    if thing.shape == "circle":
        return dx**2 + dy**2 <= r**2
    if thing.shape == "ring":
        return (dx**2 + dy**2 <= r**2) & (dx**2 + dy**2 >= 0.3 * r**2)
    if thing.shape == "square":
        return np.maximum(abs(dx), abs(dy)) <= 0.88 * r
    if thing.shape == "triangle":
        return (dy <= 0.75 * r) & (abs(dx) <= 0.58 * (dy + r))
    assert thing.shape == "cross", thing.shape
    return (np.minimum(abs(dx), abs(dy)) <= 0.33 * r) & (np.maximum(abs(dx), abs(dy)) <= r)


def _disc(centre: tuple[float, float], radius: float) -> np.ndarray:
    return (_X[:1] - centre[0]) ** 2 + (_Y[:, :1] - centre[1]) ** 2 <= radius**2


def write_mp4(video: Video, path: str | Path, *, lossless: bool = False) -> None:
    """Encode 64 frames, 12 a second (H.264, or MPEG-4 where FFmpeg lacks an H.264 encoder).

    ``lossless``: decoded, they are the drawn ones bit for bit; takes FFmpeg's libx264rgb.
    """
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    kind, pixels, options = ("libx264rgb", "rgb24", {"qp": "0"}) if lossless else (codec, "yuv420p", {})
    with av.open(str(path), "w") as container:
        stream = typing.cast(av.VideoStream, container.add_stream(kind, rate=FPS, options=options))
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, pixels
        for index in range(FILE_FRAMES):
            picture = video.draw(index / FRAMES_BETWEEN)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def read_sampled(path: str | Path) -> np.ndarray:
    """The sampled frames of what :func:`write_mp4` wrote, uint8 RGB [8, 96, 96, 3]."""
    with av.open(str(path)) as container:
        decoded = list(container.decode(video=0))
    return np.stack([frame.to_ndarray(format="rgb24") for frame in decoded[::FRAMES_BETWEEN]])


# --- Sampling ----------------------------------------------------------------------------------------


def rng_of(split: str, seed: int, stream: int = 0) -> np.random.Generator:
    """Random numbers for video ``seed`` of ``split``; ``stream`` tells apart what is drawn for one video."""
    return np.random.default_rng([SPLITS.index(split), seed, stream])


def sample_video(split: str, seed: int) -> Video:
    """Video number ``seed`` of ``split``, always the same one."""
    rng = rng_of(split, seed)
    pairs = [pair for pair in PAIRS if split != "train" or pair not in HELD_OUT]
    while True:  # Few draws fail: where things do not fit beside one another.
        video = _try_video(rng, pairs)
        if video is not None:
            return video


def _try_video(rng: np.random.Generator, pairs: Sequence[Pair]) -> Video | None:
    spans = _spans(rng)
    scenes: list[Scene] = []
    for number, (first, last) in enumerate(spans):
        recolored = number == 1 and rng.random() < 0.4
        scene = _recolored(rng, scenes[0], first, last, pairs) if recolored else _scene(rng, first, last, pairs)
        if scene is None:
            return None
        scenes.append(scene)
    specks: dict[int, tuple[tuple[int, int], ...]] = {}
    if rng.random() < 0.3:
        for frame in np.flatnonzero(rng.random(FRAMES) < 0.5):
            places = rng.integers(0, SIZE - 4, (rng.integers(1, 4), 2))
            specks[int(frame)] = tuple((int(x), int(y)) for x, y in places)
    return Video(tuple(scenes), specks)


def _spans(rng: np.random.Generator) -> list[tuple[int, int]]:
    """First and last frame of each scene: one to three of them, none shorter than two frames."""
    count = rng.choice([1, 2, 3], p=[0.4, 0.45, 0.15])
    while True:
        cuts = sorted(rng.choice(np.arange(1, FRAMES), count - 1, replace=False).tolist())
        edges = [0, *cuts, FRAMES]
        if all(b - a >= 2 for a, b in zip(edges, edges[1:], strict=False)):
            return [(a, b - 1) for a, b in zip(edges, edges[1:], strict=False)]


def _scene(rng: np.random.Generator, first: int, last: int, pairs: Sequence[Pair]) -> Scene | None:
    kind = rng.choice(["moves", "needle", "pan"], p=[0.5, 0.35, 0.15])
    if kind == "needle" and last - first < 2:
        kind = "moves"
    count = int(rng.integers(1, _MOST_THINGS + 1)) + (kind == "needle")
    chosen = [pairs[i] for i in rng.choice(len(pairs), count, replace=False)]
    pan = str(rng.choice(list(DIRECTIONS))) if kind == "pan" else None
    # Standing still is one answer of five. All this is settled before places are tried: whatever fits seldom would
    # otherwise become a rare answer.
    ways = [str(rng.choice([*DIRECTIONS, ""])) if kind == "moves" else "" for _ in chosen]
    speeds = [str(rng.choice(list(SPEEDS))) for _ in chosen]
    things = _placed(rng, chosen, ways, speeds, last - first, pan)
    if things is None:
        return None
    background, texture = _backdrop(rng)
    if kind != "needle":
        return Scene(first, last, background, texture, things, pan)
    frame = int(rng.integers(first, last + 1))
    return Scene(first, last, background, texture, things[:-1], None, things[-1], frame)


def _backdrop(rng: np.random.Generator) -> tuple[tuple[int, int, int], str]:
    return _BACKGROUNDS[rng.integers(len(_BACKGROUNDS))], str(rng.choice(_TEXTURES))


def _recolored(rng: np.random.Generator, before: Scene, first: int, last: int, pairs: Sequence[Pair]) -> Scene | None:
    """The things of ``before`` stand where it left them, one in another colour."""
    seen = [(thing, centre) for thing, centre in before.visible(before.last) if thing is not before.flash]
    index = int(rng.integers(len(seen)))
    taken = {thing.pair for thing in before.things} | ({before.flash.pair} if before.flash else set())
    free = [c for c, s in pairs if s == seen[index][0].shape and (c, s) not in taken]
    if not free:
        return None
    things = []
    for number, (thing, centre) in enumerate(seen):
        color = str(rng.choice(free)) if number == index else thing.color
        things.append(Thing(color, thing.shape, thing.radius, centre))
    return Scene(first, last, before.background, before.texture, tuple(things))


def _placed(
    rng: np.random.Generator,
    pairs: Sequence[Pair],
    ways: Sequence[str],
    speeds: Sequence[str],
    frames: int,
    pan: str | None,
) -> tuple[Thing, ...] | None:
    """Things that stay in the picture for ``frames`` frames and apart, but for a corner now and then; None if no such
    places were found."""
    for _ in range(300):
        placed: list[Thing] = []
        for pair, way, speed in zip(pairs, ways, speeds, strict=True):
            radius = float(rng.uniform(*_RADII))
            drift = _drift(way, speed, frames, pan)
            x, y = (_start(rng, radius, pixels) for pixels in drift)
            thing = Thing(*pair, radius, (x, y), way or None, speed if way else None)
            if any(_touch(thing, other, frames) for other in placed):
                break
            placed.append(thing)
        else:
            return tuple(placed)
    return None


def _drift(way: str, speed: str, frames: int, pan: str | None) -> tuple[float, float]:
    """How far a thing moves across the picture in ``frames`` frames, in pixels."""
    if pan:
        dx, dy = DIRECTIONS[pan]
        return -dx * PAN_SPEED * frames, -dy * PAN_SPEED * frames
    dx, dy = DIRECTIONS.get(way, (0, 0))
    return dx * SPEEDS[speed] * frames, dy * SPEEDS[speed] * frames


def _start(rng: np.random.Generator, radius: float, drift: float) -> float:
    """Where to start along an axis so as to stay inside all the way."""
    return float(rng.uniform(radius + max(0.0, -drift), SIZE - radius - max(0.0, drift)))


def _touch(a: Thing, b: Thing, frames: int) -> bool:
    apart = a.radius + b.radius + 1
    for time in range(frames + 1):
        (ax, ay), (bx, by) = a.at(time), b.at(time)
        if (ax - bx) ** 2 + (ay - by) ** 2 < apart**2:
            return True
    return False
