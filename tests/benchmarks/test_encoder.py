"""Encoders that compute some patches: each what it is called, in turn, and beside the work that it has."""

import json
from types import SimpleNamespace

import pytest
import torch
from generating import trace_of_video_rows
from shared_towers import share_towers

from earlytom_compile.benchmarks import encoder
from earlytom_compile.benchmarks.encoder import Row, cells, is_wrong, main, still_pixels, to_markdown
from earlytom_compile.config import EarlyTomConfig
from earlytom_compile.flops import Reuse, count
from earlytom_compile.shapes import shape_of

TINY = ["--shape", "cpu-tiny", "--device", "cpu", "--lowering", "eager"]


@pytest.fixture(scope="module")
def one_trace():
    return trace_of_video_rows()


@pytest.fixture(scope="module")
def measured(one_trace, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    files = [f"--{kind}={folder / kind}" for kind in ("json", "markdown")]
    with pytest.MonkeyPatch.context() as patch:
        share_towers(one_trace, patch)
        assert main([*TINY, "--frames", "6", "--ratios", "1", "0.5", "0.01", "--repeats", "2", *files]) == 0
    return json.loads((folder / "json").read_text()), (folder / "markdown").read_text()


def test_every_budget_is_kept_and_its_work_is_counted(measured):
    content, text = measured
    rows = {row["arm"]: row for row in content["rows"]}
    shape = shape_of("cpu-tiny")
    assert {name: row["computed"] for name, row in rows.items() if name != "as it changes"} == {
        "tower": 216, "encode_ratio 1": 216, "encode_ratio 0.5": 108, "encode_ratio 0.01": 36,
    }  # fmt: skip
    assert 36 < rows["as it changes"]["computed"] < 150
    assert rows["tower"]["error"] == 0 and rows["encode_ratio 1"]["error"] < 1e-5
    assert rows["encode_ratio 0.5"]["error"] is None
    full = count(shape, protocol="exact", frames_schedule=(6,), llm_tokens=0).encoder
    in_full = EarlyTomConfig(reuse=True).resolve_full_layers(4)
    half = count(shape, protocol="exact", frames_schedule=(6,), llm_tokens=0, reuse=Reuse(108, in_full)).encoder
    assert rows["tower"]["work"] == rows["encode_ratio 1"]["work"] == full and rows["encode_ratio 0.5"]["work"] == half
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in rows.values())
    assert "| encode_ratio 0.5 | 108 |" in text and f"| {half / full:.0%} |" in text and "cpu-tiny, 6 frames" in text


def test_what_stands_before_the_camera_stands_still_but_for_a_part():
    pixels = still_pixels(5, 98)
    assert pixels.shape == (5, 3, 98, 98) and pixels.abs().max() <= 1
    moved = ((pixels[1:] - pixels[:-1]).abs().amax(1) > 0.1).float().mean((1, 2))
    assert moved.min() > 0.05 and moved.max() < 0.3
    assert still_pixels(2, 24).shape == (2, 3, 24, 24)


def test_time_beside_work_has_a_verdict_on_a_gpu_only():
    full, half = Row("inductor", 100, 10.0, [1.0, 1.1, 0.9]), Row("encode_ratio 0.5", 50, 6.0, [0.66])
    assert cells(full, full, True) == ("inductor", "100", "1000.0", "900.0-1100.0", "100%", "100%", "1.00", "")
    assert cells(half, full, True)[4:7] == ("66%", "60%", "1.10, met")
    assert cells(half, full, False)[6] == "1.10"
    half.seconds = [0.8]
    assert cells(half, full, True)[6] == "1.33, MISSED"
    assert cells(half, Row("inductor", 0, 0.0, failure="none"), True)[4:7] == ("", "", "")


def test_an_arm_that_breaks_says_so_and_the_others_go_on(capsys):
    def breaks(pixels):
        raise RuntimeError("no such kernel\nand more")

    pixels, whole = torch.zeros(2, 3, 24, 24), torch.ones(2, 36, 32)
    arms = {"tower": lambda pixels: whole, "encode_ratio 0.5": breaks, "wrong": lambda pixels: 2 * whole}
    rows = encoder.first_calls(arms, pixels, shape_of("cpu-tiny"), whole)
    assert [row.failure for row in rows] == ["", "RuntimeError: no such kernel", ""]
    assert [is_wrong(row, torch.float32) for row in rows] == [False, True, True]
    rows[0].seconds = [1.0]
    text = to_markdown({"command": "c", "shape": "s", "frames": 2}, rows, True)
    assert "| encode_ratio 0.5 | RuntimeError: no such kernel |" in text and "| wrong | not timed |" in text


def test_the_tower_is_compiled_where_the_others_are(monkeypatch):
    compiled = []
    monkeypatch.setattr(encoder.torch, "compile", lambda tower, **how: compiled.append(how) or tower)
    monkeypatch.setattr(encoder.earlytom_compile, "compile_tower", lambda tower, **options: options)
    tower = lambda pixels: SimpleNamespace(last_hidden_state=pixels)  # noqa: E731
    arms = encoder.encoders(tower, (0.5,), {"lowering": "staged"})
    assert list(arms) == ["inductor", "encode_ratio 0.5", "as it changes"] and compiled == [{"dynamic": False}]
    assert arms["encode_ratio 0.5"] == {"variant": "plus", "lowering": "staged", "encode_ratio": 0.5}
    assert arms["as it changes"] == {"variant": "plus", "lowering": "staged"}
    assert list(encoder.encoders(tower, (), {"lowering": "eager"})) == ["tower", "as it changes"]
