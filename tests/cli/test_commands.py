"""The three commands on a real, if tiny, checkpoint and a real video file; eager, so that they are quick."""

import json
import re
from io import StringIO
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from earlytom_compile.cli import comparison, demo, run, toolchain
from earlytom_compile.cli.comparison import full_model
from earlytom_compile.cli.loading import load_checkpoint

pytestmark = pytest.mark.usefixtures("sharing")
EAGER = ["--lowering", "eager"]
FRAMES, TOKENS = 8, 9  # of each frame: a 6x6 grid, pooled to 3x3
BEFORE, KEPT = FRAMES * TOKENS, round(0.1 * FRAMES * TOKENS)


def rows(output):
    """Cells of the comparison table, by the first."""
    lines = [line.strip(" │") for line in output.splitlines() if line.startswith("│")]
    return {name: rest for name, *rest in (re.split(r"\s*│\s*", line) for line in lines)}


def assert_compared(output):
    table = rows(output)
    full, compressed = table["frames"]
    assert full == str(FRAMES)
    counts = [int(count) for count in compressed.split(" -> ")]
    assert counts[0] == FRAMES and counts == sorted(counts, reverse=True) and len(counts) > 1
    assert table["video tokens"] == [str(BEFORE), f"{KEPT} ({KEPT / BEFORE:.1%})"]
    before, after = (int(cell.removesuffix(" tokens")) for cell in table["prompt length"])
    assert before - after == BEFORE - KEPT
    assert re.fullmatch(r"\d+ ms", table["time to first token"][0])
    assert re.fullmatch(r"\d+ ms \(\d+\.\dx (faster|slower)\)", table["time to first token"][1])
    assert {"answer", "answers agree"} <= set(table)


@pytest.fixture
def small_demo(monkeypatch):
    """The demo, whose larger model is not."""
    monkeypatch.setattr(demo, "_ON_CPU", demo._Size("cpu-tiny", 8, torch.float32, "tiny"))


@pytest.mark.usefixtures("small_demo")
def test_demo_answers_right_measures_and_draws(earlytom, tmp_path):
    page = tmp_path / "demo.html"
    status, output, _ = earlytom("demo", "--repeats", 3, "--save", tmp_path / "kept", "--html", page)
    assert status == 0
    asked = rows(output.split("The same answers from fewer tokens")[1])
    assert len(asked) == 3 and all(truth == full == compressed for truth, full, compressed in asked.values())
    assert "128 -> " not in output and "all 128 video tokens" in output and "13 of them" in output
    full, compressed = re.findall(r"(\d+) ms \((\d+) to (\d+)\)", output)
    assert all(int(low) <= int(median) <= int(high) for median, low, high in (full, compressed))
    assert re.search(r"\d\.\d\dx (faster|slower)", output) and "median of 3 runs" in output
    assert str(page) in output.replace("\n", "")
    assert all(question in page.read_text(encoding="utf-8") for question in asked)
    assert {file.name for file in (tmp_path / "kept").rglob("*.*")} >= {"model.safetensors", "clip.mp4"}


def test_demo_without_a_compiler_says_so(monkeypatch):
    monkeypatch.setattr(toolchain, "get_cpp_compiler", _no_compiler)
    loaded, console = SimpleNamespace(device=torch.device("cpu")), Console(file=StringIO(), width=200)
    assert demo._possible(loaded, {"lowering": "staged"}, console) == {"lowering": "eager"}
    assert "both models run eagerly" in console.file.getvalue() and "install g++" in console.file.getvalue()


def test_run_compare(earlytom, checkpoint, clip):
    status, output, _ = earlytom(
        "run", "--model", checkpoint, "--video", clip, "--prompt", "What is it?", "--frames", FRAMES,
        "--retain-ratio", 0.1, "--max-new-tokens", 2, "--compare", "--repeats", 1, "--variant", "paper", *EAGER,
    )  # fmt: skip
    assert status == 0
    assert_compared(output)


@pytest.mark.parametrize(
    "schedules, says",
    [
        ([[8, 6, 6, 5]], "after vision encoder layers 1, 4."),
        ([[8, 8, 7, 7]], "after vision encoder layer 3."),
        ([[8, 8, 8, 8], [8, 7, 7, 7]], "after vision encoder layer 1."),
        ([[8, 8, 8, 8]], "No two frames look enough alike to merge."),
    ],
)
def test_layers_are_named_where_frames_merged(schedules, says):
    videos = [{"frames": frames, "tokens": [72, 7]} for frames in schedules]
    assert comparison._encoding({"videos": videos, "merge_layers": [1, 3, 4]}).endswith(says)


