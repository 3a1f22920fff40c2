"""All that only a GPU can tell, in order of worth, for a machine that is there for minutes and has no network.

    make gpu OUT=results             every stage: smoke, prefill, kernels, encoder, tests, load
    make gpu OUT=results FROM=c      goes on with the third
    make gpu-page OUT="results"      writes docs/gpu.md; several folders, the later one counts

    results/results.json, .md        every stage so far: how it ended, command, machine, versions, commit, numbers
    results/log.txt                  what the stages printed
    results/running.json, .md        of the stage that runs, or ran when somebody pulled the plug

A stage is a process of its own with a time limit; it writes what it has again and again, so that whoever stops it
keeps that. This program imports neither torch nor anything of ours: what breaks a stage leaves the others alone.
"""

import argparse
import contextlib
import ctypes
import datetime
import importlib.metadata
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "gpu.md"
LIMIT = 570
"""Seconds of one run, unless somebody says otherwise: machines are lent for calls of ten minutes."""
_LEAST = 20  # seconds that a stage is begun for
_GRACE = 10  # seconds that an interrupted stage has to say what it has
_TAIL = 20  # lines of the log under a stage that did not pass

Entry = dict[str, Any]
Results = dict[str, Entry]


@dataclass(frozen=True)
class Stage:
    """A program that writes ``--json FILE --markdown FILE``."""

    title: str
    seconds: float
    module: str
    arguments: tuple[str, ...] = ()
    dry: tuple[str, ...] = ()  # arguments of the dry run: on a CPU, everything tiny

    def command(self, out: Path, dry_run: bool) -> list[str]:
        files = ["--json", str(out / "running.json"), "--markdown", str(out / "running.md")]
        return [sys.executable, "-m", self.module, *(self.dry if dry_run else self.arguments), *files]


_BENCHMARKS = "earlytom_compile.benchmarks"
STAGES = {
    "a": Stage("smoke", 60, f"{_BENCHMARKS}.smoke", dry=("--tiny",)),
    "b": Stage(
        "prefill", 240, f"{_BENCHMARKS}.prefill",
        dry=("--shape", "cpu-tiny", "--repeats", "1", "--lowering", "eager", "--arms", "transformers,earlytom"),
    ),
    "c": Stage("kernels", 100, f"{_BENCHMARKS}.kernels", dry=("--quick", "--device", "cpu", "--frames", "5")),
    "d": Stage(
        "encoder", 90, f"{_BENCHMARKS}.encoder",
        dry=("--shape", "cpu-tiny", "--frames", "4", "--ratios", "1", "0.5", "--repeats", "1", "--device", "cpu",
             "--lowering", "eager"),
    ),
    "e": Stage(
        "tests", 130, f"{_BENCHMARKS}.gpu_tests",
        dry=("tests/kernels/test_triton_merge_frames.py", "-k", "refuses", "-n", "0"),
    ),
    "f": Stage(
        "load", 150, "earlytom_compile.cli.main",
        ("bench", "--shape", "llava-onevision-0.5b", "--frames", "64", "--max-batch", "8", "--concurrency", "1,8,32",
         "--retain-ratios", "0.1", "--repeats", "2"),
        ("bench", "--shape", "cpu-tiny", "--frames", "4", "--max-batch", "2", "--concurrency", "1,2", "--repeats", "1",
         "--lowering", "eager", "--arms", "transformers,earlytom", "--device", "cpu"),
    ),
}  # fmt: skip


class Folder:
    """Where results are, and how they get there: always whole, whenever somebody looks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log = path / "log.txt"
        path.mkdir(parents=True, exist_ok=True)

    def load(self) -> Results:
        """Of every stage, a stage that somebody stopped together with this program included."""
        results: Results = _read_json(self.path / "results.json") or {}
        cut = next((entry for entry in results.values() if entry["status"] == "running"), None)
        if cut:
            cut["status"] = "cut short"
            cut.update(self._found())
        return results

    def save(self, results: Results) -> None:
        _write(self.path / "results.json", json.dumps(results, indent=1) + "\n")
        _write(self.path / "results.md", to_markdown(results))

    def take(self) -> Entry:
        """What the stage left, which is in ``results.json`` from now on."""
        found = self._found()
        for suffix in ("json", "md"):
            (self.path / f"running.{suffix}").unlink(missing_ok=True)
        return found

    def _found(self) -> Entry:
        text = self.path / "running.md"
        return {
            "result": _read_json(self.path / "running.json"),
            "markdown": text.read_text(encoding="utf-8") if text.exists() else "",
        }


def _read_json(path: Path) -> Any:
    # A stage that is killed while it writes leaves half a file.
    with contextlib.suppress(OSError, json.JSONDecodeError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None


def _write(path: Path, text: str) -> None:
    """All of it or nothing."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def run(stage: Stage, folder: Folder, seconds: float, dry_run: bool) -> Entry:
    """One stage: how it ended and how long it took. Never raises."""
    start = time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
    with folder.log.open("ab") as log:
        log.write(f"\n=== {stage.title}: {shlex.join(stage.command(folder.path, dry_run))}\n".encode())
        log.flush()
        process = subprocess.Popen(
            stage.command(folder.path, dry_run), stdout=log, stderr=log, cwd=ROOT, env=environment,
            process_group=0, preexec_fn=_die_with_parent,
        )  # fmt: skip
        try:
            status = "passed" if process.wait(seconds) == 0 else f"failed (exit status {process.returncode})"
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
        finally:
            _stop(process)
    return {"status": status, "seconds": round(time.monotonic() - start, 1)}


