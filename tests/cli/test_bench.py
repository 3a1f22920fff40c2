"""``earlytom bench`` on a tiny checkpoint: every arm has its row, and every file what the table has."""

import json
from pathlib import Path

import pytest

from earlytom_compile.cli.main import build_parser, main
from earlytom_compile.cli.tiny_checkpoint import TinySize, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    size = TinySize(image=64, vision_layers=4, vision_width=32, text_layers=1, text_width=64)
    return str(write_checkpoint(tmp_path_factory.mktemp("bench") / "tiny", size))


def test_bench_prints_and_writes_every_arm(checkpoint, tmp_path, capsys):
    files = {name: str(tmp_path / f"bench.{name}") for name in ("json", "markdown")}
    arguments = ["bench", "--model", checkpoint, "--frames", "8", "--repeats", "2", "--decode-tokens", "1"]
    arguments += [
        "--lowering",
        "eager",
        "--retain-ratios",
        "0.25",
        "--json",
        files["json"],
        "--markdown",
        files["markdown"],
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    (workload,) = json.loads(Path(files["json"]).read_text())["workloads"]
    names = [result["name"] for result in workload["results"]]
    assert names[:4] == ["transformers", "inductor", "earlytom 0.25", "earlytom 0.25 (backend)"] and len(names) == 6
    text = Path(files["markdown"]).read_text()
    assert all(f"| {name} |" in text and name in printed for name in names)
    assert all(len(result["ttft"]) == 2 and min(result["ttft"]) > 0 for result in workload["results"])
    assert workload["results"][2]["frames"][0][0] == 8


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
        (["--decode-tokens", "-1"], "decode_tokens=-1"),
    ],
)
def test_bench_says_what_is_wrong(arguments, says, capsys):
    assert main(["bench", *arguments]) == 2
    assert says in capsys.readouterr().err
