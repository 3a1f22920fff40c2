"""``earlytom bench`` on a tiny checkpoint: every arm has its row, and every file what the table has."""

import json
import re
import shutil
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tiny_checkpoint import TinySize, write_checkpoint
from transformers import AutoConfig
from without_inductor import leave_graphs_as_they_are

from earlytom_compile import EarlyTomConfigError
from earlytom_compile.cli import bench, toolchain
from earlytom_compile.cli.bench import _model, _trace_path
from earlytom_compile.cli.main import build_parser, main
from earlytom_compile.config import EarlyTomConfig
from earlytom_compile.flops import count
from earlytom_compile.shapes import ModelShape, config_of, shape_of


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    size = TinySize(image=64, patch=16, vision_layers=2, vision_width=32, text_layers=1, text_width=64)
    return str(write_checkpoint(tmp_path_factory.mktemp("bench") / "tiny", size))


@pytest.fixture(params=["Dynamo", pytest.param("Inductor", marks=pytest.mark.long)])
def compiler(request, monkeypatch):
    if request.param == "Dynamo":
        leave_graphs_as_they_are(monkeypatch)


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.long)], ids=["in place", "both spellings"])
def plain_too(request, monkeypatch):
    """Whether arms are also compiled by plain torch.compile, which traces the whole model and takes longest."""
    if not request.param:
        choose = bench.choose

        def in_place(*asked):
            return [arm for arm in choose(*asked) if not arm.name.endswith("(backend)")]

        monkeypatch.setattr(bench, "choose", in_place)
    return request.param


@pytest.mark.usefixtures("sharing")
def test_bench_prints_and_writes_the_arms_it_is_asked_for(compiler, checkpoint, tmp_path, capsys):
    files = {name: str(tmp_path / f"bench.{name}") for name in ("json", "markdown", "trace")}
    arguments = ["bench", "--model", checkpoint, "--frames", "8", "--repeats", "2", "--decode-tokens", "1"]
    arguments += ["--lowering", "eager", "--retain-ratios", "0.25", "--arms", "transformers,earlytom"]
    for name, path in files.items():
        arguments += [f"--{name}", path]
    assert main(arguments) == 0
    printed, told = capsys.readouterr()
    content = json.loads(Path(files["json"]).read_text())
    (workload,) = content["workloads"]
    assert (content["model"], content["scene_frames"], content["redundancy"]) == (checkpoint, 4, 1.0)
    assert content["seconds"] > sum(result["cold"] for result in workload["results"])
    (seconds,) = re.findall(r"(\d+) s in all", printed)
    assert content["seconds"] - 1 <= int(seconds) <= content["seconds"] + 3, "the file is written a moment before"
    names = [result["name"] for result in workload["results"]]
    assert names == ["transformers", "earlytom 0.25", "earlytom 0.25 (backend)", "earlytom merging 0.25"]
    text = Path(files["markdown"]).read_text()
    assert all(f"| {name} |" in text and name in printed for name in names)
    assert all(len(result["ttft"]) == 2 and min(result["ttft"]) > 0 for result in workload["results"])
    assert workload["results"][1]["frames"][0][0] == 8
    tokens = [result["video_tokens"] for result in workload["results"]]
    assert tokens == [8 * 4, 8, 8, 8]
    for result in workload["results"]:
        breakdown = result["breakdown"]
        assert sum(breakdown["stages"].values()) + breakdown["overhead"] == pytest.approx(breakdown["wall"])
        assert result["floor"]["seconds"] > 0 and workload["ceilings"].keys() == {"copy", "matmul"}
        assert max(breakdown["stage_memory"].values()) == breakdown["memory"] > 0
        assert all(0 < encoder < ttft for encoder, ttft in zip(result["encoder"], result["ttft"], strict=True))
    assert printed.count("earlytom 0.25 (backend)") == 5 and "TTFT / floor" in text
    trace = json.loads(Path(files["trace"]).read_text())["traceEvents"]
    ranges = {event["name"] for event in trace if event.get("cat") == "user_annotation"}
    stages = ("vision encoding", "visual token processing", "LLM prefill")
    assert {*names, *(f"{name}: {stage}" for name in names for stage in stages)} <= ranges
    assert re.search(r"8 frames: 4 arms, a first call and 2 rounds of each, (about|less than) ", told)


