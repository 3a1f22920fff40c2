"""Frames as a player shows them: phones film lying down and write into the file how to turn the picture.

a picture of 320x240 and a display matrix of 90 degrees     ->     240x320, on its feet
"""

import struct
from collections.abc import Sequence
from typing import Any

import av
import numpy as np


def display_matrix(frame: av.VideoFrame) -> tuple[int, ...] | None:
    """The frame's nine numbers (a b u, c d v, x y w; 16.16 and 2.30 fixed point), from its track or its own headers."""
    found: Any = frame.side_data.get("DISPLAYMATRIX")
    return None if found is None else struct.unpack("=9i", bytes(found))


def upright(picture: np.ndarray, matrix: Sequence[int] | None) -> np.ndarray:
    """uint8 [H, W, 3] turned by quarters and mirrored as ``matrix`` says: [H, W, 3] or [W, H, 3].

    A pixel at (x, y) is shown at (a x + c y, b x + d y). Where neither pair of numbers is zero, as in a turn by 30
    degrees, the nearest quarter is taken, for the corners of the picture would be lost.
    """
    if matrix is None:
        return picture
    a, b, c, d = matrix[0], matrix[1], matrix[3], matrix[4]
    if abs(b) + abs(c) > abs(a) + abs(d):
        picture, across, down = picture.transpose(1, 0, 2), c, b
    else:
        across, down = a, d
    return np.ascontiguousarray(picture[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1])
