"""The page shows what was observed and nothing that a user wrote is more than text, to a parser and to a browser."""

import base64
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import av
import numpy as np
import pytest
from browser import dom, needs_chromium, screenshot
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from made_up import observation, pictures

from earlytom_compile import EarlyTomConfigError
from earlytom_compile.picture import Asked, Clip, Fact, html_page, reading, write_html
from earlytom_compile.picture.images import exact, longest_side, photo
from earlytom_compile.picture.markup import html, tag

HOSTILE = (
    "<script>document.title='gone'</script>",
    "</style></svg></title><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" x="',
    "'><svg/onload=alert(1)>",
    "&lt;b&gt; &amp; <!-- ]]> -->",
    "javascript:alert(1) https://example.com/a.png",
)
VOID = {"meta", "link", "br", "img", "input", "hr"}
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "header", "main", "footer", "section", "div", "p", "h1", "h2"),
    *("h3", "bdi", "span", "i", "b", "table", "thead", "tbody", "tr", "th", "td", "caption", "figure", "figcaption"),
    *("details", "summary", "svg", "defs", "image", "use", "path", "rect", "circle", "polyline", "text", "stop"),
    "lineargradient",
}


class Page(HTMLParser):
    """Elements, their attributes and the text of a page, as the standard library's parser sees them."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self._open = [], [], []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self._open.append(name)

    def handle_endtag(self, name):
        assert self._open.pop() == name

    def handle_data(self, data):
        if "style" not in self._open:
            self.texts.append(data)

    def of(self, name, **attributes):
        wanted = {key.rstrip("_"): value for key, value in attributes.items()}
        return [given for n, given in self.elements if n == name and wanted.items() <= given.items()]


@st.composite
def observations(draw):
    frames = draw(st.integers(1, 14))
    return observation(
        frames,
        (draw(st.integers(1, 5)), draw(st.integers(1, 5))),
        seed=draw(st.integers(0, 2**31)),
        cuts=draw(st.integers(0, 4)),
        layers=draw(st.sampled_from([(), (1,), (1, 6), (0, 3, 5)])),
        sinks=draw(st.integers(0, 1)),
        variant=draw(st.sampled_from(["paper", "released", "plus"])),
        retain_ratio=draw(st.sampled_from([0.1, 0.5, 1.0])),
        tau_seg=draw(st.sampled_from([0.3, 0.6, 0.95])),
        max_window=draw(st.sampled_from([None, 3])),
    )


# Other control characters are no text in HTML.
letters = st.characters(codec="utf-8", exclude_categories=["Cc"], include_characters="\n\t")
texts = st.one_of(st.sampled_from(HOSTILE), st.text(letters, max_size=30))
answers = st.one_of(st.none(), texts)


@st.composite
def clips(draw):
    seen = draw(observations())
    asked = [Asked(*draw(st.tuples(texts, answers, answers, answers))) for _ in range(draw(st.integers(0, 3)))]
    aspect = draw(st.sampled_from([None, 16 / 9, 9 / 16]))
    return Clip(draw(texts), pictures(seen.frames, height=32, width=32), seen, tuple(asked), aspect)


@examples(15)
@given(films=st.lists(clips(), min_size=1, max_size=2), model=texts, value=texts)
def test_what_users_wrote_is_text_and_the_page_needs_nothing_else(films, model, value):
    page = Page(html_page(films, model=model, facts=[Fact(value, value, value)]))
    assert {name for name, _ in page.elements} <= TAGS
    written = [model, value, *(clip.name for clip in films)]
    for clip in films:
        for asked in clip.asked:
            written += filter(None, (asked.question, asked.full, asked.compressed, asked.truth))
    there = Counter(page.texts)
    for text in written:
        assert not text.strip() or there[text], text
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    for _, attributes in page.elements:
        assert not any(name.startswith("on") or name in ("src", "style") for name in attributes)
        href = attributes.get("href", "#heat")
        assert href.startswith("data:image/") or href[1:] in ids or href == "#heat"
    (policy,) = page.of("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'; img-src data:")


@examples(15)
@given(clips())
def test_the_page_shows_what_was_observed(clip):
    seen, page = clip.observation, Page(html_page([clip]))
    of_frame = {}
    origins = seen.origins()
    for frame, row, column in seen.kept:
        of_frame.setdefault(frame, set()).add((row, column))
    holes = [a["d"].split("Z", 1)[1] for a in page.of("path", class_="veil")]
    expected = [of_frame.get(place, set()) for place, source in enumerate(origins) for _ in source]
    assert [cells_of(path, seen.grid, clip.width_by_height) for path in holes] == expected
    used = [a["href"] for a in page.of("use")]
    drawn = [f"#v0f{frame}" for source in origins for frame, _ in source]
    assert used == [f"#v0f{frame}" for frame in range(seen.frames)] + drawn
    pairs = [source for step in seen.merges for source in step.sources if len(source) > 1]
    assert len(page.of("circle", class_="pair")) == len(pairs)
    singles = [source for step in seen.merges for source in step.sources if len(source) == 1]
    assert len(page.of("circle", class_="single")) == len(singles)
    assert len(page.of("path", class_="link pair")) == sum(map(len, pairs))
    lost = sum(step.frames - len({part for source in step.sources for part, _ in source}) for step in seen.merges)
    assert len(page.of("path", class_="dropped")) == lost
    bands = [a for kind in ("band b0", "band b1") for a in page.of("rect", class_=kind)]
    assert len(bands) == sum(len(step.segments) for step in seen.merges)
    assert len(page.of("path", class_="tau")) == len(seen.merges)
    smoothed = [value for step in seen.merges for value in step.smoothed if value == value]
    below = [value for value in smoothed if value < seen.config.tau_seg]
    assert len(page.of("circle", class_="below")) == len(below)
    assert len(page.of("circle", class_="smooth")) == len(smoothed) - len(below)
    assert {f"{value:.4f}" for value in smoothed} <= set(page.texts)
    heats = [decoded(a["href"]) for a in page.of("image", class_="pixels")]
    *of_frames, matrix = heats
    assert np.array_equal(np.concatenate([x.reshape(1, -1, 3) for x in of_frames]), matrix)
    assert len(of_frames) == len(origins)


def cells_of(path, grid, aspect):
    """(row, column) of each box of a path on a picture that is 100 wide."""
    boxes = re.findall(r"M([\d.]+) ([\d.]+)h", path)
    wide, tall = 100 / grid[1], 100 / aspect / grid[0]
    return {(round(float(y) / tall), round(float(x) / wide)) for x, y in boxes}


def decoded(uri):
    data = base64.b64decode(uri.split(",", 1)[1])
    with av.open(io.BytesIO(data)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


def test_the_curve_is_cut_where_segments_begin():
    seen = observation(12, cuts=4, seed=3, tau_seg=0.6)
    step = seen.merges[0]
    x = reading.places(seen, 0)
    firsts = [first for first, _ in step.segments]
    runs = reading.curve(step.smoothed, x, firsts)
    assert len(firsts) > 2
    # A segment's own values, and the one that ended it: of a segment of one frame, that alone.
    lengths = [last - first + (last < 11) for first, last in step.segments]
    assert [len(run) for run in runs] == [length for length in lengths if length]
    assert [place for run in runs for place, _ in run] == [t + 0.5 for t in range(11)]
    assert reading.borders(step, x)[0][0] == -0.5 and reading.borders(step, x)[-1][1] == 11.5
    assert reading.borders(step, x)[1][0] == step.segments[1][0] - 0.5


def test_sinks_are_found_and_stay_apart_from_the_rest():
    heat = reading.heat_of(observation(9, (6, 6), sinks=2, seed=5))
    assert len(heat.sinks) == 2 and heat.sinks[0][2] >= heat.sinks[1][2] >= 3
    share = sum(heat.times[:, r, c].mean() for r, c, _ in heat.sinks) / 36
    assert heat.sinks_share == pytest.approx(share) and f"{share:.0%}" in reading.sinks_word(heat)
    assert heat.levels.min() >= 0 and heat.levels.max() <= 1
    rest = np.ones((6, 6), bool)
    for row, column, _ in heat.sinks:
        rest[row, column] = False
    assert heat.levels[:, ~rest].min() > heat.levels[:, rest].max()
    assert heat.levels[:, rest].max() > 0.1  # and the rest is not black beside them
    assert not reading.heat_of(observation(9, (6, 6), sinks=0, seed=5)).sinks


@pytest.mark.parametrize("spread, low, high", [(0.2, 0.5, 2.0), (0.9, 0.25, 2.0), (4.0, 0.25, 5.0)])
def test_colours_span_what_there_is(spread, low, high):
    even = np.ones((2, 10, 10), np.float32)
    even[0, 0, 0], even[1, 0, 0] = 1 + spread, max(1 - spread, 0.01)
    heat = reading.heat_of(replace(observation(8), importance=even))
    assert heat.low == low and heat.high == pytest.approx(high, rel=0.02)
    assert heat.ticks[0] == (0, {0.5: "½×", 0.25: "¼×"}[low]) and heat.ticks[-1][0] <= 1
    assert dict((label, level) for level, label in heat.ticks)["1×"] == pytest.approx(
        reading.Heat(np.ones((1, 1, 1)), heat.low, heat.high).levels.item()
    )


def test_plus_says_that_attention_decides_nothing():
    assert "decides nothing" in html_page([Clip("a", pictures(8), observation(8, variant="plus"))])
    assert "decides nothing" not in html_page([Clip("a", pictures(8), observation(8))])


def test_weights_and_layers_of_a_merged_frame_are_named():
    seen = observation(12, cuts=0, seed=1)
    place = next(i for i, source in enumerate(seen.origins()) if len(source) == 3)
    source = seen.origins()[place]
    assert sum(weight for _, weight in source) == pytest.approx(1)
    named = reading.merge_word(seen, place)
    assert named.startswith("after layers 1 and 6: ")
    assert all(f"{weight:.0%} of frame {frame + 1}" in named for frame, weight in source)
    untouched = next(i for i, source in enumerate(seen.origins()) if len(source) == 1)
    assert reading.merge_word(seen, untouched) is None


def test_only_layers_behind_which_frames_merged_are_named():
    def note(*clips):
        facts = reading.gains([Clip("a", pictures(clip.frames), clip) for clip in clips])
        return next(fact.note for fact in facts if fact.name == "frames")

    both = observation(12, cuts=0, seed=1)
    first, second = both.merges
    idle = replace(second, sources=tuple(((frame, 1.0),) for frame in range(second.frames)))
    assert note(both) == "merged after encoder layers 1, 6"
    assert reading.merged_word([first, idle]) == "merged after encoder layer 1"
    assert reading.merged_word([idle, second, first]) == "merged after encoder layers 1, 6"
    assert reading.merged_word([idle]) == "none merged"
    assert note(observation(3)) == "too few to merge"


def test_frames_of_another_video_are_refused():
    with pytest.raises(EarlyTomConfigError, match="one of 8 frames"):
        Clip("a", pictures(7), observation(8))
    with pytest.raises(EarlyTomConfigError, match="uint8"):
        Clip("a", pictures(8).astype(np.float32), observation(8))


@pytest.mark.parametrize("aspect", [1.0, 16 / 9, 9 / 16])
def test_photos_keep_what_is_to_be_seen(aspect):
    (pixels,) = pictures(1, height=384, width=384)
    shown = decoded(photo(pixels, aspect, 200))
    assert max(shown.shape[:2]) == 200 and shown.shape[1] / shown.shape[0] == pytest.approx(aspect, rel=0.02)
    rows = (np.arange(shown.shape[0]) + 0.5) * 384 / shown.shape[0]
    columns = (np.arange(shown.shape[1]) + 0.5) * 384 / shown.shape[1]
    original = pixels[rows.astype(int)[:, None], columns.astype(int)[None]]
    assert np.abs(shown.astype(int) - original.astype(int)).mean() < 3


def test_flat_drawings_come_through_exactly():
    flat = np.zeros((96, 96, 3), np.uint8)
    flat[20:50, 30:60] = 200, 30, 40
    assert photo(flat, 1.0, 96).startswith("data:image/png") and np.array_equal(decoded(photo(flat, 1.0, 96)), flat)
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(decoded(exact(noise)), noise)


def test_many_frames_make_a_page_that_can_still_be_mailed():
    noise = np.random.default_rng(0).integers(0, 256, (64, 128, 128, 3), dtype=np.uint8)
    large = noise.repeat(3, axis=1).repeat(3, axis=2)
    assert len(html_page([Clip("a", large, observation(64, (14, 14)))])) < 8e6
    assert longest_side(1) > longest_side(64) > longest_side(10_000) > 0


def test_markup_escapes_text_and_attributes_and_leaves_out_none():
    made = html(tag("p", "1 < 2 & 3", [tag("b", "x"), None, "y"], class_='a"b<', stroke_width=1.50, id=None))
    assert made == '<p class="a&quot;b<" stroke-width="1.5">1 &lt; 2 &amp; 3<b>x</b>y</p>'
    assert ElementTree.fromstring(made.replace("b<", "b&lt;")).attrib == {"class": 'a"b<', "stroke-width": "1.5"}


def test_names_that_are_no_text_are_written(tmp_path):
    broken = b"caf\xe9.mp4".decode("utf-8", "surrogateescape")
    path = write_html(tmp_path / "a.html", [Clip(broken, pictures(4), observation(4))])
    assert "caf?.mp4" in path.read_text(encoding="utf-8")


# --- In a browser -----------------------------------------------------------------------------------

_MEASURE = """
const seen = {};
for (const frame of document.querySelectorAll("iframe")) {
  const page = frame.contentDocument, root = page.documentElement;
  const box = e => { const b = e.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]; };
  seen[frame.width] = {
    page: [root.scrollWidth, root.clientWidth], height: root.scrollHeight,
    scripts: page.scripts.length, title: page.title, images: page.images.length,
    questions: [...page.querySelectorAll(".asked .question")].map(e => e.textContent),
    pictures: [...page.querySelectorAll(".card .pictures svg")].map(box),
    outside: [...page.querySelectorAll("h1, h2, h3, p, table, .tile, .card, details")]
      .filter(e => e.getBoundingClientRect().right > root.clientWidth + 0.5).length,
    clipped: [...page.querySelectorAll("svg.flow text, svg.matrix text")].filter(e => {
      const b = e.getBoundingClientRect(), s = e.ownerSVGElement.getBoundingClientRect();
      return b.left < s.left - 0.5 || b.right > s.right + 0.5;
    }).map(e => e.textContent),
  };
}
document.body.textContent = JSON.stringify(seen);
"""


def looked_at(folder, text, widths):
    """What a browser makes of the page at each width: scripts of ours measure it, its own may not run."""
    frames = [tag("iframe", srcdoc=text, width=width, height=900, style="border:0") for width in widths]
    body = html(tag("body", frames)).replace("</body>", f"<script>window.onload = () => {{{_MEASURE}}}</script></body>")
    file = folder / "measured.html"
    file.write_text(f"<!DOCTYPE html><html>{body}</html>", encoding="utf-8")
    found = re.search(r"<body>(\{.*\})</body>", dom(folder, file), re.DOTALL)
    assert found, "the page was not measured"
    unescaped = re.sub(r"&(lt|gt|amp);", lambda m: {"lt": "<", "gt": ">", "amp": "&"}[m[1]], found[1])
    return {int(width): seen for width, seen in json.loads(unescaped).items()}


@needs_chromium
def test_a_browser_shows_the_page_on_a_desk_and_on_a_phone_and_runs_nothing(tmp_path):
    asked = tuple(Asked(text, text, text) for text in HOSTILE)
    films = [
        Clip(HOSTILE[0], pictures(30), observation(30, (6, 6), seed=2), asked, 16 / 9),
        Clip("no_space_anywhere_in_this_name" * 4, pictures(2), observation(2, variant="plus"), asked[:1], 9 / 16),
    ]
    text = html_page(films, model=HOSTILE[1], facts=[Fact(HOSTILE[2], HOSTILE[3], HOSTILE[4])])
    for width, seen in looked_at(tmp_path, text, (1280, 390)).items():
        assert seen["title"].startswith("EarlyTom: ") and seen["scripts"] == 0 and seen["images"] == 0
        assert seen["questions"] == [*HOSTILE, HOSTILE[0]]
        assert seen["page"][0] <= seen["page"][1] == width and seen["outside"] == 0  # nothing scrolls but drawings
        assert seen["clipped"] == []


@needs_chromium
def test_a_browser_shows_kept_tokens_clear_and_all_others_veiled(tmp_path):
    seen = observation(6, (4, 4), seed=4, retain_ratio=0.3)
    hues = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255)], np.uint8)
    frames = np.broadcast_to(hues[:, None, None], (6, 64, 64, 3)).copy()
    page = write_html(tmp_path / "page.html", [Clip("a.mp4", frames, seen)])
    (measured,) = looked_at(tmp_path, page.read_text(encoding="utf-8"), (1280,)).values()
    image = screenshot(tmp_path, page, 1280, measured["height"])
    assert image.shape == (measured["height"], 1280, 3)
    boxes = iter(measured["pictures"])
    for place, source in enumerate(seen.origins()):
        kept = {(row, column) for frame, row, column in seen.kept if frame == place}
        for frame, _ in source:
            left, top, width, height = next(boxes)
            for row in range(4):
                for column in range(4):
                    pixel = image[int(top + (row + 0.5) * height / 4), int(left + (column + 0.5) * width / 4)]
                    clear = np.abs(pixel.astype(int) - hues[frame]).max() < 12
                    assert clear == ((row, column) in kept), (frame, row, column, pixel)
        left, top, width, height = next(boxes)  # the heat map
        heat = reading.heat_of(seen).pixels[place]
        for row in range(4):
            for column in range(4):
                pixel = image[int(top + (row + 0.5) * height / 4), int(left + (column + 0.5) * width / 4)]
                assert np.abs(pixel.astype(int) - heat[row, column]).max() < 12
