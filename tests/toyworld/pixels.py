"""What the pixels of a frame show, found without asking how they were drawn.

Colours are exact and things stand apart, so each thing is one connected piece of one colour:

    seen(frames)  ->  [Seen(frame=0, color="red", shape="ring", x=31.0, y=70.5, mask=bool [96, 96]), ...]
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from scipy import ndimage

from earlytom_compile.toyworld.world import COLORS, GLOW, SIZE


@dataclass(frozen=True)
class Seen:
    """A piece of one colour; ``x``, ``y``: mean of its pixels."""

    frame: int
    color: str
    shape: str
    x: float
    y: float
    mask: np.ndarray


def pixels_of(color: str, frames: np.ndarray) -> np.ndarray:
    """bool: where uint8 [..., 3] is exactly this colour."""
    return (frames == np.array(COLORS[color], np.uint8)).all(-1)


def seen(frames: np.ndarray) -> list[Seen]:
    """Everything in frames [F, 96, 96, 3] without specks."""
    return [replace(thing, frame=number) for number, frame in enumerate(frames) for thing in _seen_in(frame.tobytes())]


@lru_cache(maxsize=16)  # what stands still shows one picture several times
def _seen_in(picture: bytes) -> tuple[Seen, ...]:
    frame = np.frombuffer(picture, np.uint8).reshape(SIZE, SIZE, 3)
    found = []
    for color in COLORS:
        pieces, _ = ndimage.label(pixels_of(color, frame))
        for piece, box in enumerate(ndimage.find_objects(pieces), 1):
            mask = pieces == piece
            y, x = ndimage.center_of_mass(mask[box])
            found.append(Seen(0, color, shape_of(mask[box]), box[1].start + float(x), box[0].start + float(y), mask))
    return tuple(found)


def glows(frame: np.ndarray, mask: np.ndarray) -> bool:
    """Whether the thing at ``mask`` of uint8 [96, 96, 3] is edged by the colour of a flash all around."""
    edge = ndimage.binary_dilation(mask) & ~mask
    return bool((frame[edge] == np.array(GLOW, np.uint8)).all(-1).mean() > 0.9)


def shape_of(box: np.ndarray) -> str:
    """Of a piece that fills its ``box``: by holes, by how much of it is filled, and by whether it is wider below."""
    if ndimage.binary_fill_holes(box).sum() > box.sum():
        return "ring"
    filled = box.mean()
    if filled > 0.68:
        return "square" if filled > 0.9 else "circle"
    half = len(box) // 2
    return "triangle" if box[-half:].sum() > 1.5 * box[:half].sum() else "cross"
