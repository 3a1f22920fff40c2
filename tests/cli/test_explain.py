"""``earlytom explain``: what a user gains comes first, and its numbers are those of the model."""

import io
import re

import pytest
import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tiny_checkpoint import TinySize, write_checkpoint

import earlytom_compile
from earlytom_compile.benchmarks.still_camera import Take, write_clip
from earlytom_compile.cli import explain
from earlytom_compile.cli import main as cli
from earlytom_compile.cli.comparison import Arm, Comparison
from earlytom_compile.cli.gains import Cost, Gains, gains_of, gains_table
from earlytom_compile.cli.loading import load_checkpoint, prepare_inputs
from earlytom_compile.config import EarlyTomConfig
from earlytom_compile.flops import Reuse, count
from earlytom_compile.integrations.caches import cache_of
from earlytom_compile.picture import Asked
from earlytom_compile.shapes import ModelShape

pytestmark = pytest.mark.usefixtures("sharing")
FRAMES, TOKENS = 8, 9  # of each frame: a 6x6 grid, pooled to 3x3
PARTS = ["What you gain", "What was found", "What the words mean", "What the compiler says"]


def comparison_of(content):
    arms = (Arm([1], "a", 1.0, 0.5), Arm([1], "a", 1.0, 0.25))
    return Comparison(*arms, content, "vision encoder   tower")


def compressed_call(schedules, prompt, tokens=(72, 7)):
    videos = [{"frames": schedule, "tokens": list(tokens)} for schedule in schedules]
    made = {"videos": videos, "prompt": list(prompt), "inside": [], "merge_layers": [0, 2]}
    return {**made, "full_layers": [], "reasons": []}


def test_gains_come_first_and_the_compilers_words_last(checkpoint, clip, capsys):
    arguments = ["--model", str(checkpoint), "--video", str(clip), "--frames", str(FRAMES), "--retain-ratio", "0.1"]
    assert cli.main(["explain", *arguments, "--lowering", "eager"]) == 0
    output = capsys.readouterr().out
    places = [output.index(part) for part in PARTS]
    assert places == sorted(places)
    gain, found, legend, compiler = (output[start:end] for start, end in zip(places, [*places[1:], None], strict=True))
    assert re.search(rf"video tokens\s*│ {FRAMES * TOKENS}\s*│ {round(0.1 * FRAMES * TOKENS)} ", gain)
    assert all(word in gain for word in ("work of a prompt", "time to first token", "keys and values"))
    assert "measured here" in " ".join(gain.split())
    assert f"{FRAMES} frames" in found and "vision_tower" not in gain + found + legend
    assert "vision_tower" in compiler and str(clip) in output[: places[0]] and "made up" not in output
    for line in compiler.splitlines()[1:]:
        heading = line[:16].strip()
        assert heading in legend or heading.startswith(("state", "options", "video", "prompt", "CUDA")) or not heading


@pytest.mark.parametrize("given_video", [None, "talk.mp4"])
@pytest.mark.parametrize("given_model", [None, "a/checkpoint"])
def test_what_nobody_chose_is_said(given_video, given_model):
    arguments = type("Arguments", (), {"video": given_video, "model": given_model})
    text = explain._subject(arguments, "8 frames")
    assert ("The clip is made up" in text) == (given_video is None)
    assert ("the demo's small one" in text) == (given_model is None)


def test_questions_are_answered_by_both_models_on_the_screen_and_on_the_page(earlytom, tmp_path):
    page, questions = tmp_path / "a.html", ("what shape is the blue thing ?", "how many things are in the video ?")
    asked = [word for question in questions for word in ("--prompt", question)]
    quick = ["--lowering", "eager", "--retain-ratio", "0.1", "--variant", "plus"]
    status, output, _ = earlytom("explain", *asked, *quick, "--html", page)
    assert status == 0
    part = output.split("What both models answer\n")[1].split("\n\n")[0]
    assert part.splitlines() == [questions[0], "  both        cross", questions[1], "  both        two"]
    assert output.index("What you gain") < output.index("What both models answer") < output.index("What was found")
    drawn = page.read_text(encoding="utf-8")
    assert all(f">{text}<" in drawn for text in (*questions, "Questions and answers", "cross", "two"))
    assert drawn.count(">same<") == 2