def _die_with_parent() -> None:
    """Else a stage whose program is killed would go on, and take the GPU from whoever continues."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the stage to end, then kill whatever is left of it and the processes it started."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            process.send_signal(signal.SIGINT)
            process.wait(_GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_all(folder: Folder, stages: dict[str, Stage], limit: float, commit: str, dry_run: bool) -> Results:
    """Every stage of ``stages`` while there is time; those that ``folder`` has from before stay."""
    deadline, results = time.monotonic() + limit, folder.load()
    folder.take()
    about = _about(commit)
    for key, stage in stages.items():
        left = deadline - time.monotonic()
        if left < _LEAST:
            print(f"{key} {stage.title}: no time left; go on with FROM={key}", flush=True)
            break
        entry = {"title": stage.title, "command": shlex.join(stage.command(folder.path, dry_run)), **about}
        folder.save({**results, key: {**entry, "status": "running", "seconds": 0, "result": None, "markdown": ""}})
        print(f"{key} {stage.title}: at most {min(left, stage.seconds):.0f} s ...", flush=True)
        entry |= run(stage, folder, min(left, stage.seconds), dry_run)
        results[key] = {**entry, **folder.take(), "log": "" if entry["status"] == "passed" else _end_of(folder.log)}
        folder.save(results)
        print(f"{key} {stage.title}: {entry['status']}, {entry['seconds']:.0f} s", flush=True)
    return results


def _end_of(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:])


def _about(commit: str) -> Entry:
    """What every number needs beside it; torch itself is not asked, which takes seconds to import."""
    versions = {}
    for package in ("torch", "triton", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"machine": _card() or "no GPU", "commit": commit or _commit() or "unknown", **versions,
            "python": ".".join(map(str, sys.version_info[:3])), "date": now}  # fmt: skip


def _card() -> str | None:
    """Name and driver, such as "NVIDIA H100 80GB HBM3, 580.159.04"."""
    said = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    return said.splitlines()[0] if said else None


def _commit() -> str | None:
    head = _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "-uno")
    return f"{head}, changed" if head and changed else head


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def to_markdown(results: Results) -> str:
    """A table of the stages, and under it what each found."""
    lines = ["| stage | | seconds | machine | torch | commit | date |", "|---|---|---|---|---|---|---|"]
    for key, stage in STAGES.items():
        entry = results.get(key)
        if entry is None:
            lines.append(f"| {key} {stage.title} | has not run | | | | | |")
            continue
        cells = (entry["status"], f"{entry['seconds']:.0f}", entry["machine"], entry.get("torch", ""),
                 entry["commit"], entry["date"])  # fmt: skip
        lines.append(f"| {key} {entry['title']} | " + " | ".join(cells) + " |")
    for key, entry in sorted(results.items()):
        lines += ["", f"## {key} {entry['title']}: {entry['status']}", ""]
        lines += [entry["markdown"].strip() or f"`{entry['command']}`\n\nIt left no numbers."]
        if entry.get("log"):
            lines += ["", "The end of its log:", "", "```", entry["log"], "```"]
    return "\n".join(lines) + "\n"


def write_page(folders: Sequence[Path], page: Path = PAGE) -> None:
    """All results as one page; of a stage that ran more than once, what the last folder says."""
    results: Results = {}
    for folder in folders:
        if not (folder / "results.json").exists():
            sys.exit(f"{folder}: no results.json there; name the folders that `make gpu` wrote (OUT=...).")
        results |= Folder(folder).load()
    head = "# What ran on a GPU\n\nWritten by `make gpu-page` from what `make gpu` found.\n\n"
    _write(page, head + to_markdown(results))
    print(f"wrote {page}")


def install() -> None:
    """Make ``import earlytom_compile`` work in this Python, from what lies here: no network, no dependencies."""
    if importlib.util.find_spec("earlytom_compile") is None:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
        subprocess.run([*command, "--editable", str(ROOT)], check=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages, or write the page; 1 when a stage did not pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="+", metavar="FOLDER", help="of the results")
    parser.add_argument("--start", choices=STAGES, default="a", help="the first stage to run (%(default)s)")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of all stages together (%(default)s)")
    parser.add_argument("--commit", default="", help="what is measured, where git cannot tell")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, everything tiny: whether it all works")
    parser.add_argument("--page", action="store_true", help="run nothing: write docs/gpu.md from the folders")
    arguments = parser.parse_args(argv)
    if arguments.page:
        write_page(arguments.out)
        return 0
    if len(arguments.out) > 1:
        parser.error("name one folder to write to")
    if not arguments.dry_run and _card() is None:
        parser.error("nvidia-smi finds no GPU here; DRY=1 (--dry-run) tries everything on a CPU, with tiny sizes")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the stage is stopped too
    install()
    stages = {key: stage for key, stage in STAGES.items() if key >= arguments.start}
    folder = Folder(arguments.out[0])
    results = run_all(folder, stages, arguments.limit, arguments.commit, arguments.dry_run)
    print((folder.path / "results.md").read_text(encoding="utf-8"))
    return int(any(results.get(key, {"status": "not run"})["status"] != "passed" for key in stages))


if __name__ == "__main__":
    sys.exit(main())
