"""What was computed of each frame where unchanged patches are reused, for the page: all others lie behind a veil.

frame 1 [#####]   729 of 729 patches     frame 2 [..#..]   140 of 729 patches     ...
"""

from collections.abc import Iterator, Sequence
from xml.etree.ElementTree import Element

import numpy as np

from ..integrations.observe import ReusedPatches
from . import reading
from .content import Clip
from .markup import tag


def computed_frames(index: int, clip: Clip, side: float, fine_side: float) -> list[Element]:
    """A legend, and a card for each sampled frame of the ``index``-th video, in pictures as large as a square of
    ``side``, or ``fine_side`` where patches are small."""
    reuse = clip.observation.reuse
    assert reuse is not None
    swatches = (("swatch clear", "computed"), ("swatch veil", "taken over from an earlier frame"))
    legend = tag("p", [tag("span", tag("i", class_=kind), text) for kind, text in swatches], class_="legend")
    size = reading.picture_size(clip, reuse.grid, side, fine_side)
    cards = [
        tag(
            "figure",
            tag("div", _frame(index, frame, clip, reuse, computed, size), class_="pictures"),
            tag(
                "figcaption",
                tag("b", f"Frame {frame + 1}"),
                tag("span", reading.computed_word(reuse, frame), class_="computed"),
            ),
            class_="card",
        )
        for frame, computed in enumerate(reuse.computed)
    ]
    return [legend, tag("div", cards, class_="cards")]


def _frame(
    index: int, frame: int, clip: Clip, reuse: ReusedPatches, computed: np.ndarray, size: Sequence[float]
) -> Element:
    """A frame behind a veil that has a hole for each run of computed patches in a row."""
    tall = 100 / clip.width_by_height
    down, across = (share / count for share, count in zip(reuse.covered, reuse.grid, strict=True))
    holes = "".join(
        f"M{100 * across * first:.2f} {tall * down * row:.2f}h{100 * across * length:.2f}v{tall * down:.2f}"
        f"h{-100 * across * length:.2f}z"
        for row, first, length in runs(computed)
    )
    return tag(
        "svg",
        tag("use", href=f"#v{index}f{frame}"),
        tag("path", d=f"M0 0H100V{tall:.2f}H0Z{holes}", class_="veil", fill_rule="evenodd"),
        viewBox=f"0 0 100 {tall:.2f}",
        width=size[0],
        height=size[1],
        role="img",
        aria_label=f"Frame {frame + 1}: {reading.computed_word(reuse, frame)}",
    )


def runs(computed: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(row, first column, length) of each run of True in a row of bool [rows, columns]."""
    edges = np.diff(np.pad(computed, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    for (row, first), (_, end) in zip(np.argwhere(edges == 1), np.argwhere(edges == -1), strict=True):
        yield int(row), int(first), int(end - first)
