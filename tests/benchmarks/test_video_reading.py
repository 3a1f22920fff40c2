"""The cost of reading a video is that of the process which reads it."""

import subprocess

import av
import pytest

from earlytom_compile.benchmarks.video_reading import draw, main, measured


def test_a_process_that_takes_memory_and_time_costs_both():
    idle = measured("pass")
    busy = measured(
        "import time; block = b'1' * 300_000_000; a = time.process_time()\nwhile time.process_time() < a + 0.5: pass"
    )
    assert busy.memory - idle.memory > 290e6
    assert busy.processor - idle.processor > 0.4 and busy.waited > 0.4


def test_a_way_that_fails_has_no_cost():
    with pytest.raises(subprocess.CalledProcessError):
        measured("raise SystemExit(3)")


def test_each_way_reads_each_video(tmp_path, capsys):
    film = tmp_path / "film.mp4"
    draw(film, 64, 48, 40)
    with av.open(str(film)) as container:
        assert container.streams.video[0].frames == 40
    assert main([str(film), "--frames", "8"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "film.mp4" in line]
    assert [row[1] for row in rows] == ["decoding everything", "read_video", "read_video, 384x384 while decoding"]
    assert all("40 frames" in row[0] for row in rows)
