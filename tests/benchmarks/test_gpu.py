"""`make gpu` on a machine without one: whatever happens to a stage, what the others found is there."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest

from earlytom_compile.benchmarks import gpu
from earlytom_compile.benchmarks.gpu import STAGES, Folder, Stage, run_all, to_markdown, write_page

MOST_FILES = 8
"""That come back from a machine that is lent."""


@dataclass(frozen=True)
class Script(Stage):
    """A stage whose program is ``module``; it finds its two files in ``sys.argv``."""

    def command(self, out, dry_run):
        return [sys.executable, "-c", self.module, str(out / "running.json"), str(out / "running.md")]


WRITES = """
import json, sys
def write(number):
    open(sys.argv[1], "w").write(json.dumps({"number": number}))
    open(sys.argv[2], "w").write(f"The number is {number}.")
write(1)
"""
HANGS = WRITES + "print('about to hang', flush=True)\nimport time\nwhile True: time.sleep(60)"


def stages(**scripts):
    return {key: Script(f"stage {key}", 60, script) for key, script in scripts.items()}


def run(folder, limit=600, **scripts):
    return run_all(Folder(folder), stages(**scripts), limit, "abc1234", dry_run=True)


def test_every_stage_leaves_its_numbers_and_what_they_need_beside_them(tmp_path):
    results = run(tmp_path, a=WRITES, b=WRITES + "write(2)")
    assert [entry["result"] for entry in results.values()] == [{"number": 1}, {"number": 2}]
    assert all(entry["status"] == "passed" and entry["commit"] == "abc1234" for entry in results.values())
    beside = {"machine", "torch", "transformers", "python", "date", "command"}
    assert all(beside <= entry.keys() for entry in results.values())
    assert json.loads((tmp_path / "results.json").read_text()) == results
    text = (tmp_path / "results.md").read_text()
    assert "The number is 2." in text and "| a stage a | passed |" in text and "| e tests | has not run |" in text
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "results.md", "log.txt"}


def test_a_stage_that_fails_leaves_the_others_their_turn(tmp_path):
    results = run(tmp_path, a=WRITES + "print('why'); sys.exit(3)", b="import nothing_of_the_kind", c=WRITES)
    statuses = [entry["status"] for entry in results.values()]
    assert statuses == ["failed (exit status 3)", "failed (exit status 1)", "passed"]
    assert results["a"]["result"] == {"number": 1} and "why" in results["a"]["log"]
    assert results["b"]["result"] is None and "nothing_of_the_kind" in (tmp_path / "results.md").read_text()


def test_a_stage_that_takes_too_long_is_stopped_with_all_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_GRACE", 1)
    starts = """
import subprocess
open(sys.argv[1] + ".pid", "w").write(str(subprocess.Popen(["sleep", "600"]).pid))
"""
    late = Script("late", 2, WRITES + starts + HANGS)
    results = run_all(Folder(tmp_path), {"a": late, **stages(b=WRITES)}, 600, "", dry_run=True)
    assert results["a"]["status"] == "stopped after 2 s" and results["a"]["result"] == {"number": 1}
    assert "about to hang" in results["a"]["log"].splitlines() and results["b"]["status"] == "passed"
    assert not alive(int((tmp_path / "running.json.pid").read_text()))


def alive(pid):
    """Whether a process runs; one that has ended but was not waited for does not."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_no_stage_is_begun_without_time_for_it(tmp_path, capsys):
    results = run(tmp_path, limit=1, a=WRITES)
    assert results == {} and "go on with FROM=a" in capsys.readouterr().out


def test_without_a_gpu_it_says_so_and_begins_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "_card", lambda: None)
    with pytest.raises(SystemExit):
        gpu.main([str(tmp_path / "results")])
    assert "DRY=1" in capsys.readouterr().err and not (tmp_path / "results").exists()


DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_gpu import HANGS, WRITES, run
run(Path({folder!r}), a=WRITES, b=HANGS, c=WRITES)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_cut_in_the_middle_it_goes_on_where_it_was(tmp_path, how):
    driver = DRIVER.format(tests=os.path.dirname(__file__), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", driver])
    log = tmp_path / "log.txt"
    wait_for(lambda: log.exists() and "about to hang" in log.read_text().splitlines())
    pids = children(process.pid)
    process.send_signal(how)
    process.wait()
    wait_for(lambda: not any(map(alive, pids)))
    assert pids and len(list(tmp_path.iterdir())) <= MOST_FILES
    assert json.loads((tmp_path / "results.json").read_text())["a"]["result"] == {"number": 1}

    results = run(tmp_path, c=WRITES)
    assert {key: entry["status"] for key, entry in results.items()} == {
        "a": "passed", "b": "cut short", "c": "passed",
    }  # fmt: skip
    assert results["b"]["result"] == {"number": 1} and results["b"]["markdown"] == "The number is 1."

    again = run(tmp_path, b=WRITES + "write(2)", c=WRITES)
    assert again["b"]["result"] == {"number": 2} and list(again) == ["a", "b", "c"]


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "that did not happen"
        time.sleep(0.05)


def test_half_a_file_of_a_stage_that_was_killed_counts_as_none(tmp_path):
    results = run(tmp_path, a=WRITES + "open(sys.argv[1], 'w').write('{\"numb'); sys.exit(1)")
    assert results["a"]["result"] is None and results["a"]["markdown"] == "The number is 1."


def test_the_page_has_what_each_stage_said_last(tmp_path):
    run(tmp_path / "one", a=WRITES, b=WRITES)
    run(tmp_path / "two", b=WRITES + "write(2)")
    page = tmp_path / "gpu.md"
    write_page([tmp_path / "one", tmp_path / "two"], page)
    text = page.read_text()
    assert text.startswith("# What ran on a GPU\n")
    assert text.count("The number is 1.") == 1 and text.count("The number is 2.") == 1
    assert "| c kernels | has not run |" in text and "abc1234" in text
    with pytest.raises(SystemExit, match="no results.json there"):
        write_page([tmp_path / "three"], page)
    assert page.read_text() == text


def test_stages_fit_into_the_time_that_a_machine_is_lent_for():
    """Ten minutes a call, fifteen in all, and a machine takes a minute or two to start."""
    seconds = {key: stage.seconds for key, stage in STAGES.items()}
    assert gpu.LIMIT + gpu._GRACE < 600 and seconds["a"] == 60
    assert seconds["a"] + seconds["b"] + seconds["c"] < gpu.LIMIT and sum(seconds.values()) < 13 * 60


BARE = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("av", "depyf", "mypy", "ruff"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""


def test_the_whole_script_runs_dry(tmp_path, monkeypatch):
    """As ``make gpu DRY=1``, where packages are missing that a lent machine lacks."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "sitecustomize.py").write_text(BARE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "bare"))
    tmp_path /= "results"
    command = [sys.executable, gpu.__file__, str(tmp_path), "--dry-run", "--commit", "abc1234", "--limit", "1000"]
    done = subprocess.run(command, capture_output=True, text=True)
    results = json.loads((tmp_path / "results.json").read_text())
    assert done.returncode == 0, (tmp_path / "log.txt").read_text()
    assert list(results) == list(STAGES) and len(list(tmp_path.iterdir())) <= MOST_FILES
    assert all(row["right"] for row in results["a"]["result"]["rows"])
    (workload,) = results["b"]["result"]["workloads"]
    names = [arm["name"] for arm in workload["results"]]
    assert names[0] == "transformers" and "earlytom 0.1, reduce-overhead" in names
    assert all(arm["breakdown"] and arm["floor"] for arm in workload["results"])
    assert results["c"]["result"]["prefill"]["share"] > 0 and results["c"]["result"]["rows"]
    rows = {row["arm"]: row for row in results["d"]["result"]["rows"]}
    assert list(rows) == ["tower", "encode_ratio 1", "encode_ratio 0.5", "as it changes"]
    assert all(row["seconds"] and not row["failure"] for row in rows.values())
    outcomes = results["e"]["result"]["outcomes"]  # skipped where Triton's interpreter and numpy do not fit
    assert outcomes and outcomes.keys() <= {"passed", "skipped"}
    assert [load["concurrency"] for load in results["f"]["result"]["loads"]] == [1, 2]
    text = to_markdown(results)
    assert text in done.stdout and all(f"## {key} " in text for key in STAGES)
