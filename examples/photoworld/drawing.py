"""One picture: a textured background, shaded things before it, light, and the noise of a sensor.

picture(look, shapes, time)    # uint8 [224, 224, 3]

What a scene looks like follows from its :class:`Look`; nothing here knows what scenes are about.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from earlytom_compile.toyworld.world import COLORS, GLOW

SIZE = 224
"""Height and width in pixels."""
MOST_SHAKE = 2
"""Pixels that the camera is ever off its place, in each direction."""
_CANVAS = SIZE + 2 * MOST_SHAKE + 1
_OCTAVES = (3, 6, 12, 25, 50, 100)  # random numbers from one side of the picture to the other
_EDGE = 1.6  # pixels over which a thing fades
_HALO = 9.0  # pixels
_REACH = 24  # pixels around a thing that its glow may colour
_GRAIN = 72  # pixels: the side of a thing's own texture
_Y, _X = np.mgrid[:SIZE, :SIZE].astype(np.float32)
_VIGNETTE = 1 - 0.18 * (((_X - SIZE / 2) ** 2 + (_Y - SIZE / 2) ** 2) / (SIZE**2 / 2))[..., None]


@dataclass(frozen=True)
class Look:
    """``seed`` of everything that is random; ``shake``: pixels; ``lighting``: share by which the light rises and falls;
    ``noise``: standard deviation in grey levels."""

    seed: int
    shake: float
    lighting: float
    noise: float


@dataclass(frozen=True)
class Shape:
    """What is drawn, and where its centre is."""

    color: str
    shape: str
    radius: float
    centre: tuple[float, float]
    glows: bool = False


def sample_look(rng: np.random.Generator) -> Look:
    """Two of five cameras stand on a tripod, and two of five scenes have steady light."""
    shake = float(rng.uniform(0.3, 1.4)) if rng.random() < 0.6 else 0.0
    lighting = float(rng.uniform(0.03, 0.15)) if rng.random() < 0.6 else 0.0
    return Look(int(rng.integers(2**31)), shake, lighting, float(rng.uniform(1.5, 5.0)))


def picture(look: Look, shapes: Sequence[Shape], time: float) -> np.ndarray:
    """uint8 RGB [224, 224, 3] at ``time``, in sampled frames of its scene."""
    shift = _shift(look, time)
    drawn = _moved(_background(look.seed), shift)
    for glowing in (True, False):  # a glow never covers a thing
        for shape in shapes:
            if glowing and shape.glows:
                _glow(drawn, shape, shift)
            if not glowing:
                _paint(drawn, look, shape, shift)
    drawn *= _VIGNETTE * _light(look, time)
    # A scene begins half a frame before its first sampled one.
    rng = np.random.default_rng([look.seed, round(1000 * (time + 1))])
    drawn += look.noise * rng.standard_normal(drawn.shape, np.float32)
    return np.clip(drawn + 0.5, 0, 255).astype(np.uint8)


def distance(shape: str, dx: np.ndarray, dy: np.ndarray, r: float) -> np.ndarray:
    """Pixels to the edge of a shape of radius ``r``, positive inside; about right near the edge."""
    if shape == "circle":
        return r - np.hypot(dx, dy)
    if shape == "ring":
        away = np.hypot(dx, dy)
        return np.minimum(r - away, away - 0.52 * r)
    if shape == "square":
        return 0.86 * r - np.maximum(abs(dx), abs(dy))
    if shape == "triangle":
        return np.minimum(0.75 * r - dy, 0.865 * (0.58 * (dy + r) - abs(dx)))
    assert shape == "cross", shape
    bar = np.minimum(0.3 * r - abs(dx), r - abs(dy))
    return np.maximum(bar, np.minimum(0.3 * r - abs(dy), r - abs(dx)))


def mask_of(shape: Shape) -> np.ndarray:
    """bool [224, 224]: where it is drawn while the camera is at rest."""
    return distance(shape.shape, _X - shape.centre[0], _Y - shape.centre[1], shape.radius) > 0


def smooth_noise(rng: np.random.Generator, size: int, channels: int, fall: float = 0.8) -> np.ndarray:
    """float32 [size, size, channels], of standard deviation 1: fine detail is weaker than coarse, as in photographs."""
    total = torch.zeros(channels, size, size)
    for octave in _OCTAVES:
        grid = torch.from_numpy(rng.standard_normal((1, channels, octave, octave), np.float32))
        total += octave**-fall * F.interpolate(grid, (size, size), mode="bicubic")[0]
    return (total / total.std()).permute(1, 2, 0).numpy()


@functools.lru_cache(maxsize=8)
def _background(seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, 0])
    base = rng.uniform(45, 150) + rng.uniform(-18, 18, 3)
    slope = rng.uniform(-0.18, 0.18, 2)
    ramp = slope[0] * np.arange(_CANVAS)[:, None] + slope[1] * np.arange(_CANVAS)[None, :]
    grey = rng.uniform(8, 22) * smooth_noise(rng, _CANVAS, 1, rng.uniform(0.4, 1.1))
    tint = rng.uniform(2, 6) * smooth_noise(rng, _CANVAS, 3)
    return (base + (ramp - ramp.mean())[..., None] + grey + tint).astype(np.float32)


def _moved(canvas: np.ndarray, shift: tuple[float, float]) -> np.ndarray:
    """The part of ``canvas`` that the camera sees, between pixels too."""
    x, y = (MOST_SHAKE - s for s in shift)
    left, top = int(np.floor(x)), int(np.floor(y))
    a, b = np.float32(x - left), np.float32(y - top)
    near = canvas[top : top + SIZE + 1, left : left + SIZE + 1]
    rows = near[:-1] * (1 - b) + near[1:] * b
    moved: np.ndarray = rows[:, :-1] * (1 - a) + rows[:, 1:] * a
    return moved


def _shift(look: Look, time: float) -> tuple[float, float]:
    """How far the picture is off its place: a few slow swings."""
    if not look.shake:
        return 0.0, 0.0
    rng = np.random.default_rng([look.seed, 1])
    speed, phase = rng.uniform(0.4, 2.6, (2, 3)), rng.uniform(0, 2 * np.pi, (2, 3))
    swing = look.shake * np.sin(speed * time + phase).mean(1) * 1.4
    return float(swing[0]), float(swing[1])


def _light(look: Look, time: float) -> np.ndarray:
    """What each colour is multiplied by, float32 [3]."""
    rng = np.random.default_rng([look.seed, 2])
    speed, phase, tint = rng.uniform(0.1, 0.5), rng.uniform(0, 2 * np.pi), rng.uniform(-0.3, 0.3, 3)
    return (1 + look.lighting * np.sin(speed * time + phase) * (1 + tint)).astype(np.float32)


Window = tuple[tuple[slice, slice], np.ndarray, np.ndarray]


def _window(shape: Shape, shift: tuple[float, float], reach: float) -> Window:
    """The part of a picture around a thing, and how far right and below of its centre each pixel is."""
    x, y = shape.centre[0] + shift[0], shape.centre[1] + shift[1]
    columns, rows = (slice(max(0, int(v - reach)), min(SIZE, int(v + reach) + 2)) for v in (x, y))
    return (rows, columns), _X[rows, columns] - np.float32(x), _Y[rows, columns] - np.float32(y)


def _glow(drawn: np.ndarray, shape: Shape, shift: tuple[float, float]) -> None:
    where, dx, dy = _window(shape, shift, shape.radius + _REACH)
    outside = np.maximum(np.hypot(dx, dy) - shape.radius - 2, 0)
    alpha = 0.9 * np.exp(-((outside / _HALO) ** 2))[..., None]
    drawn[where] += alpha * (np.array(GLOW, np.float32) - drawn[where])


def _paint(drawn: np.ndarray, look: Look, shape: Shape, shift: tuple[float, float]) -> None:
    where, dx, dy = _window(shape, shift, shape.radius + 2)
    alpha = np.clip(0.5 + distance(shape.shape, dx, dy, shape.radius) / _EDGE, 0, 1)[..., None]
    color, light, grain = _surface(look.seed, shape.color, shape.shape)
    shade = 0.92 - 0.16 * (light[0] * dx + light[1] * dy) / shape.radius
    rows, columns = (np.rint(d + _GRAIN / 2).astype(int).clip(0, _GRAIN - 1) for d in (dy, dx))
    surface = color * shade[..., None] + grain[rows, columns]
    drawn[where] += alpha * (surface - drawn[where])


@functools.lru_cache(maxsize=64)
def _surface(seed: int, color: str, shape: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Colour, where the light comes from, and texture of a thing: no two red ones are quite alike."""
    rng = np.random.default_rng([seed, 3, list(COLORS).index(color), len(shape)])
    base = np.array(COLORS[color], np.float32) + rng.uniform(-14, 14, 3).astype(np.float32)
    angle = np.random.default_rng([seed, 4]).uniform(0, 2 * np.pi)
    grain = rng.uniform(4, 12) * smooth_noise(rng, _GRAIN, 1, 0.4)
    return base, np.array([np.cos(angle), np.sin(angle)], np.float32), grain.astype(np.float32)
