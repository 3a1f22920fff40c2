"""What was computed of each frame: clear where it was, behind a veil where it was taken over, and how many are said."""

import re

import numpy as np
import pytest
from browser import needs_chromium, screenshot
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from made_up import observation, pictures, reused
from test_page import Page, looked_at

from earlytom_compile.picture import Clip, html_page, plot, reading, write_html, write_png
from earlytom_compile.picture.computed import runs
from earlytom_compile.picture.plot_computed import dimmed


@st.composite
def clips(draw):
    frames = draw(st.integers(1, 6))
    seen = reused(
        frames,
        (draw(st.integers(1, 6)), draw(st.integers(1, 6))),
        prefix=draw(st.integers(0, 2)),
        covered=draw(st.sampled_from([(1.0, 1.0), (378 / 384, 378 / 384), (0.75, 0.5)])),
        share=draw(st.sampled_from([0.0, 0.2, 0.7, 1.0])),
        seed=draw(st.integers(0, 2**31)),
    )
    return Clip("a", pictures(frames, height=48, width=48), seen, (), draw(st.sampled_from([None, 16 / 9, 9 / 16])))


def active(reuse):
    """bool [F, S], place by place."""
    return np.array([[source == frame for source in row] for frame, row in enumerate(reuse.source.tolist())])


def uncovered(path, width, height, at):
    """Whether a point of a veil lies in one of its holes."""
    outer, _, holes = path.partition("Z")
    assert outer == f"M0 0H{width}V{height:.2f}H0"
    boxes = [tuple(map(float, box)) for box in re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)h-[\d.]+z", holes)]
    assert len(boxes) == holes.count("M")
    return any(x < at[0] < x + wide and y < at[1] < y + tall for x, y, wide, tall in boxes)


@examples(25)
@given(clips())
def test_on_the_page_what_was_computed_is_clear_and_nothing_else(clip):
    reuse, page = clip.observation.reuse, Page(html_page([clip]))
    frames, (rows, columns) = clip.observation.frames, reuse.grid
    tall, own = 100 / clip.width_by_height, active(reuse)
    veils = [attributes["d"] for attributes in page.of("path", class_="veil")][:frames]
    down, across = tall * reuse.covered[0] / rows, 100 * reuse.covered[1] / columns
    prefix = own.shape[1] - rows * columns
    for frame, path in enumerate(veils):
        for row in range(rows):
            for column in range(columns):
                point = (column + 0.5) * across, (row + 0.5) * down
                assert uncovered(path, 100, tall, point) == own[frame, prefix + row * columns + column]
    said = [f"{own[frame].sum()} of {own.shape[1]} patches ({own[frame].mean():.0%})" for frame in range(frames)]
    assert [text for text in page.texts if re.fullmatch(r"\d+ of \d+ patches \(\d+%\)", text)] == said
    assert reading.COMPUTED in page.texts and reading.MERGES not in page.texts
    assert not any("Similarities" in text for text in page.texts)


@examples(40)
@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 2**31))
def test_runs_are_all_that_was_computed_and_as_long_as_can_be(rows, columns, seed):
    computed = np.random.default_rng(seed).random((rows, columns)) < 0.5
    drawn, found = np.zeros_like(computed), list(runs(computed))
    for row, first, length in found:
        assert not drawn[row, first : first + length].any() and length > 0
        drawn[row, first : first + length] = True
        assert first == 0 or not computed[row, first - 1]
    assert np.array_equal(drawn, computed)


@pytest.mark.parametrize("covered", [(1.0, 1.0), (56 / 64, 60 / 64)])
def test_in_the_image_too_to_the_pixel(covered):
    red = np.full((64, 64, 3), (255, 0, 0), np.uint8)
    computed = np.zeros((4, 5), bool)
    computed[0, 1] = computed[3, 4] = True
    tall, wide = 64 * covered[0] / 4, 64 * covered[1] / 5
    shown = (dimmed(red, computed, covered) == red).all(axis=2)
    for y in range(64):
        for x in range(64):
            inside = y // tall < 4 and x // wide < 5
            assert shown[y, x] == bool(inside and computed[int(y // tall), int(x // wide)])


def test_the_image_says_what_the_page_says(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    said, write = [], plot._Sheet.text
    monkeypatch.setattr(
        plot._Sheet, "text", lambda sheet, text, *args, **how: said.append(text) or write(sheet, text, *args, **how)
    )
    seen = reused(40, (9, 9), share=0.2)
    write_png(tmp_path / "a.png", [Clip("a", pictures(40), seen)])
    words = " ".join(" ".join(said).split())
    title, text = reading.encoded(Clip("a", pictures(40), seen))
    assert title in words and text in words and "segment" not in words
    own = active(seen.reuse)
    assert all(f"{frame + 1}: {own[frame].sum()} of 81 ({own[frame].mean():.0%})" in said for frame in range(40))
    layers = ", ".join(map(str, seen.config.resolve_full_layers(8)))
    assert f"full_layers {layers}" in words and f"tau_reuse {seen.config.tau_reuse:g}" in words
    assert "merge_layers" not in words


def test_tiles_count_patches_of_all_videos():
    some, none = reused(5, (4, 4), share=0.2, seed=1), reused(3, (4, 4), share=1.0)
    total = int(active(some.reuse).sum())

    def tile(*observations):
        facts = reading.gains([Clip("a", pictures(seen.frames), seen) for seen in observations])
        return {fact.name: (fact.value, fact.note) for fact in facts}

    share = f"{(total + 48) / 128:.1%} computed"
    assert tile(some, none)["patches in the encoder"] == (f"128 → {total + 48}", share)
    assert tile(none)["patches in the encoder"] == ("48 → 48", "nothing reused")
    assert "frames" not in tile(some) and "patches in the encoder" not in tile(observation(8))


@needs_chromium
def test_a_browser_shows_it_so(tmp_path):
    seen = reused(4, (4, 4), covered=(0.75, 0.75), share=0.4, seed=3)
    hues = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)], np.uint8)
    frames = np.broadcast_to(hues[:, None, None], (4, 64, 64, 3)).copy()
    page = write_html(tmp_path / "page.html", [Clip("a.mp4", frames, seen)])
    (measured,) = looked_at(tmp_path, page.read_text(encoding="utf-8"), (1280,)).values()
    image = screenshot(tmp_path, page, 1280, measured["height"])
    own = active(seen.reuse)
    for frame, (left, top, width, height) in enumerate(measured["pictures"][:4]):
        for place, computed in enumerate(own[frame]):
            y, x = ((at + 0.5) * 0.75 / 4 for at in divmod(place, 4))
            pixel = image[int(top + y * height), int(left + x * width)].astype(int)
            assert (np.abs(pixel - hues[frame]).max() < 12) == computed, (frame, place, pixel)