@pytest.mark.parametrize(
    "by_frame, says, told",
    [
        ([9, 3, 0], "12 of 27 patches (44.4%)", "not computed again"),
        ([9, 9, 9], "27 of 27 patches", "Too many patches"),
    ],
)
def test_where_patches_are_reused_it_is_said_how_many_were_computed(by_frame, says, told):
    patches = {"by_frame": by_frame, "places": 9, "changed": 0.4, "noise": 0.0, "threshold": 0.06}
    report = {
        "videos": [{"frames": [3], "tokens": [72, 7], "patches": patches}], "merge_layers": [], "full_layers": [3],
        "prompt": [90, 25], "reasons": [],
    }  # fmt: skip
    arm = comparison.Arm([1], "a", 1.0, 0.5)
    console = Console(file=StringIO(), width=200)
    console.print(comparison.comparison_table(comparison.Comparison(arm, arm, report, "")))
    table = " ".join(console.file.getvalue().split())
    assert says in table and told in table and "look enough alike" not in table
    said = run._summary({"answer": "a", "tokens": 1, "seconds": 1.0, "compile_seconds": 0.0}, report)
    assert any(says in part and part.endswith(" computed") for part in said)
    assert demo._kept_text(report).startswith(f"The vision encoder computes {says}")


def test_run_answers_and_says_what_it_dropped(earlytom, checkpoint, clip):
    status, output, progress = earlytom(
        "run", "--model", checkpoint, "--video", clip, "--prompt", "What is it?", "--frames", FRAMES,
        "--retain-ratio", 0.1, "--max-new-tokens", 3, *EAGER,
    )  # fmt: skip
    assert status == 0
    assert len(output.strip().splitlines()) >= 1
    assert f"video tokens {BEFORE} -> {KEPT}" in progress


def test_explain_prints_the_report(earlytom, checkpoint, clip):
    source = ["--model", checkpoint, "--video", clip]
    status, output, _ = earlytom("explain", *source, "--frames", FRAMES, *EAGER)
    assert status == 0
    assert "vision_tower" in output and f"tokens {BEFORE} -> " in output


def test_explain_without_a_checkpoint_takes_the_demos(earlytom):
    status, output, _ = earlytom("explain", "--frames", FRAMES, *EAGER)
    assert status == 0
    assert "vision_tower" in output


def test_the_full_model_costs_no_second_set_of_weights(checkpoint):
    model = load_checkpoint(str(checkpoint), device="cpu").model
    twin = full_model(model, compiled=False)

    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    assert twin is not model and all(a is b for a, b in pairs)


def test_mistakes_exit_with_2_and_one_line(earlytom, checkpoint, clip, tmp_path):
    def run(model=checkpoint, video=clip, *more):
        return earlytom("run", "--model", model, "--video", video, "--prompt", "What?", *EAGER, *more)

    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    weightless = tmp_path / "weightless"
    weightless.mkdir()
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (weightless / file.name).write_bytes(file.read_bytes())
    text = tmp_path / "notes.txt"
    text.write_text("no film\n" * 100)
    cases = {
        "no checkpoint folder at": run(tmp_path / "nowhere"),
        "it has no config.json": run(tmp_path),
        "of the family 'qwen2_vl': only 'qwen3_5' or": run(other),
        "is not valid JSON": run(broken),
        "has no weights": run(weightless),
        "no video file at": run(checkpoint, tmp_path / "nowhere.mp4"),
        "no video in it": run(checkpoint, text),
        "fewer than the 500 asked for": run(checkpoint, clip, "--frames", 500),
        "max_new_tokens=0": run(checkpoint, clip, "--max-new-tokens", 0),
        "--device fpga": run(checkpoint, clip, "--device", "fpga"),
        "layer 9 does not exist": run(checkpoint, clip, "--no-reuse", "--merge-layers", "1,9"),
    }
    for message, (status, _, errors) in cases.items():
        assert status == 2, message
        assert message in errors and "Traceback" not in errors


def test_without_a_compiler_run_stops(earlytom, checkpoint, clip, monkeypatch):
    monkeypatch.setattr(toolchain, "get_cpp_compiler", _no_compiler)
    status, _, errors = earlytom("run", "--model", checkpoint, "--video", clip, "--prompt", "What?")
    assert status == 2 and "no C++ compiler was found" in errors and "--lowering eager" in errors


def _no_compiler():
    raise toolchain.InvalidCxxCompiler()
