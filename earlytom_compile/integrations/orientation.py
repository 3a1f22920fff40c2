"""Frames as a player shows them: phones film lying down and write into the file how to turn the picture.

a picture of 320x240 and a display matrix of 90 degrees     ->     240x320, on its feet
"""

import re
import struct
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.filter import Graph


def display_matrix(frame: av.VideoFrame) -> tuple[int, ...] | None:
    """The frame's nine numbers (a b u, c d v, x y w; 16.16 and 2.30 fixed point), from its track or its own headers."""
    found: Any = _side_data(frame).get("DISPLAYMATRIX")
    return None if found is None else struct.unpack("=9i", bytes(found))


def _side_data(frame: av.VideoFrame) -> Mapping[Any, Any]:
    """What FFmpeg says beside the picture. Of a frame with a kind that PyAV has no name for (18.1: what photos have of
    their camera, EXIF), PyAV tells nothing at all, so such kinds are taken away from it."""
    while True:
        try:
            return frame.side_data
        except ValueError as error:
            unknown = re.match(r"(\d+) is not a valid", str(error))
            if unknown is None:
                raise
            frame = _without(frame, kind=int(unknown[1]))


def _without(frame: av.VideoFrame, kind: int) -> av.VideoFrame:
    graph = Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 1)
    )
    removal = graph.add("sidedata", f"mode=delete:type={kind}")
    graph.link_nodes(source, removal, graph.add("buffersink")).configure()
    graph.vpush(frame)
    return graph.vpull()


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
