"""``--html`` and ``--png`` of ``earlytom run`` and ``explain``, and what the model saw."""

import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from clip import write_clip
from made_up import observation, pictures
from rich.console import Console

from earlytom_compile.cli import explain, picture, run
from earlytom_compile.cli.picture import Answered
from earlytom_compile.integrations.preprocess import PixelSettings, load_processor
from earlytom_compile.picture.frames import frames_seen

pytestmark = pytest.mark.usefixtures("sharing")
EAGER = ["--lowering", "eager"]


def test_run_draws_question_and_both_answers(earlytom, checkpoint, clip, tmp_path):
    pytest.importorskip("matplotlib")
    question, html, png = "what <is> it & why ?", tmp_path / "a.html", tmp_path / "a.png"
    status, output, said = earlytom(
        "run", "--model", checkpoint, "--video", clip, "--prompt", question, "--frames", 8, "--max-new-tokens", 3,
        *EAGER, "--html", html, "--png", png,
    )  # fmt: skip
    assert status == 0 and f"picture in {html}" in said and f"picture in {png}" in said
    page = html.read_text(encoding="utf-8")
    assert "what &lt;is&gt; it &amp; why ?" in page and "<is>" not in page
    assert ">clip.mp4<" in page and str(clip.parent) not in page  # of the file its name, not where it lies
    assert "72 → 14" in page and "not asked" not in page
    assert re.search('class="(same|differs)"', page)
    assert png.read_bytes().startswith(b"\x89PNG")
    # The clip is 320 x 240, the model's frames are 48 x 48.
    assert re.search(r'<image id="v0f0"[^>]* width="100" height="75"', page)


@pytest.mark.long
def test_run_compare_shows_the_answers_that_were_compared(earlytom, checkpoint, clip, tmp_path):
    html = tmp_path / "a.html"
    status, output, _ = earlytom(
        "run", "--model", checkpoint, "--video", clip, "--prompt", "What is it?", "--frames", 8, "--max-new-tokens", 2,
        "--compare", "--repeats", 1, "--retain-ratio", 0.1, "--variant", "plus", *EAGER, "--html", html,
    )  # fmt: skip
    page = html.read_text(encoding="utf-8")
    assert status == 0 and "time to first token" in page and "prompt" in page
    agree = "│ yes" in output
    assert (">same<" in page) == agree and (">differs<" in page) != agree


@pytest.mark.parametrize(
    "own, variant, part",
    [
        (True, [], "What was computed"),
        (True, ["--variant", "paper"], "Frames, segments and merges"),
        pytest.param(False, [], "What was computed", marks=pytest.mark.long),
    ],
)
def test_explain_draws_without_a_question(earlytom, checkpoint, clip, tmp_path, own, variant, part):
    html = tmp_path / "a.html"
    which = ("--model", checkpoint, "--video", clip) if own else ()
    status, output, _ = earlytom("explain", *which, *variant, "--frames", 8, *EAGER, "--html", html)
    page = html.read_text(encoding="utf-8")
    assert status == 0 and "vision encoder" in output
    assert "Questions and answers" not in page and part in page
    assert (">clip.mp4<" in page) == own and ("a clip made on the spot" in page) != own


def test_several_videos_and_questions_are_one_page_and_the_full_model_is_asked_once_each(tmp_path, monkeypatch, clip):
    asked, inputs = [], {"pixel_values_videos": torch.zeros(1, 8, 3, 48, 48)}
    other = tmp_path / "other.mp4"
    other.write_bytes(clip.read_bytes())
    monkeypatch.setattr(picture, "_answer_with_all", lambda loaded, inputs, *rest: asked.append(inputs) or "full")
    monkeypatch.setattr(picture, "observe", lambda *args, **options: [observation(8, (3, 3))])
    monkeypatch.setattr(picture, "frames_seen", lambda *args: pictures(8))
    answered = [Answered(video, question, inputs, "short") for video in (clip, other) for question in ("q1", "q2")]
    answered[0] = replace(answered[0], full="short")
    picture.write_run_pictures(
        SimpleNamespace(model=None, processor=None), answered, {}, html=tmp_path / "a.html", png=None,
        model=str(tmp_path), facts=picture.facts_of((90, 30), (0.2, 0.1)), max_new_tokens=1,
        progress_on=Console(stderr=True),
    )  # fmt: skip
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert len(asked) == 3 and page.count(">q1<") == page.count(">q2<") == 2
    assert page.count(">same<") == 1 and page.count(">differs<") == 3 and "1 of 4" in page
    assert "Video 1: " in page and "Video 2: " in page and ">other.mp4<" in page
    assert "90 → 30 tokens" in page and "200 → 100 ms" in page and "2.0x faster" in page
    assert tmp_path.name in page and str(tmp_path) not in page


@pytest.mark.parametrize("command", ["run", "explain"])
def test_a_picture_that_cannot_be_written_is_said_before_the_work(earlytom, tmp_path, monkeypatch, command):
    def work(*args, **kwargs):
        raise AssertionError("it began to work")

    module = {"run": run, "explain": explain}[command]
    loading = [name for name in ("load_checkpoint", "open_checkpoint") if hasattr(module, name)]
    assert loading
    for name in loading:
        monkeypatch.setattr(module, name, work)
    own = ("--model", "m", "--video", __file__, "--prompt", "p") if command == "run" else ()
    status, _, said = earlytom(command, *own, "--html", tmp_path)
    assert status == 2 and "html=" in said and "folder" in said
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, said = earlytom(command, *own, "--png", tmp_path / "a.png")
    assert status == 2 and "png needs matplotlib" in said and not list(tmp_path.iterdir())


@pytest.mark.parametrize("do_rescale, do_normalize", [(True, True), (True, False), (False, False)])
def test_frames_seen_are_what_the_processor_got(do_rescale, do_normalize):
    class Ours:
        pixels = PixelSettings({"height": 32, "width": 32}, do_rescale=do_rescale, do_normalize=do_normalize)

    given = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    made = Ours.pixels.apply(given)
    assert np.array_equal(frames_seen(Ours(), made), given)
    rough = frames_seen(Ours(), made.to(torch.bfloat16))
    assert np.abs(rough.astype(int) - given).max() <= 2


def test_frames_seen_of_the_processor_that_is_there(checkpoint, tmp_path):
    path = tmp_path / "clip.mp4"
    write_clip(path)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0)).to_ndarray(format="rgb24")
    small = np.ascontiguousarray(frame[96:144, 136:184])[None]
    processor = load_processor(str(checkpoint))
    inputs = processor(text="<video>", videos=small, return_tensors="pt")
    assert np.array_equal(frames_seen(processor, inputs["pixel_values_videos"][0]), small)
