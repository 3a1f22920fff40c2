"""The picture as a PNG, by matplotlib (``pip install 'earlytom-compile[plot]'``): what page.py shows, in one image.

matplotlib and not a browser's screenshot of the page: it is what people who look at models have, and servers and
notebooks have no browser. The sheet is 12.8 inches wide and as high as it takes.
"""

import textwrap
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import EarlyTomConfigError
from ..words import counted
from . import reading
from .content import Asked, Clip, Fact
from .plot_computed import draw_computed

_WIDTH, _MARGIN = 12.8, 0.45  # inches
_DPI = 110
_MOST_PIXELS = 60_000  # a side; matplotlib draws no more than 65,535
_LETTERS = 150  # of the body's size in a line
_INK, _SOFT, _FAINT, _BAD = "#17191c", "#5c6370", "#b6bcc6", "#b3261e"
_KEPT, _PAIR, _TAU, _RAW = "#12c4e6", "#d9600f", "#c2255c", "#3b82c4"
_BANDS = ("#e8f0f9", "#f6efe2")
_SIDE, _FINE_SIDE = 1.0, 1.35  # inches, of a frame in a card were it a square; the larger one for fine grids
# For letters that matplotlib's own font lacks; those that are not installed are left out.
_MORE_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Micro Hei", "Noto Sans Arabic", "Noto Sans", "Arial")

Draw = Callable[[Any], Any]
"""Draws something on matplotlib's axes, whose units are inches from the top left corner."""


