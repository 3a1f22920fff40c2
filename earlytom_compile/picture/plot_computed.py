"""What was computed of each frame where unchanged patches are reused, for the PNG: computed.py's cards once more."""

from typing import Any

import numpy as np

from . import reading
from .content import Clip

_GAP, _CAPTION = 0.12, 0.3  # inches


def draw_computed(sheet: Any, clip: Clip, side: float, fine_side: float, left: float, right: float) -> None:
    """On plot.py's ``sheet`` between ``left`` and ``right``, inches, below all that is there: every sampled frame,
    dimmed where it was not computed."""
    reuse = clip.observation.reuse
    assert reuse is not None
    width, height = reading.picture_size(clip, reuse.grid, side, fine_side)
    step = max(width, 1.5) + _GAP
    in_row = max(1, int((right - left + _GAP) / step))
    for frame, computed in enumerate(reuse.computed):
        place = frame % in_row
        if frame and not place:
            sheet.y += height + _CAPTION
        x = left + place * step
        sheet.picture(dimmed(clip.frames[frame], computed, reuse.covered), x, sheet.y, width, height, sharp=False)
        own, places = reuse.counts.by_frame[frame], reuse.counts.places
        sheet.text(f"{frame + 1}: {own} of {places} ({own / places:.0%})", x, sheet.y + height + 0.04, 8.5)
    sheet.y += height + _CAPTION + 0.05


def dimmed(pixels: np.ndarray, computed: np.ndarray, covered: tuple[float, float]) -> np.ndarray:
    """uint8 [H, W, 3], washed out but for the patches of bool [rows, columns] that are computed."""
    height, width = pixels.shape[:2]
    rows = np.floor(np.arange(height) * computed.shape[0] / (height * covered[0])).astype(int)
    columns = np.floor(np.arange(width) * computed.shape[1] / (width * covered[1])).astype(int)
    rows, columns = rows[rows < computed.shape[0]], columns[columns < computed.shape[1]]
    clear = np.zeros((height, width), bool)
    clear[: len(rows), : len(columns)] = computed[np.ix_(rows, columns)]
    return reading.veiled(pixels, clear)