@pytest.mark.usefixtures("sharing")
def test_other_papers_methods_beside_earlytom(plain_too, monkeypatch, tmp_path, capsys):
    """Tokens, operations and first tokens of each, by the real numbers of its calls."""
    leave_graphs_as_they_are(monkeypatch)
    size = TinySize(image=64, patch=16, vision_layers=2, vision_width=32, text_layers=3, text_width=64)
    checkpoint, file = str(write_checkpoint(tmp_path / "tiny", size)), tmp_path / "bench.json"
    arms = "transformers,earlytom 0.25,visionzip 0.25,fastv 0.25"
    words = ["bench", "--model", checkpoint, "--frames", "8", "--repeats", "1", "--decode-tokens", "1", "--arms", arms]
    assert (
        main(
            [
                *words,
                "--lowering",
                "eager",
                "--variant",
                "paper",
                "--retain-ratios",
                "0.25",
                "--strict",
                "--json",
                str(file),
            ]
        )
        == 0
    )
    (workload,) = json.loads(file.read_text())["workloads"]
    found = {result["name"]: result for result in workload["results"]}
    ours = ["earlytom 0.25", *(["earlytom 0.25 (backend)"] if plain_too else [])]
    assert list(found) == ["transformers", *ours, "visionzip 0.25", "fastv 0.25"]
    assert [result["video_tokens"] for result in found.values()] == [32, *(8 for _ in ours), 8, 32]
    # FastV: 33 rows of the video, newline included, in two layers, and a quarter of them in the other one.
    of_a_layer = [result["video_tokens_of_a_layer"] for result in found.values()]
    assert of_a_layer == [32, *(8 for _ in ours), 8, (2 * 32 + 8) / 3]
    shape = ModelShape.from_config(AutoConfig.from_pretrained(checkpoint))

    def exact(prompt, frames=(8,), **more):
        return count(shape, protocol="exact", frames_schedule=frames, llm_tokens=prompt, **more).total

    zipped = exact(8 + 33, method="visionzip", kept=8)
    (step,) = EarlyTomConfig(method="fastv", retain_ratio=0.25).steps_inside(3)
    assert step[:3] == (2, 0.25, "drop")
    inside = exact({0: 65, 2: 8 + 32}, method="fastv", kept=32) + 2 * (65 if step.scores == "all" else 1) * 65 * 64
    merged = exact(8 + 33, found["earlytom 0.25"]["frames"][0], merge_layers=found["earlytom 0.25"]["merge_layers"])
    expected = [exact(65), *(merged for _ in ours), zipped, inside]
    assert [result["floor"]["exact_flops"] for result in found.values()] == expected
    printed = capsys.readouterr()
    assert "fastv 0.25" in printed.out and "warning" not in printed.err
    assert all(result["breakdown"]["stages"] for result in found.values())


def test_a_checkpoint_without_a_tokenizer_is_enough(checkpoint, tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(checkpoint) / name, tmp_path)
    model = _model(build_parser().parse_args(["bench", "--model", str(tmp_path)]))
    assert model.config.model_type == "llava_onevision" and not model.training
    assert main(["explain", "--model", str(tmp_path)]) == 2
    assert f"the processor of '{tmp_path}' cannot be loaded" in capsys.readouterr().err


@pytest.fixture
def nothing_runs(monkeypatch):
    def never(arguments):
        raise AssertionError("the model was made before the mistake was found")

    monkeypatch.setattr(bench, "_model", never)


