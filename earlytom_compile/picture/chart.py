"""Frames, segments and merges as one drawing: a column for each sampled frame, a panel for each merge layer.

frames       [1] [2] [3] [4] | [5] [6]
layer 6      similarity, its moving average, tau_seg; a shade for each segment
merges        o   \\-o-/   o  |  o   o
layer 21     ...
tokens kept   3     2     3  |  3   2
"""

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from ..words import counted
from . import reading
from .content import Clip
from .markup import tag
from .reading import MergeStep

_WIDTH = 1060.0  # pixels, of a page 1200 wide
_NARROWEST, _WIDEST = 28.0, 125.0  # of a column
_LEFT, _RIGHT = 46.0, 88.0
_PANEL, _LINKS, _TITLE = 116.0, 54.0, 26.0


class _Sheet:
    """Collects elements from the top down; ``x`` gives the pixel of a column."""

    def __init__(self, frames: int) -> None:
        self.column = min(max((_WIDTH - _LEFT - _RIGHT) / frames, _NARROWEST), _WIDEST)
        self.width = _LEFT + self.column * frames + _RIGHT
        self.y = 0.0
        self.elements: list[Element] = []

    def x(self, place: float) -> float:
        return _LEFT + (place + 0.5) * self.column

    def add(self, *elements: Element) -> None:
        self.elements += elements

    def text(self, text: str, x: float, y: float, **attributes: object) -> None:
        self.add(tag("text", text, x=x, y=y, **attributes))


def flow(index: int, clip: Clip) -> Element:
    """The drawing, in a box that scrolls sideways where it is wider than the screen."""
    observation = clip.observation
    sheet = _Sheet(observation.frames)
    _thumbnails(sheet, index, clip)
    for merges, step in enumerate(observation.merges):
        _panel(sheet, step, reading.places(observation, merges), clip)
        _links(sheet, step, reading.places(observation, merges), reading.places(observation, merges + 1), merges, clip)
    _kept_bars(sheet, clip)
    drawing = tag(
        "svg",
        sheet.elements,
        width=sheet.width,
        height=sheet.y,
        viewBox=f"0 0 {sheet.width:.2f} {sheet.y:.2f}",
        class_="flow",
        role="img",
        aria_label=_in_words(clip),
    )
    return tag("div", _legend(clip), tag("div", drawing, class_="scroll", tabindex="0"))


def _in_words(clip: Clip) -> str:
    observation = clip.observation
    parts = [f"{observation.frames} sampled frames"]
    for step in observation.merges:
        parts.append(
            f"after layer {step.layer} {len(step.segments)} segment(s), {len(step.merged)} pair(s) merge and "
            f"{len(step.sources)} frames are left"
        )
    return "; ".join(parts) + "."


def _legend(clip: Clip) -> Element | None:
    observation = clip.observation
    if not observation.merges:
        return None
    tau = f"threshold tau_seg = {observation.config.tau_seg:g}"
    entries = [
        ("line raw", f"similarity to the {reading.compared_with(observation)}"),
        ("line smooth", "moving average (Eq. 1)"),
        ("line tau", tau),
        ("swatch band", "segments, in turns"),
        ("swatch pair", "two frames become one"),
        *([("cross", "frame left out")] if observation.config.variant == "released" else []),
    ]
    return tag("p", [tag("span", tag("i", class_=kind), text) for kind, text in entries], class_="legend")


def _thumbnails(sheet: _Sheet, index: int, clip: Clip) -> None:
    aspect = clip.width_by_height
    width = min(sheet.column - 6, 96 * max(aspect, 0.4))
    height = width / aspect
    for frame in range(len(clip.frames)):
        place = f"translate({sheet.x(frame) - width / 2:.2f} 2) scale({width / 100:.4f})"
        sheet.add(tag("use", href=f"#v{index}f{frame}", transform=place))
        sheet.text(str(frame + 1), sheet.x(frame), height + 17, text_anchor="middle", class_="number")
    sheet.y = height + 26


