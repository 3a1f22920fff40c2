"""What a video costs against its frames: the table, the line through it, and a run of the program."""

import pytest
import torch
from without_inductor import leave_pieces_as_they_are

from earlytom_compile.benchmarks import long_videos
from earlytom_compile.benchmarks.long_videos import Cost, linearity, rows


def costs_of(seconds_of):
    return [Cost(frames, seconds_of(frames), 3 << 20, 1 << 19) for frames in (8, 32, 128, 512)]


def test_a_line_is_found_and_a_curve_is_told_from_it():
    line = linearity(costs_of(lambda frames: 0.25 + 0.125 * frames))
    assert line.startswith("seconds = 0.250 + 0.12500 x frames, at most 0% off")
    curve = linearity(costs_of(lambda frames: 1e-4 * frames**2))
    assert curve.endswith("frames^2.00") and "at most 0% off" not in curve
    assert linearity(costs_of(float)[:1]) == "one number of frames: no line"


def test_the_table_has_a_row_for_each_number_of_frames():
    headings, cells = rows([Cost(16, 0.5, 3 << 20, 1 << 19), Cost(32, 2.0, None, 1 << 20)])
    assert all(len(row) == len(headings) for row in cells)
    assert cells == [["16", "0.50", "31.2", "3", "0.5"], ["32", "2.00", "62.5", "unknown", "1.0"]]


@pytest.mark.parametrize("shape", [pytest.param("cpu-tiny", marks=pytest.mark.long), "cpu-tiny-qwen3"])
def test_the_program_prints_both(monkeypatch, capsys, shape):
    leave_pieces_as_they_are(monkeypatch)
    assert long_videos.main(["--shape", shape, "--frames", "8,12", "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    hidden = {"cpu-tiny": 12 * 36, "cpu-tiny-qwen3": 6 * 60}[shape] * 32 * torch.float32.itemsize
    assert f"{hidden / 2**20:.1f} |" in printed and "| 12 |" in printed and "x frames, at most" in printed