@pytest.mark.parametrize("flag", ["json", "markdown", "trace", "plot"])
def test_places_that_cannot_be_written_to_are_found_first(flag, nothing_runs, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["bench", f"--{flag}", str(tmp_path / "file" / "inside" / "out")]) == 2
    assert f"{flag}=" in capsys.readouterr().err
    if flag != "plot":
        assert main(["bench", f"--{flag}", str(tmp_path)]) == 2
        assert "that is a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given, stops",
    [
        ([], True),
        (["--arms", "transformers,earlytom 0.1,visionzip"], False),
        (["--arms", "earlytom,inductor"], True),
        (["--arms", "all"], True),
    ],
)
def test_inductors_arms_need_a_compiler_whatever_the_lowering(given, stops, monkeypatch):
    monkeypatch.setattr(toolchain, "missing_toolchain", lambda device: "no C++ compiler was found")
    arguments = build_parser().parse_args(["bench", "--lowering", "eager", *given])
    refused = pytest.raises(EarlyTomConfigError, match="--arms transformers,earlytom, which compile nothing")
    with refused if stops else nullcontext():
        bench._require_compiler(arguments, torch.device("cpu"), {"lowering": "eager"})


@pytest.mark.parametrize("command", ["bench", "flops", "eval"])
def test_ratios_are_given_by_one_name_everywhere(command):
    for name in ("--retain-ratio", "--retain-ratios"):
        assert build_parser().parse_args([command, name, "0.2,0.1"]).retain_ratios == (0.2, 0.1)


def test_a_missing_matplotlib_is_found_first(nothing_runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "--plot", str(tmp_path)]) == 2
    assert "--plot needs matplotlib" in capsys.readouterr().err


def test_a_trace_for_each_number_of_frames():
    assert _trace_path(Path("out/t.json"), None) == Path("out/t.json")
    assert _trace_path(Path("out/t.json"), 16) == Path("out/t-16-frames.json")


def test_a_model_whose_work_cannot_be_counted_has_no_floor(capsys, monkeypatch):
    config = config_of("cpu-small")
    config.vision_feature_layer = [-2, -1]
    monkeypatch.setattr(bench, "checked_config", lambda name: (name, config))
    assert bench._shape(SimpleNamespace(model="a/b", frame_size=None), Console()) is None
    assert "no floor:" in capsys.readouterr().out
    assert bench._ceilings(SimpleNamespace(model=None, shape=None)) == {}