def test_answers_that_differ_are_two_lines():
    said = explain._answers([Asked("Who?", "a cat", "a dog"), Asked("Where?", "", "")])
    assert said.splitlines() == [
        "Who?",
        "  all tokens  a cat",
        "  compressed  a dog",
        "Where?",
        "  both        (empty answer)",
    ]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--prompt", " "], "must be a question"),
        (["--prompt", "<video> who?"], "<video> stands for the video itself"),
        (["--max-new-tokens", "4"], "max_new_tokens=4 without --prompt: nothing is answered"),
        (["--prompt", "who?", "--max-new-tokens", "0"], "max_new_tokens=0: must be at least 1"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused_before_the_work(words, said, monkeypatch, earlytom):
    monkeypatch.setattr(explain, "open_checkpoint", lambda *given, **more: pytest.fail("it began to work"))
    status, _, errors = earlytom("explain", *words)
    assert status == 2 and said in errors


@pytest.mark.parametrize("command", ["explain", "demo"])
def test_more_frames_than_the_made_up_clip_has_are_refused_without_a_path(command, capsys):
    assert cli.main([command, "--frames", "500"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.endswith("frames=500: the made-up clip has 64 frames; take at most so many.") and "/tmp" not in said


@torch.no_grad()
def test_memory_is_what_the_model_uses(checkpoint, clip):
    """Against the model's own cache, and the outputs of its modules."""
    loaded = load_checkpoint(str(checkpoint), device="cpu")
    model = loaded.model
    inputs = prepare_inputs(loaded, clip, "What?", frames=FRAMES, progress_on=Console(quiet=True))
    widest = {"vision_tower.encoder.layers": 0, "language_model.layers": 0}

    def note(part):
        def hook(module, args, output):
            if isinstance(output, torch.Tensor):
                widest[part] = max(widest[part], output.nbytes)

        return hook

    handles = [
        module.register_forward_hook(note(part))
        for part in widest
        for name, module in model.model.named_modules()
        if name.startswith(part + ".")
    ]
    cache = cache_of(model(**inputs, use_cache=True))
    for handle in handles:
        handle.remove()
    cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    length = inputs["input_ids"].shape[1]
    gains = gains_of(model, comparison_of(compressed_call([[FRAMES, 6, 5]], (length, 20))), {})
    assert gains.full.cache_bytes == cached
    assert gains.full.language_bytes == widest["language_model.layers"]
    assert gains.full.encoder_bytes == gains.compressed.encoder_bytes == widest["vision_tower.encoder.layers"]
    assert gains.compressed.cache_bytes * length == cached * 20
    assert (gains.full.seconds, gains.compressed.seconds) == (0.5, 0.25)


def test_work_is_counted_once_for_the_prompt_and_for_each_video(checkpoint):
    model = load_checkpoint(str(checkpoint), device="cpu").model
    shape = ModelShape.from_config(model.config)
    schedules = [[8, 6, 5], [8, 8, 3]]
    gains = gains_of(model, comparison_of(compressed_call(schedules, (200, 40))), {"variant": "plus"})

    def encoded(schedule, variant="plus"):
        counted = count(
            shape, protocol="exact", frames_schedule=schedule, llm_tokens=1, merge_layers=(0, 2), variant=variant
        )
        return counted.encoder + counted.operators + counted.projector

    prompt = count(shape, protocol="exact", frames_schedule=(8,), llm_tokens=40)
    assert gains.compressed.flops == pytest.approx(sum(map(encoded, schedules)) + prompt.llm + prompt.lm_head)
    assert gains.full.flops > gains.compressed.flops


def reused_call(by_frame, places, changed=0.5, **more):
    patches = {"by_frame": by_frame, "places": places, "changed": changed, "noise": 0.01, "threshold": 0.04}
    content = compressed_call([[len(by_frame)]], (200, 40))
    video = {**content["videos"][0], "patches": patches}
    return {**content, "videos": [video], "merge_layers": [], "encoder": {"layers": 4}, "full_layers": [3], **more}


def test_work_of_reused_patches_is_that_of_those_computed(checkpoint):
    model = load_checkpoint(str(checkpoint), device="cpu").model
    shape = ModelShape.from_config(model.config)
    by_frame = [shape.frame_tokens, 5, 7, 1]
    gains = gains_of(model, comparison_of(reused_call(by_frame, shape.frame_tokens)), {"variant": "plus"})
    given = {"protocol": "exact", "frames_schedule": (4,), "llm_tokens": 40, "variant": "plus"}
    assert gains.compressed.flops == count(shape, **given, reuse=Reuse(sum(by_frame), (3,))).total
    assert gains.full.flops == count(shape, **{**given, "llm_tokens": 200}).total > gains.compressed.flops


@torch.no_grad()
def test_work_and_memory_count_what_is_left_inside_the_language_model(tmp_path, clip):
    """By a real call: the cache that it leaves, and the lengths that the layers had."""
    size = TinySize(image=96, patch=16, vision_layers=2, vision_width=32, text_layers=2, text_width=64)
    loaded = load_checkpoint(str(write_checkpoint(tmp_path, size)), device="cpu")
    options = {"retain_ratio": 0.5, "inner_layer": 1, "inner_drop_ratio": 0.75, "lowering": "eager", "strict": True}
    options["variant"] = "paper"
    model = earlytom_compile.compile(loaded.model, **options)
    inputs = prepare_inputs(loaded, clip, "What?", frames=FRAMES, progress_on=Console(quiet=True))
    output = model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
    report = earlytom_compile.report(model).to_dict()
    gains = gains_of(model, comparison_of(report), options)
    layers = output.past_key_values.layers
    assert gains.compressed.cache_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    first, last = layers[0].keys.shape[2], layers[1].keys.shape[2]
    assert last < first == report["prompt"][1]
    given = {"frames_schedule": report["videos"][0]["frames"], "merge_layers": report["merge_layers"]}
    shape = ModelShape.from_config(model.config)
    counted = count(shape, protocol="exact", llm_tokens={0: first, 1: last}, **given)
    step = 2 * first * 64 + 2 * 2 * first * last * 64  # scores of the last position; cosines and sums
    assert gains.compressed.flops == counted.total + step


def test_findings_say_what_was_computed_of_each_frame():
    config = EarlyTomConfig(variant="plus", full_layers=(3,))
    text = " ".join(explain._findings(comparison_of(reused_call([100, 20, 30], 100)), config).split())
    assert text.startswith("The vision encoder gets 3 frames of the video. 150 of 300 patches (50.0%) are computed")
    assert "Percent of each frame: 100 20 30." in text and "more than 0.04, which comes of tau_reuse" in text
    assert "Encoder layer 3 computed every patch." in text and "represent all others" in text
    text = " ".join(explain._findings(comparison_of(reused_call([9, 9], 9, changed=0.97)), config).split())
    assert "Nothing was reused: 97.0% of the patches changed" in text and "Percent of each frame" not in text


@pytest.mark.parametrize(
    "take, reused",
    [(Take(320, 240, seconds=2, rate=6), True), pytest.param(Take(320, 240, seconds=2, rate=6, cuts=11), False)],
)
def test_a_real_file_says_and_shows_what_was_computed(earlytom, checkpoint, tmp_path, take, reused):
    """From an H.264 file to the words on the screen and the veils on the page."""
    film, page = write_clip(tmp_path / "talk.mp4", take), tmp_path / "a.html"
    asked = ("--model", checkpoint, "--video", film, "--frames", FRAMES, "--variant", "plus", "--lowering", "eager")
    status, output, _ = earlytom("explain", *asked, "--html", page)
    assert status == 0
    found = " ".join(output.split("What was found")[1].split("What the words mean")[0].split())
    drawn = page.read_text(encoding="utf-8")
    every, veils = FRAMES * 36, drawn.count('class="veil"')
    assert "What was computed" in drawn and veils >= FRAMES
    if reused:
        total = int(re.search(rf"(\d+) of {every} patches \([\d.]+%\) are computed", found)[1])
        assert 36 < total < every and f"{every} → {total}" in drawn
        assert re.search(r"Percent of each frame: 100( \d+){7}\.", found) and "tau_reuse=" in found
        own = [int(count) for count in re.findall(r">(\d+) of 36 patches \(", drawn)]
        assert len(own) == FRAMES and own[0] == 36 and sum(own) == total
    else:
        assert re.search(r"Nothing was reused: \d+\.\d% of the patches changed", found)
        assert "nothing reused" in drawn


def test_an_uncompressed_call_gains_nothing(checkpoint):
    model = load_checkpoint(str(checkpoint), device="cpu").model
    assert gains_of(model, comparison_of({"videos": [], "prompt": None, "merge_layers": []}), {}) is None


@given(st.lists(st.integers(1, 64), min_size=3, max_size=3), st.integers(1, 640), st.sampled_from(["paper", "plus"]))
def test_findings_say_each_count(frames, kept, variant):
    frames = sorted(frames, reverse=True)
    before = 10 * frames[0]
    content = compressed_call([frames], (1, 1), tokens=(before, min(kept, before)))
    text = " ".join(explain._findings(comparison_of(content), EarlyTomConfig(variant=variant)).split())
    assert f"{frames[0]} frames of the video" in text
    assert f"{min(kept, before)} of the video's {before} tokens" in text
    if frames[0] == frames[-1]:
        assert "no two of them" in text
    else:
        assert f"of them are left {frames[1]} after layer 0, {frames[2]} after layer 2, since" in text
    assert ("represent all others" in text) == (variant == "plus")


@examples(20)
@given(st.integers(1, 10**6), st.floats(0, 1), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_the_table_says_faster_slower_and_less_rightly(full, share, full_seconds, less_seconds):
    less = max(1, round(share * full))
    costs = (Cost(n, n, float(n), seconds, n, n, n) for n, seconds in ((full, full_seconds), (less, less_seconds)))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(gains_table(Gains(*costs)))
    rows = {line.split("│")[1].strip(): line for line in console.export_text().splitlines() if line.startswith("│")}
    ratio = full_seconds / less_seconds
    expected = f"{ratio:.1f}x faster" if ratio >= 1 else f"{1 / ratio:.1f}x slower"
    assert expected in rows["time to first token"]
    assert ("the same" if full == less else f"{full / less:.1f}x less") in rows["video tokens"]


@pytest.mark.parametrize(
    "full, less, told", [(0.024, 0.026, True), (0.024, 0.0239, True), (0.024, 0.02, False), (2.0, 2.1, False)]
)
def test_a_call_too_short_to_gain_time_is_said_to_be(full, less, told):
    costs = (Cost(100, 100, 1.0, seconds, 1, 1, 1) for seconds in (full, less))
    assert ("A call of 24 ms has no time to gain" in str(gains_table(Gains(*costs)).caption)) == told


def test_report_words_are_those_of_the_report():
    assert "at their defaults" in str(earlytom_compile.Report((), config=EarlyTomConfig()))