def require_matplotlib() -> None:
    """Raise :class:`EarlyTomConfigError` where no PNG can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise EarlyTomConfigError(
            "png needs matplotlib: pip install 'earlytom-compile[plot]', or write the page, which needs nothing (html)."
        ) from error


def write_png(path: str | Path, clips: Sequence[Clip], *, model: str = "", facts: Sequence[Fact] = ()) -> Path:
    """Write the picture of at least one video to ``path``; returns the path. Arguments as those of the page.

    Raises :class:`EarlyTomConfigError` without matplotlib, OSError where the file cannot be written.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import get_font_names

    sheet = _Sheet()
    _head(sheet, clips, model, facts)
    for index, clip in enumerate(clips):
        _video(sheet, clip, f"Video {index + 1}: {clip.name}" if len(clips) > 1 else "")
    installed = set(get_font_names())
    fonts = ["DejaVu Sans", *(name for name in _MORE_FONTS if name in installed)]
    # A question about $x$ and $y$ is no formula.
    with matplotlib.rc_context({"font.family": fonts, "text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        height = sheet.y + _MARGIN
        dpi = min(_DPI, _MOST_PIXELS / max(_WIDTH, height))
        figure = Figure(figsize=(_WIDTH, height), dpi=dpi, facecolor="#ffffff")
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.axis("off")
        for draw in sheet.drawings:
            draw(axes)
        axes.set(xlim=(0, _WIDTH), ylim=(height, 0), aspect="auto")
        figure.savefig(path, format="png")
    return Path(path)


class _Sheet:
    """Collects what is to be drawn from the top down, since the height is known at the end only."""

    def __init__(self) -> None:
        self.y = _MARGIN
        self.drawings: list[Draw] = []

    def text(self, text: str, x: float, y: float, size: float = 10, color: str = _INK, **options: Any) -> None:
        shown = "".join(c if c == "\n" or unicodedata.category(c)[0] != "C" else " " for c in text)
        given = {"fontsize": size, "color": color, "va": "top", **options}
        self.drawings.append(lambda axes: axes.text(x, y, shown, **given))

    def paragraph(self, text: str, size: float = 10, color: str = _INK, **options: Any) -> None:
        """Text over the whole width, below all that is there."""
        lines = [
            line for part in text.splitlines() for line in textwrap.wrap(part, round(_LETTERS * 10 / size)) or [""]
        ]
        for line in lines:
            self.text(line, _MARGIN, self.y, size, color, **options)
            self.y += size * 1.45 / 72
        self.y += 0.06

    def picture(self, pixels: np.ndarray, x: float, y: float, width: float, height: float, *, sharp: bool) -> None:
        how = {"interpolation": "nearest" if sharp else "antialiased", "aspect": "auto"}
        self.drawings.append(lambda axes: axes.imshow(pixels, extent=(x, x + width, y + height, y), **how))

    def box(self, x: float, y: float, width: float, height: float, **options: Any) -> None:
        from matplotlib.patches import Rectangle

        given = {"facecolor": "none", "linewidth": 0, **options}
        self.drawings.append(lambda axes: axes.add_patch(Rectangle((x, y), width, height, **given)))

    def line(self, x: Sequence[float], y: Sequence[float], **options: Any) -> None:
        self.drawings.append(lambda axes: axes.plot(list(x), list(y), **options))

    def lines(self, lines: Sequence[Sequence[tuple[float, float]]], **options: Any) -> None:
        from matplotlib.collections import LineCollection

        self.drawings.append(lambda axes: axes.add_collection(LineCollection(lines, **options)))


def _head(sheet: _Sheet, clips: Sequence[Clip], model: str, facts: Sequence[Fact]) -> None:
    sheet.paragraph("EarlyTom", 11, _PAIR, fontweight="bold")
    sheet.paragraph(reading.headline(clips), 21, fontweight="bold")
    names = [model] if model else []
    names += [clip.name for clip in clips] if len(clips) <= 3 else [f"{len(clips)} videos"]
    sheet.paragraph(" · ".join(names), 10.5, _SOFT)
    sheet.y += 0.12
    tiles = [*reading.gains(clips), *facts]
    in_row = 4
    for first in range(0, len(tiles), in_row):
        for place, fact in enumerate(tiles[first : first + in_row]):
            x = _MARGIN + place * (_WIDTH - 2 * _MARGIN) / in_row
            sheet.text(fact.name, x, sheet.y, 9.5, _SOFT)
            sheet.text(fact.value, x, sheet.y + 0.19, 16, fontweight="bold")
            sheet.text(textwrap.fill(fact.note, 38), x, sheet.y + 0.5, 9.5, _SOFT)
        sheet.y += 0.95
    for clip in clips:
        for asked in clip.asked:
            _question(sheet, asked, clip.name if len(clips) > 1 else "")
    sheet.y += 0.1


def _question(sheet: _Sheet, asked: Asked, video: str) -> None:
    sheet.paragraph(f"{asked.question}{f'   ({video})' if video else ''}", 10.5, fontweight="bold")
    said: list[tuple[str, str | None]] = [("truth", asked.truth)] if asked.truth is not None else []
    said += [("all tokens", asked.full), ("kept tokens", asked.compressed)]
    verdict = {True: "   (same)", False: "   (differs)", None: ""}[asked.agree]
    shown = [f"{name}: {'not asked' if text is None else text.strip() or '(empty answer)'}" for name, text in said]
    sheet.paragraph("      ".join(shown) + verdict, 10)


# --- One video --------------------------------------------------------------------------------------


def _video(sheet: _Sheet, clip: Clip, title: str) -> None:
    observation = clip.observation
    heat = reading.heat_of(observation)
    if title:
        sheet.y += 0.15
        sheet.paragraph(title, 15, fontweight="bold")
    _part(sheet, *reading.encoded(clip))
    if observation.reuse is not None:
        draw_computed(sheet, clip, _SIDE, _FINE_SIDE, _MARGIN, _WIDTH - _MARGIN)
    else:
        if observation.merges:
            _legend(sheet)
        _Flow(sheet, clip).draw()
    _part(sheet, reading.LEFT, reading.selection_word(observation))
    _cards(sheet, clip, heat)
    _part(sheet, reading.LOOKS, reading.attention_word(observation, heat))
    if heat is not None:
        _scale(sheet, heat)
        _matrix(sheet, observation, heat)
    sheet.y += 0.1
    options = ", ".join(f"{name} {value}" for name, value in reading.options_in_force(observation))
    sheet.paragraph(f"Options in force: {options}. Frames are counted from 1, layers from 0.", 9.5, _SOFT)


def _part(sheet: _Sheet, title: str, text: str) -> None:
    sheet.y += 0.12
    sheet.paragraph(title, 13, fontweight="bold")
    sheet.paragraph(text, 9.5, _SOFT)
    sheet.y += 0.05


def _legend(sheet: _Sheet) -> None:
    x = _MARGIN
    for color, name in (
        (_RAW, "similarity"),
        (_INK, "moving average (Eq. 1)"),
        (_TAU, "threshold, and where it ends a segment"),
        (_PAIR, "two frames become one"),
        (_KEPT, "tokens kept"),
    ):
        sheet.box(x, sheet.y + 0.03, 0.12, 0.12, facecolor=color)
        sheet.text(name, x + 0.19, sheet.y + 0.01, 9, _SOFT)
        x += 0.19 + 0.078 * len(name) + 0.25
    sheet.y += 0.3


class _Flow:
    """Frames, a panel for each merge layer, and how many tokens stay of each frame; a column a sampled frame."""

    def __init__(self, sheet: _Sheet, clip: Clip) -> None:
        self.sheet, self.clip, self.observation = sheet, clip, clip.observation
        self.left, self.right = _MARGIN + 0.4, _WIDTH - _MARGIN - 0.85
        self.column = min((self.right - self.left) / clip.observation.frames, 1.15)
        self.right = self.left + self.column * clip.observation.frames

    def x(self, place: float) -> float:
        return self.left + (place + 0.5) * self.column

    def draw(self) -> None:
        self._thumbnails()
        for merges, step in enumerate(self.observation.merges):
            before, after = (reading.places(self.observation, n) for n in (merges, merges + 1))
            self._panel(step, before)
            self._links(step, before, after)
        self._kept()

    def _thumbnails(self) -> None:
        aspect = self.clip.width_by_height
        width = min(self.column * 0.93, 1.0 * max(aspect, 0.4))
        size = 9 if self.column > 0.3 else 6
        for frame, pixels in enumerate(self.clip.frames):
            x = self.x(frame)
            self.sheet.picture(pixels, x - width / 2, self.sheet.y, width, width / aspect, sharp=False)
            self.sheet.text(str(frame + 1), x, self.sheet.y + width / aspect + 0.04, size, _SOFT, ha="center")
        self.sheet.y += width / aspect + 0.3

    def _panel(self, step: reading.MergeStep, places: Sequence[float]) -> None:
        sheet, tau = self.sheet, self.observation.config.tau_seg
        low, high = reading.value_range(step, tau)
        number = counted(len(step.segments), "segment")
        title = f"After layer {step.layer} of {self.observation.layers}: {number} of {step.frames} frames"
        sheet.text(title, self.left - 0.35, sheet.y, 10, fontweight="bold")
        top, height = sheet.y + 0.22, 1.05

        def y(value: float) -> float:
            return top + height * (high - value) / (high - low)

        for nth, edges in enumerate(reading.borders(step, places)):
            left, right = (self.left + (edge + 0.5) * self.column for edge in edges)
            sheet.box(left, top, right - left, height, facecolor=_BANDS[nth % 2])
            if nth:
                sheet.line((left, left), (top, top + height), color=_SOFT, linewidth=0.8, linestyle=":")
        for value in (low, high):
            sheet.text(f"{value:g}", self.left - 0.06, y(value), 8.5, _SOFT, ha="right", va="center")
        heads = [first for first, _ in step.segments]
        for run in reading.curve(step.compared, places):
            points = [self.x(x) for x, _ in run], [y(value) for _, value in run]
            sheet.line(*points, color=_RAW, linewidth=1.0, marker="o", markersize=4.5, markerfacecolor="white")
        for run in reading.curve(step.smoothed, places, heads):
            sheet.line([self.x(x) for x, _ in run], [y(v) for _, v in run], color=_INK, linewidth=1.4)
            cuts = [(self.x(x), y(v)) for x, v in run if v < tau]
            sheet.line([x for x, _ in cuts], [v for _, v in cuts], color=_TAU, linestyle="", marker="o", markersize=5)
        sheet.line((self.left, self.right), (y(tau), y(tau)), color=_TAU, linewidth=1.2, linestyle="--")
        sheet.text(f"tau_seg {tau:g}", self.right + 0.07, y(tau), 9, _TAU, va="center")
        sheet.y = top + height

    def _links(self, step: reading.MergeStep, before: Sequence[float], after: Sequence[float]) -> None:
        sheet, lost = self.sheet, set(range(step.frames))
        top, bottom = sheet.y + 0.07, sheet.y + 0.38
        for source, place in zip(step.sources, after, strict=True):
            pair = len(source) > 1
            for part, _ in source:
                lost.discard(part)
                ends = (self.x(before[part]), self.x(place)), (top, bottom)
                sheet.line(*ends, color=_PAIR if pair else _FAINT, linewidth=1.8 if pair else 1.0)
            size, color = (7, _PAIR) if pair else (4, _SOFT)
            sheet.line((self.x(place),), (bottom,), marker="o", markersize=size, color=color)
        for part in lost:
            sheet.line((self.x(before[part]),), (top + 0.03,), marker="x", color=_BAD, markersize=6)
        said = f"{step.frames} → {len(step.sources)}" if step.merged or lost else "none merge"
        sheet.text(said, self.right + 0.07, (top + bottom) / 2, 9, fontweight="bold", va="center")
        sheet.y = bottom + 0.2

    def _kept(self) -> None:
        sheet = self.sheet
        kept = [len(tokens) for tokens in reading.kept_by_frame(self.observation)]
        sheet.text("Tokens kept of each frame", self.left - 0.35, sheet.y, 10, fontweight="bold")
        base, height, width = sheet.y + 0.85, 0.4, min(0.6 * self.column, 0.26)
        for tokens, place in zip(kept, reading.places(self.observation, len(self.observation.merges)), strict=True):
            tall = height * tokens / max(*kept, 1)
            sheet.box(self.x(place) - width / 2, base - tall, width, tall, facecolor=_KEPT)
            size = 9 if self.column > 0.3 else 6.5
            sheet.text(str(tokens), self.x(place), base - tall - 0.03, size, ha="center", va="bottom")
        sheet.line((self.left, self.right), (base, base), color=_SOFT, linewidth=0.8)
        sheet.text(f"{len(self.observation.kept)} in all", self.right + 0.07, base, 9, fontweight="bold", va="center")
        sheet.y = base + 0.15


def _cards(sheet: _Sheet, clip: Clip, heat: reading.Heat | None) -> None:
    """Each frame that is left: the frames it is made of behind a veil with a hole for each kept token, and its heat."""
    observation = clip.observation
    width, height = reading.card_size(clip, _SIDE, _FINE_SIDE)
    in_row = max(1, int((_WIDTH - 2 * _MARGIN) / (width + 0.06)))
    x = _MARGIN
    kept = reading.kept_by_frame(observation)
    for place, (source, tokens) in enumerate(zip(observation.origins(), kept, strict=True)):
        pictures = [_veiled(clip.frames[frame], tokens, observation.grid) for frame, _ in source[: in_row - 1]]
        if heat is not None:
            pictures.append(heat.pixels[place])
        needed = max(len(pictures) * (width + 0.06), 1.75) + 0.2
        if x > _MARGIN and x + needed > _WIDTH - _MARGIN + 0.2:
            x, sheet.y = _MARGIN, sheet.y + height + 0.62
        for nth, pixels in enumerate(pictures):
            at = x + nth * (width + 0.06), sheet.y
            sheet.picture(pixels, *at, width, height, sharp=nth == len(source))
            _outlines(sheet, tokens, observation.grid, *at, width, height)
        kind = ""
        if observation.dynamic is not None:
            kind = ", dynamic" if observation.dynamic[place] else ", static"
        title = reading.frames_word(source).capitalize() + kind
        sheet.text(title, x, sheet.y + height + 0.04, 9, fontweight="bold")
        layers = (reading.merge_word(observation, place) or "").split(":")[0]
        sheet.text(
            f"{counted(len(tokens), 'token')}{f', merged {layers}' if layers else ''}",
            x,
            sheet.y + height + 0.21,
            8.5,
            _SOFT,
        )
        x += max(needed, 0.083 * len(title) + 0.25)
    sheet.y += height + 0.6


def _veiled(pixels: np.ndarray, tokens: Sequence[tuple[int, int]], grid: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3], washed out but for the tokens."""
    height, width = pixels.shape[:2]
    shown = np.zeros(grid, bool)
    for place in tokens:
        shown[place] = True
    rows, columns = np.arange(height) * grid[0] // height, np.arange(width) * grid[1] // width
    return reading.veiled(pixels, shown[rows[:, None], columns[None, :]])


def _outlines(
    sheet: _Sheet,
    tokens: Sequence[tuple[int, int]],
    grid: tuple[int, int],
    x: float,
    y: float,
    width: float,
    height: float,
) -> None:
    """A line around the kept tokens of a picture."""
    wide, tall = width / grid[1], height / grid[0]
    edges = reading.outline(tokens)
    lines = [[(x + c0 * wide, y + r0 * tall), (x + c1 * wide, y + r1 * tall)] for r0, c0, r1, c1 in edges]
    sheet.lines(lines, color=_KEPT, linewidth=min(max(9 * min(wide, tall), 0.5), 1.3))


def _scale(sheet: _Sheet, heat: reading.Heat) -> None:
    ramp = reading.colours(np.linspace(0, 1, 128))[None]
    sheet.picture(ramp, _MARGIN, sheet.y, 2.4, 0.1, sharp=True)
    ticks = heat.ticks
    for level, label in ticks[:: -(-len(ticks) // 6)]:
        sheet.text(label, _MARGIN + 2.4 * level, sheet.y + 0.13, 8.5, _SOFT, ha="center")
    sheet.text("of the average attention", _MARGIN + 2.6, sheet.y - 0.02, 9, _SOFT)
    sheet.y += 0.42


def _matrix(sheet: _Sheet, observation: reading.Observation, heat: reading.Heat) -> None:
    frames, rows, columns = heat.times.shape
    left = _MARGIN + 1.0
    width, tall = _WIDTH - _MARGIN - left, min(max(2.6 / frames, 0.06), 0.24)
    wide = width / (rows * columns)
    for row, column, _ in heat.sinks:
        x = left + (row * columns + column + 0.5) * wide
        sheet.line((x,), (sheet.y + 0.05,), marker="v", color=_PAIR, markersize=5)
    top = sheet.y + 0.12
    sheet.picture(heat.pixels.reshape(frames, -1, 3), left, top, width, tall * frames, sharp=True)
    squares = []
    for frame, row, column in observation.kept:
        x, y = left + (row * columns + column) * wide, top + frame * tall
        squares.append([(x, y), (x + wide, y), (x + wide, y + tall), (x, y + tall), (x, y)])
    sheet.lines(squares, color=_KEPT, linewidth=min(max(5 * min(wide, tall), 0.35), 0.8))
    every = max(1, round(0.13 / tall + 0.49))
    for place, source in enumerate(observation.origins()):
        if place % every == 0:
            name = reading.frames_word(source, short=True)
            sheet.text(name, left - 0.07, top + (place + 0.5) * tall, 8, _SOFT, ha="right", va="center")
    sheet.y = top + frames * tall + 0.1