@pytest.mark.parametrize(
    "name, beside",
    [
        pytest.param("qwen2.5", 2, marks=pytest.mark.long),
        ("qwen3", 9 * 5),
        pytest.param("qwen3.5", 9 * 5, marks=pytest.mark.long),
    ],
)
def test_a_model_of_qwen_is_timed_with_pictures_of_any_size(plain_too, monkeypatch, tmp_path, capsys, name, beside):
    leave_graphs_as_they_are(monkeypatch)
    monkeypatch.setattr(bench, "_ceilings", lambda session: {"matmul": 1e12, "copy": 1e11})
    file = tmp_path / "bench.json"
    words = ["--shape", f"cpu-tiny-{name}", "--frames", "9", "--frame-size", "16x32", "--retain-ratio", "0.25"]
    arms = ["--arms", "transformers,earlytom 0.25", "--lowering", "eager", "--repeats", "1", "--decode-tokens", "1"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the plain spelling compresses only forward()
        assert main(["bench", *words, *arms, "--json", str(file)]) == 0
    assert "9 frames in 5 temporal patches" in " ".join(capsys.readouterr().out.split())
    (workload,) = json.loads(file.read_text())["workloads"]
    full, ours = workload["results"][:2]
    prompt = 32 + beside + 5 * 8
    assert (full["cache_tokens"], full["beside"]) == (prompt, 32 + beside)
    assert (ours["cache_tokens"], ours["kept"]) == (prompt - 30, [10]) and ours["frames"][0][0] == 5
    shape = shape_of(f"cpu-tiny-{name}").of_size(16, 32)
    counted = count(shape, protocol="exact", frames_schedule=(5,), llm_tokens=prompt)
    assert full["floor"]["exact_flops"] == pytest.approx(counted.total)
    assert full["floor"]["encoder_flops"] == counted.encoder
    assert ours["floor"]["exact_flops"] < full["floor"]["exact_flops"]
    assert len(workload["results"]) == 2 + plain_too
    for other in workload["results"][2:]:  # the plain spelling: transformers encodes the video outside the graph
        assert (other["cache_tokens"], other["frames"], other["kept"]) == (prompt, [], [])


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["--frame-size", "16x30", "--shape", "cpu-tiny-qwen3"],
            "frame_size=16x30: height and width must be multiples",
        ),
        (["--frame-size", "16x32"], "frame_size=16x32: pictures of this model have one size"),
        (["--arms", "earlytom reuse", "--shape", "cpu-tiny-qwen3"], "no arm begins so"),
    ],
)
def test_what_a_model_cannot_have_is_refused(capsys, words, message):
    assert main(["bench", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_frame_size_is_two_numbers(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--frame-size", "168"])
    assert "must be height x width in pixels, as 168x280" in capsys.readouterr().err


def test_frames_are_the_shapes_own_unless_given():
    parse = build_parser().parse_args
    assert parse(["bench"]).frames is None and parse(["bench", "--frames", "8,16"]).frames == (8, 16)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--batch", "0"], "batch=0: must be at least 1"),
        (["--frames", "8,0"], "frames=0: must be at least 1"),
        (["--retain-ratios", "0.1,2"], r"retain_ratio=2.0: must be in (0, 1]"),
        (["--shape", "gpt"], "no shape 'gpt'"),
        (["--arms", "earlytom,vllm"], "arms='vllm': no arm begins so; there are transformers, inductor, earlytom 0.1"),
        (["--arms", "subsampling", "--concurrency", "2"], "arms='subsampling': no arm begins so"),
        (["--variant", "paper", "--merge-layers", "3,10"], "layer 10 does not exist"),
        (["--preset", "videomme", "--retain-ratios", "0.1,0.3"], "preset='videomme' with retain_ratio=0.3"),
        (["--shape", "cpu-tiny", "--model", "m"], "no checkpoint folder at 'm'"),
        (["--max-batch", "4"], "max_batch=4 without --concurrency"),
        (["--video", __file__, "--redundancy", "0.5"], "redundancy=0.5 with --video"),
        (["--video", __file__, "--scene-frames", "8"], "scene_frames=8 with --video"),
        (["--arms", "transformers", "--variant", "plus"], "variant with --arms transformers: none of them takes it"),
        (["--arms", "transformers", "--mode", "max-autotune"], "mode with --arms transformers: none of them takes it"),
        (["--arms", "transformers,inductor", "--retain-ratios", "0.2"], "they keep all tokens"),
        (["--variant", "paper", "--static-selection", "host", "--device", "cpu"], "static_selection='host' on cpu"),
        (["--mode", "reduce-overhead", "--device", "cpu"], "there are no CUDA graphs"),
        (["--method", "visionzip"], "method='visionzip': methods are arms of their own; say --arms visionzip"),
        (["--arms", "visionzip", "--variant", "plus"], "variant with --arms visionzip: none of them takes it"),
        (["--arms", "fastv 0.1", "--inner-layer", "2"], "inner_layer with --arms fastv 0.1: none of them takes it"),
        (["--arms", "pyramiddrop", "--shape", "cpu-tiny"], "with a language model of 2 layers"),
        (["--arms", "visionzip", "--concurrency", "2"], "arms='visionzip': no arm begins so"),
        (["--arms", "x"], "average pooling 0.1, visionzip 0.1, fastv 0.1"),
        (["--resume"], "--resume without --json FILE"),
        (["--resume", "--json", "-"], "--resume without --json FILE"),
        (["--video", "nowhere.mp4"], "nowhere.mp4"),
        (["--decode-tokens", "-1"], "decode_tokens=-1"),
        (["--concurrency", "2", "--trace", "t.json"], "trace='t.json' with --concurrency"),
    ],
)
def test_bench_says_what_is_wrong(arguments, says, nothing_runs, capsys):
    assert main(["bench", *arguments]) == 2
    assert says in capsys.readouterr().err
