"""The picture as one HTML page, which needs nothing but itself: no script, no network, no other file.

    headline, tiles                      what was gained
    questions and both answers
    for each video
        frames, segments, merges         chart.py: one column a sampled frame, one panel a merge layer
    or what was computed             computed.py: a card a sampled frame, what was reused behind a veil
        what is left                     a card for each frame left: its tokens, and what the encoder looks at
        all frames, all places           rows of the heat map; sinks are its bright columns
    options, numbers

The page forbids itself scripts and the network (Content-Security-Policy), whatever a question or a file name holds.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from . import reading
from .chart import flow
from .computed import computed_frames
from .content import Asked, Clip, Fact
from .images import exact, longest_side, photo
from .markup import html, tag
from .style import STYLE

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_SIDE, _FINE_SIDE = 132.0, 168.0  # pixels, of a frame in a card were it a square; the larger one for fine grids
_MATRIX_WIDTH = 1000  # pixels


def write_html(path: str | Path, clips: Sequence[Clip], *, model: str = "", facts: Sequence[Fact] = ()) -> Path:
    """Write :func:`html_page` to ``path``; returns the path. Raises OSError where that fails."""
    path = Path(path)
    # File names may hold bytes that are no text.
    path.write_bytes(html_page(clips, model=model, facts=facts).encode("utf-8", "replace"))
    return path


def html_page(clips: Sequence[Clip], *, model: str = "", facts: Sequence[Fact] = ()) -> str:
    """The page of at least one video; ``model`` is its name for people, ``facts`` are further tiles."""
    title = reading.headline(clips)
    page = tag(
        "html",
        tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="color-scheme", content="light dark"),
            tag("title", f"EarlyTom: {title}"),
            tag("style", STYLE),
        ),
        tag(
            "body",
            tag("header", tag("p", "EarlyTom", class_="brand"), tag("h1", title), _about(clips, model)),
            tag("main", _tiles(clips, facts), _questions(clips), [_video(i, clips) for i in range(len(clips))]),
            tag("footer", tag("p", "Frames are counted from 1, layers from 0. Nothing in this page leaves it.")),
        ),
        lang="en",
    )
    return "<!DOCTYPE html>\n" + html(page) + "\n"


def _about(clips: Sequence[Clip], model: str) -> Element:
    names = [model] if model else []
    names += [clip.name for clip in clips] if len(clips) <= 3 else [f"{len(clips)} videos"]
    parts: list[Element | str] = []
    for name in names:
        parts += [" · "] if parts else []
        parts.append(tag("bdi", name))
    return tag("p", parts, class_="about")


# --- What was gained --------------------------------------------------------------------------------


def _tiles(clips: Sequence[Clip], facts: Sequence[Fact]) -> Element:
    tiles = [*reading.gains(clips), *facts]
    return tag("section", [_tile(fact) for fact in tiles], class_="tiles", aria_label="In short")


def _tile(fact: Fact) -> Element:
    return tag(
        "div",
        tag("p", fact.name, class_="name"),
        tag("p", fact.value, class_="value"),
        tag("p", fact.note, class_="note") if fact.note else None,
        class_="tile",
    )


def _questions(clips: Sequence[Clip]) -> Element | None:
    asked = [(clip, one) for clip in clips for one in clip.asked]
    if not asked:
        return None
    truth, several = any(one.truth is not None for _, one in asked), len(clips) > 1
    headings = ["question", *(["video"] if several else []), *(["truth"] if truth else []), "all tokens", "kept tokens"]
    rows = []
    for clip, one in asked:
        cells = [tag("td", tag("bdi", one.question), class_="question")]
        cells += [tag("td", tag("bdi", clip.name), data_name="video")] if several else []
        cells += [tag("td", _answer(one.truth), data_name="truth")] if truth else []
        cells.append(tag("td", _answer(one.full), data_name="all tokens"))
        cells.append(tag("td", _answer(one.compressed), _verdict(one), data_name="kept tokens"))
        rows.append(tag("tr", cells))
    head = tag("thead", tag("tr", [tag("th", heading, scope="col") for heading in headings]))
    return tag("section", tag("h2", "Questions and answers"), tag("table", head, tag("tbody", rows), class_="asked"))


def _answer(text: str | None) -> Element:
    if text is None:
        return tag("span", "not asked", class_="quiet")
    return tag("bdi", text) if text.strip() else tag("span", "(empty answer)", class_="quiet")


def _verdict(asked: Asked) -> Element | None:
    if asked.agree is None:
        return None
    return tag("span", "same" if asked.agree else "differs", class_="same" if asked.agree else "differs")


# --- One video --------------------------------------------------------------------------------------


def _video(index: int, clips: Sequence[Clip]) -> Element:
    clip, observation = clips[index], clips[index].observation
    longest = longest_side(sum(len(clip.frames) for clip in clips))
    heat = reading.heat_of(observation)
    several = len(clips) > 1
    before, after = observation.tokens
    return tag(
        "section",
        tag("h2", f"Video {index + 1}: ", tag("bdi", clip.name)) if several else None,
        tag(
            "p",
            f"{reading.count(before)} tokens, {reading.count(after)} kept ({reading.share(after, before)}); frames "
            + " → ".join(map(str, observation.frame_counts)),
            class_="about",
        )
        if several
        else None,
        _sources(index, clip, longest),
        _encoded(index, clip),
        _section("What is left", reading.selection_word(observation), _kept_legend(heat), _cards(index, clip, heat)),
        _heat_section(observation, heat),
        _details(clip),
        class_="video",
    )


def _encoded(index: int, clip: Clip) -> Element:
    """What the encoder made of the frames."""
    reused = clip.observation.reuse is not None
    shown = computed_frames(index, clip, _SIDE, _FINE_SIDE) if reused else [flow(index, clip)]
    return _section(*reading.encoded(clip), *shown)


def _section(title: str, text: str, *content: Element | None) -> Element:
    return tag("section", tag("h3", title), tag("p", text, class_="caption"), *content)


def _sources(index: int, clip: Clip, longest: int) -> Element:
    """Every frame once; all that is drawn later refers to it."""
    aspect = clip.width_by_height
    images = [
        tag(
            "image",
            id=f"v{index}f{frame}",
            href=photo(pixels, aspect, longest),
            width="100",
            height=100 / aspect,
            preserveAspectRatio="none",
        )
        for frame, pixels in enumerate(clip.frames)
    ]
    return tag("svg", tag("defs", images), width="0", height="0", class_="sources", aria_hidden="true")


def _kept_legend(heat: reading.Heat | None) -> Element:
    swatches = (("swatch kept", "kept token"), ("swatch veil", "left out"))
    entries = [tag("span", tag("i", class_=kind), text) for kind, text in swatches]
    if heat is not None:
        entries.append(tag("span", "attention received", _scale(heat), class_="scale-entry"))
    return tag("p", entries, class_="legend")


def _scale(heat: reading.Heat) -> Element:
    """The colours of the heat map, with their meaning as multiples of the average."""
    colours = reading.gradient()
    stops = [tag("stop", offset=i / (len(colours) - 1), stop_color=colour) for i, colour in enumerate(colours)]
    width, ticks = 180, heat.ticks
    every = -(-len(ticks) // 6)
    labels = [tag("text", label, x=14 + level * width, y=24, text_anchor="middle") for level, label in ticks[::every]]
    return tag(
        "svg",
        tag("defs", tag("linearGradient", stops, id="heat")),
        tag("rect", x=14, y=2, width=width, height=9, fill="url(#heat)", rx=2),
        labels,
        width=width + 30,
        height=28,
        role="img",
        aria_label="Colours of the heat map, dark for less than the average, bright for more",
        class_="scale",
    )


def _cards(index: int, clip: Clip, heat: reading.Heat | None) -> Element:
    observation = clip.observation
    kept, origins = reading.kept_by_frame(observation), observation.origins()
    cards = []
    for place, (source, tokens) in enumerate(zip(origins, kept, strict=True)):
        pictures = [_frame(index, frame, clip, tokens) for frame, _ in source]
        if heat is not None:
            pictures.append(_heat_picture(clip, heat, place, tokens, source))
        kind = None
        if observation.dynamic is not None:
            kind = tag("span", "dynamic" if observation.dynamic[place] else "static", class_="kind")
        cards.append(
            tag(
                "figure",
                tag("div", pictures, class_="pictures"),
                tag(
                    "figcaption",
                    tag("b", reading.frames_word(source).capitalize()),
                    kind,
                    tag("span", f"{len(tokens)} of {math.prod(observation.grid)} tokens", class_="tokens"),
                    tag("span", reading.merge_word(observation, place), class_="quiet weights"),
                ),
                class_="card merged" if len(source) > 1 else "card",
            )
        )
    return tag("div", cards, class_="cards")


def _outline(clip: Clip, tokens: Sequence[tuple[int, int]]) -> Element | None:
    """A line around the kept tokens of a picture that is 100 wide."""
    if not tokens:
        return None
    (width, height), grid = reading.card_size(clip, _SIDE, _FINE_SIDE), clip.observation.grid
    wide, tall = 100 / grid[1], 100 / clip.width_by_height / grid[0]
    edges = reading.outline(tokens)
    path = "".join(f"M{c0 * wide:.2f} {r0 * tall:.2f}L{c1 * wide:.2f} {r1 * tall:.2f}" for r0, c0, r1, c1 in edges)
    thick = min(max(min(width / grid[1], height / grid[0]) * 0.13, 0.9), 2.0)
    return tag("path", d=path, class_="kept", stroke_width=thick)


def _frame(index: int, frame: int, clip: Clip, tokens: Sequence[tuple[int, int]]) -> Element:
    """A frame behind a veil that has a hole for each kept token."""
    width, height = reading.card_size(clip, _SIDE, _FINE_SIDE)
    tall = 100 / clip.width_by_height
    cells = _cells(tokens, clip.observation.grid, 100, tall)
    return tag(
        "svg",
        tag("use", href=f"#v{index}f{frame}"),
        tag("path", d=f"M0 0H100V{tall:.2f}H0Z{cells}", class_="veil", fill_rule="evenodd"),
        _outline(clip, tokens),
        viewBox=f"0 0 100 {tall:.2f}",
        width=width,
        height=height,
        role="img",
        aria_label=f"Frame {frame + 1}, {_where(tokens)}",
    )


def _heat_picture(
    clip: Clip, heat: reading.Heat, place: int, tokens: Sequence[tuple[int, int]], source: reading.Source
) -> Element:
    width, height = reading.card_size(clip, _SIDE, _FINE_SIDE)
    tall = 100 / clip.width_by_height
    most = heat.times[place].max()
    return tag(
        "svg",
        tag(
            "image",
            href=exact(heat.pixels[place]),
            width="100",
            height=tall,
            preserveAspectRatio="none",
            class_="pixels",
        ),
        _outline(clip, tokens),
        viewBox=f"0 0 100 {tall:.2f}",
        width=width,
        height=height,
        role="img",
        aria_label=f"Attention received in {reading.frames_word(source)}, at most {most:.1f} times the average",
    )


def _cells(tokens: Sequence[tuple[int, int]], grid: tuple[int, int], width: float, height: float) -> str:
    """A path around each token of a picture of that size."""
    tall, wide = height / grid[0], width / grid[1]
    return "".join(f"M{c * wide:.2f} {r * tall:.2f}h{wide:.2f}v{tall:.2f}h{-wide:.2f}z" for r, c in tokens)


def _where(tokens: Sequence[tuple[int, int]]) -> str:
    if not tokens:
        return "no token kept"
    named = ", ".join(f"row {row + 1} column {column + 1}" for row, column in tokens[:12])
    return f"{len(tokens)} kept: {named}{', ...' if len(tokens) > 12 else ''}"


# --- Heat map ---------------------------------------------------------------------------------------


def _heat_section(observation: reading.Observation, heat: reading.Heat | None) -> Element:
    drawing = None if heat is None else tag("div", _matrix(observation, heat), class_="scroll", tabindex="0")
    return _section(reading.LOOKS, reading.attention_word(observation, heat), drawing)


def _matrix(observation: reading.Observation, heat: reading.Heat) -> Element:
    """A row for each frame that is left, a column for each place."""
    frames, height, width = heat.times.shape
    wide, tall = max(_MATRIX_WIDTH / (height * width), 3.0), min(max(260 / frames, 7.0), 24.0)
    left, top = 118.0, 30.0
    rows, columns = tall * frames, wide * height * width
    cells = "".join(
        f"M{left + (r * width + c) * wide:.2f} {top + f * tall:.2f}h{wide:.2f}v{tall:.2f}h{-wide:.2f}z"
        for f, r, c in observation.kept
    )
    picture = tag(
        "image",
        href=exact(heat.pixels.reshape(frames, height * width, 3)),
        x=left,
        y=top,
        width=columns,
        height=rows,
        preserveAspectRatio="none",
        class_="pixels",
    )
    sinks = [
        tag("path", d=f"M{left + (r * width + c + 0.5) * wide:.2f} {top - 2:.2f}l-4 -7h8z", class_="sink")
        for r, c, _ in heat.sinks
    ]
    return tag(
        "svg",
        picture,
        tag("path", d=cells, class_="kept", stroke_width=min(max(min(wide, tall) * 0.1, 0.6), 1.4)),
        _rulers(height, wide * width, left, top, rows),
        sinks,
        _row_names(observation, left, top, tall),
        width=left + columns + 10,
        height=top + rows + 6,
        role="img",
        aria_label=reading.sinks_word(heat),
        class_="matrix",
    )


def _rulers(height: int, step: float, left: float, top: float, rows: float) -> Iterator[Element]:
    """Where each of ``height`` rows of the picture begins, every ``step`` pixels."""
    every = max(1, round(60 / step))
    for row in range(height):
        x = left + row * step
        yield tag("path", d=f"M{x:.2f} {top - 12:.2f}v{rows + 12:.2f}", class_="rule")
        if row % every == 0:
            yield tag("text", f"row {row + 1}", x=x, y=top - 16)


def _row_names(observation: reading.Observation, left: float, top: float, tall: float) -> Iterator[Element]:
    yield tag("text", "frame", x=left - 8, y=top - 16, text_anchor="end")
    every = -(-12 // int(tall))
    for row, source in enumerate(observation.origins()):
        if row % every == 0:
            name = reading.frames_word(source, short=True)
            yield tag("text", name, x=left - 8, y=top + tall * (row + 0.5) + 4, text_anchor="end", class_="number")


# --- Numbers ----------------------------------------------------------------------------------------


def _details(clip: Clip) -> Element:
    observation = clip.observation
    options = [
        tag("tr", tag("th", name, scope="row"), tag("td", value))
        for name, value in reading.options_in_force(observation)
    ]
    return tag(
        "section",
        tag("details", tag("summary", "Options in force"), tag("table", tag("tbody", options), class_="numbers")),
        tag("details", tag("summary", "Similarities, segments and merges in numbers"), list(_numbers(observation)))
        if observation.reuse is None
        else None,
    )


def _numbers(observation: reading.Observation) -> Iterator[Element]:
    for merges, step in enumerate(observation.merges):
        origins = observation.origins(merges)
        into = {part: source for source in step.merged for part, _ in source}
        segment_of = {t: s for s, (first, last) in enumerate(step.segments, start=1) for t in range(first, last + 1)}
        rows = []
        for t, source in enumerate(origins):
            now, smoothed = (step.compared[t - 1], step.smoothed[t - 1]) if t else (float("nan"), float("nan"))
            merged = into.get(t)
            partner = ""
            if merged is not None:
                partner = ", ".join(f"{origins[p][0][0] + 1} ({w:.2f})" for p, w in merged)
            cells = [reading.frames_word(source), str(segment_of[t]), _known(now), _known(smoothed), partner]
            rows.append(tag("tr", [tag("td", cell) for cell in cells]))
        names = ("frame", "segment", "similarity", "moving average", "merges (weights)")
        yield tag(
            "div",
            tag(
                "table",
                tag("caption", f"After layer {step.layer}: {step.frames} frames become {len(step.sources)}"),
                tag("thead", tag("tr", [tag("th", name, scope="col") for name in names])),
                tag("tbody", rows),
                class_="numbers",
            ),
            class_="scroll",
        )


def _known(value: float) -> str:
    return "" if value != value else f"{value:.4f}"
