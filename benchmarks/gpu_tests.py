"""The tests that compute on a GPU, with a result that is there while they run.

    python -m earlytom_compile.benchmarks.gpu_tests --json tests.json --markdown tests.md -k triton

Runs ``pytest -m gpu`` in the repository; further arguments are pytest's.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from earlytom_compile.benchmarks import markdown
from earlytom_compile.benchmarks.environment import environment

ROOT = Path(__file__).resolve().parents[1]
_EVERY = 2.0  # seconds between two writings
_SLOWEST = 10
_LEFT_OUT = ("tests/cli", "tests/toyworld")  # nothing there computes on a GPU, and it needs what a lent machine lacks
_JOBS = 8  # processes at most: each holds a CUDA context


class Recorder:
    """A pytest plugin that writes how many tests came out how, and what failed."""

    def __init__(self, about: dict[str, Any], json_file: Path | None, markdown_file: Path | None) -> None:
        self.about, self.json_file, self.markdown_file = about, json_file, markdown_file
        self.outcomes: Counter[str] = Counter()
        self.failures: list[dict[str, str]] = []
        self.seconds: Counter[str] = Counter()
        self._written = 0.0

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.when == "call" or report.outcome != "passed":
            outcome = "xfailed" if hasattr(report, "wasxfail") else report.outcome
            self.outcomes[outcome] += 1
            if outcome == "failed":
                self.failures.append({"test": report.nodeid, "says": report.longreprtext[-4000:]})
        if time.monotonic() - self._written > _EVERY:
            self.write()

    def pytest_sessionfinish(self) -> None:
        self.write()

    def write(self) -> None:
        """Both files, as far as the tests are."""
        self._written = time.monotonic()
        if self.json_file:
            content = {**self.about, "outcomes": self.outcomes, "failures": self.failures,
                       "slowest": dict(self.seconds.most_common(_SLOWEST))}  # fmt: skip
            self.json_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        if self.markdown_file:
            self.markdown_file.write_text(self.to_markdown(), encoding="utf-8")

    def to_markdown(self) -> str:
        """How many came out how, what failed, what took longest."""
        counts = [(outcome, str(count)) for outcome, count in sorted(self.outcomes.items())]
        slowest = [(test, f"{seconds:.1f}") for test, seconds in self.seconds.most_common(_SLOWEST)]
        lines = markdown.heading(self.about) + markdown.table("tests", ("outcome", "tests"), counts)
        lines += markdown.table("slowest", ("test", "seconds"), slowest)
        for failure in self.failures:
            lines += [f"{failure['test']}:", "", "```", failure["says"], "```", ""]
        return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tests; pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments, rest = parser.parse_known_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    os.chdir(ROOT)
    recorder = Recorder(environment(device), arguments.json, arguments.markdown)
    jobs = ["-n", str(min(_JOBS, max(1, (os.cpu_count() or 2) // 2)))] if find_spec("xdist") else []
    command = ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "-m", "gpu", *jobs]
    command += [f"--ignore={folder}" for folder in _LEFT_OUT]
    return int(pytest.main([*command, *rest], plugins=[recorder]))


if __name__ == "__main__":
    sys.exit(main())
