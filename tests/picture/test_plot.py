"""The PNG shows what the page shows."""

import sys
import warnings

import av
import numpy as np
import pytest
from effort import cases
from made_up import observation, pictures

from earlytom_compile import EarlyTomConfigError
from earlytom_compile.picture import Asked, Clip, Fact, plot, reading, write_png

pytest.importorskip("matplotlib")

ODD = ("what is $x$ + \\frac{1}{2} $ ?", "<b>a</b> & b", "第一帧 是 什么 ? \x07 \u202e", "", "word " * 60)


def read(path):
    with av.open(str(path)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


@pytest.fixture
def said(monkeypatch):
    """The texts on a sheet, lines of a paragraph joined."""
    texts, write = [], plot._Sheet.text

    def text(sheet, text, *args, **options):
        texts.append(text)
        write(sheet, text, *args, **options)

    monkeypatch.setattr(plot._Sheet, "text", text)
    return lambda: " ".join(" ".join(texts).split())


@pytest.mark.parametrize("variant", cases(("paper",), among=[("paper",), ("released",), ("plus",)]))
def test_an_image_says_what_the_page_says(tmp_path, said, variant):
    seen = observation(12, seed=3, variant=variant)
    asked = (Asked("what is it ?", "a cat", "a dog", "a cow"), Asked("why ?", None, ""))
    clip = Clip("talk.mp4", pictures(12), seen, asked, 16 / 9)
    path = write_png(tmp_path / "a.png", [clip], model="a model", facts=[Fact("speed", "3x", "measured")])
    image = read(path)
    assert image.shape[1] == 1408 and image.shape[0] > 1000
    words = said()
    for text in (
        reading.headline([clip]), "talk.mp4", "a model", "speed", "3x", "measured", "what is it ?", "truth: a cow",
        "all tokens: a cat", "kept tokens: a dog (differs)", "all tokens: not asked", "kept tokens: (empty answer)",
        *(word for fact in reading.gains([clip]) for word in fact[:2]), reading.merging_word(seen),
        reading.selection_word(seen), reading.attention_word(seen, reading.heat_of(seen)),
        *(f"After layer {step.layer} of 8: {len(step.segments)} segment" for step in seen.merges),
        f"{len(seen.kept)} in all", *(f"{name} {value}" for name, value in reading.options_in_force(seen)),
        *(reading.frames_word(source).capitalize() for source in seen.origins()),
    ):  # fmt: skip
        assert " ".join(text.split()) in words


@pytest.mark.parametrize("frames, aspect", cases((1, 9 / 16), among=[(1, 9 / 16), (3, None), (64, 16 / 9)]))
def test_odd_texts_and_shapes_are_drawn(tmp_path, frames, aspect):
    asked = tuple(Asked(text, text, text, text) for text in ODD)
    clips = [Clip(ODD[0], pictures(frames), observation(frames, (14, 14)), asked, aspect)] * (2 if frames == 1 else 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # about letters that no font has, for one
        image = read(write_png(tmp_path / "a.png", clips, model=ODD[1], facts=[Fact(*ODD[:3])] * 6))
    assert image.std() > 10


def test_a_sheet_too_long_for_matplotlib_gets_coarser(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "_MOST_PIXELS", 600)
    assert max(read(write_png(tmp_path / "a.png", [Clip("a", pictures(2), observation(2))])).shape) in range(590, 602)


def test_left_out_tokens_are_veiled():
    hue = np.full((64, 64, 3), (255, 0, 0), np.uint8)
    shown = plot._veiled(hue, [(0, 1), (3, 2)], (4, 4))
    clear = (shown == hue).all(axis=2)
    expected = np.zeros((4, 4), bool)
    expected[0, 1] = expected[3, 2] = True
    assert np.array_equal(clear, expected.repeat(16, 0).repeat(16, 1))


def test_the_picture_has_the_colours_of_frames_curves_and_tokens(tmp_path):
    frames = np.full((6, 64, 64, 3), (0, 200, 0), np.uint8)
    image = read(write_png(tmp_path / "a.png", [Clip("a", frames, observation(6, seed=4))])).astype(int)
    for colour, least in (((0, 200, 0), 6 * 90 * 90), ((0x12, 0xC4, 0xE6), 200), ((0xC2, 0x25, 0x5C), 100)):
        assert (np.abs(image - colour).max(axis=2) < 6).sum() >= least, colour


def test_without_matplotlib_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(EarlyTomConfigError, match=r"earlytom-compile\[plot\]"):
        write_png(tmp_path / "a.png", [Clip("a", pictures(4), observation(4))])
    assert not (tmp_path / "a.png").exists()