def _panel(sheet: _Sheet, step: MergeStep, places: Sequence[float], clip: Clip) -> None:
    tau = clip.observation.config.tau_seg
    low, high = reading.value_range(step, tau)
    segments = counted(len(step.segments), "segment")
    title = f"After layer {step.layer} of {clip.observation.layers}: {segments} of {step.frames} frames"
    sheet.text(title, _LEFT - 40, sheet.y + 17, class_="title")
    top = sheet.y + _TITLE

    def y(value: float) -> float:
        return top + _PANEL * (high - value) / (high - low)

    for number, (left, right) in enumerate(reading.borders(step, places)):
        first, last = step.segments[number]
        alike = f"to merge, two must be {step.thresholds[number]:.3f} alike"
        named = f"Segment {number + 1}: {last - first + 1} frames; {alike}"
        left, right = (_LEFT + (edge + 0.5) * sheet.column for edge in (left, right))
        place = {"x": left, "y": top, "width": right - left, "height": _PANEL}
        sheet.add(tag("rect", tag("title", named), **place, class_=f"band b{number % 2}"))
        if number:
            sheet.add(tag("path", d=f"M{left:.2f} {top:.2f}v{_PANEL:.2f}", class_="cut"))
    _axis(sheet, low, high, y, top)
    for values, kind, breaks in (
        (step.compared, "raw", ()),
        (step.smoothed, "smooth", [first for first, _ in step.segments]),
    ):
        for run in reading.curve(values, places, breaks):
            points = [(sheet.x(x), y(value), value) for x, value in run]
            sheet.add(tag("polyline", points=" ".join(f"{a:.2f},{b:.2f}" for a, b, _ in points), class_=kind))
            for a, b, value in points:
                below = kind == "smooth" and value < tau
                dot = {"cx": a, "cy": b, "r": 4 if below else 3, "class_": "below" if below else kind}
                sheet.add(tag("circle", tag("title", f"{value:.4f}"), **dot))
    right = sheet.width - _RIGHT
    sheet.add(tag("path", d=f"M{_LEFT:.2f} {y(tau):.2f}H{right:.2f}", class_="tau"))
    sheet.text(f"τ {tau:g}", right + 6, y(tau) + 4, class_="tau-label")
    sheet.y = top + _PANEL


def _axis(sheet: _Sheet, low: float, high: float, y, top: float) -> None:  # type: ignore[no-untyped-def]
    tenths = round((high - low) * 10)
    every = max(1, -(-tenths // 5))
    for tenth in range(round(high * 10), round(low * 10) - 1, -every):
        value = tenth / 10
        sheet.add(tag("path", d=f"M{_LEFT:.2f} {y(value):.2f}H{sheet.width - _RIGHT:.2f}", class_="grid"))
        sheet.text(f"{value:g}", _LEFT - 6, y(value) + 4, text_anchor="end", class_="number")


def _links(
    sheet: _Sheet, step: MergeStep, before: Sequence[float], after: Sequence[float], merges: int, clip: Clip
) -> None:
    """Which frames become which: straight lines, and a dot in colour for two in one."""
    top, bottom = sheet.y + 8, sheet.y + _LINKS - 14
    origins, left_over = clip.observation.origins(merges), set(range(step.frames))
    for source, x in zip(step.sources, after, strict=True):
        kind = "pair" if len(source) > 1 else "single"
        for part, _ in source:
            left_over.discard(part)
            line = f"M{sheet.x(before[part]):.2f} {top:.2f}L{sheet.x(x):.2f} {bottom:.2f}"
            sheet.add(tag("path", d=line, class_=f"link {kind}"))
        named = "; ".join(f"{weight:.0%} of {reading.frames_word(origins[part])}" for part, weight in source)
        size = 6 if kind == "pair" else 4
        sheet.add(tag("circle", tag("title", named), cx=sheet.x(x), cy=bottom, r=size, class_=kind))
    for part in sorted(left_over):
        x = sheet.x(before[part])
        cross = f"M{x - 4:.2f} {top - 2:.2f}l8 8m0 -8l-8 8"
        named = f"{reading.frames_word(origins[part])}: left out"
        sheet.add(tag("path", tag("title", named), d=cross, class_="dropped"))
    pairs = len(step.merged)
    said = f"{step.frames} → {len(step.sources)}" if pairs or left_over else "none merge"
    sheet.text(said, sheet.width - _RIGHT + 6, (top + bottom) / 2 + 4, class_="number strong")
    sheet.y += _LINKS


def _kept_bars(sheet: _Sheet, clip: Clip) -> None:
    """How many tokens each frame that is left keeps."""
    observation = clip.observation
    kept = [len(tokens) for tokens in reading.kept_by_frame(observation)]
    sheet.text("Tokens kept of each frame", _LEFT - 40, sheet.y + 17, class_="title")
    top, height = sheet.y + _TITLE + 12, 44.0
    width = min(0.6 * sheet.column, 26.0)
    for tokens, place in zip(kept, reading.places(observation, len(observation.merges)), strict=True):
        tall = height * tokens / max(*kept, 1)
        x, y = sheet.x(place), top + height - tall
        sheet.add(tag("rect", x=x - width / 2, y=y, width=width, height=tall, rx=2, class_="bar"))
        sheet.text(str(tokens), x, y - 4, text_anchor="middle", class_="number strong")
    sheet.add(tag("path", d=f"M{_LEFT:.2f} {top + height:.2f}H{sheet.width - _RIGHT:.2f}", class_="base"))
    sheet.text(f"{len(observation.kept)} in all", sheet.width - _RIGHT + 6, top + height, class_="number strong")
    sheet.y = top + height + 8
