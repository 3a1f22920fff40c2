"""What ``earlytom bench`` prints and writes: one table a workload, the same as JSON and Markdown, and plots.

| arm           | cold s | TTFT ms | min | max | speed | frames left | prompt | tokens/s | memory | recompiles |
| inductor      |   48.1 |    2902 | ... | ... | 1.00x |             |    820 |     21.0 |        |          0 |
| earlytom 0.1  |   31.0 |    1398 | ... | ... | 2.08x |         74% |    115 |     23.9 |        |          0 |
"""

import dataclasses
import datetime
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table

from ..errors import EarlyTomConfigError
from .measure import Result, speeds

REFERENCE = "inductor"
_HEADINGS = (
    "arm", "first call s", "TTFT ms", "range", "speed", "frames left", "prompt", "tokens/s", "peak GiB", "recompiles",
)  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """One model and video length, and what every arm took for it."""

    frames: int
    batch: int
    prompt_length: int
    results: list[Result]

    @property
    def title(self) -> str:
        """What was measured."""
        return f"{self.frames} frames, batch {self.batch}, {self.prompt_length} words beside the video"

    def rows(self) -> list[tuple[str, ...]]:
        """Cells of the table, a row for each arm."""
        speed = speeds(self.results, REFERENCE)
        return [_row(result, speed[result.name]) for result in self.results]


def _row(result: Result, speed: float) -> tuple[str, ...]:
    memory = "" if result.peak_memory is None else f"{result.peak_memory / 2**30:.2f}"
    return (
        result.name,
        f"{result.cold:.1f}",
        f"{1e3 * result.median:.0f}",
        f"{1e3 * min(result.ttft):.0f}-{1e3 * max(result.ttft):.0f}",
        f"{speed:.2f}x",
        "" if result.retention is None else f"{result.retention:.0%}",
        str(result.cache_tokens),
        "" if result.decode_rate is None else f"{result.decode_rate:.1f}",
        memory,
        str(result.recompiles),
    )


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions, date and command: what a number needs beside it."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "machine": gpu or f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["earlytom", *sys.argv[1:]]),
    }


def table(workload: Workload) -> Table:
    """For people at a terminal."""
    result = Table(title=workload.title, title_justify="left")
    for heading in _HEADINGS:
        result.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=heading == "arm")
    for row in workload.rows():
        result.add_row(*row)
    return result


def to_dict(workloads: Sequence[Workload], about: dict[str, Any]) -> dict[str, Any]:
    """For programs: every single time in seconds, memory in bytes."""
    return {**about, "workloads": [dataclasses.asdict(workload) for workload in workloads]}


def to_markdown(workloads: Sequence[Workload], about: dict[str, Any]) -> str:
    """For documents: the tables, and what they need beside them."""
    lines = [f"`{about['command']}`", ""]
    lines += [", ".join(f"{name} {value}" for name, value in about.items() if name != "command"), ""]
    for workload in workloads:
        lines += [f"{workload.title}:", "", _markdown_row(_HEADINGS), _markdown_row(["---"] * len(_HEADINGS))]
        lines += [*(_markdown_row(row) for row in workload.rows()), ""]
    return "\n".join(lines)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write_plots(workloads: Sequence[Workload], folder: Path) -> list[Path]:
    """Time to the first token against the number of frames, and of each arm; PNG files in ``folder``."""
    pyplot = _pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for workload in workloads:
        figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(workload.results) + 1.5), layout="constrained")
        names = [result.name for result in reversed(workload.results)]
        axes.barh(names, [1e3 * result.median for result in reversed(workload.results)])
        axes.set(xlabel="time to first token (ms)", title=workload.title)
        written.append(folder / f"ttft-{workload.frames}-frames.png")
        figure.savefig(written[-1], dpi=150)
        pyplot.close(figure)
    if len(workloads) > 1:
        figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
        for index, result in enumerate(workloads[0].results):
            medians = [1e3 * workload.results[index].median for workload in workloads]
            axes.plot([workload.frames for workload in workloads], medians, marker="o", label=result.name)
        axes.set(xlabel="frames", ylabel="time to first token (ms)", xscale="log", yscale="log")
        axes.legend()
        written.append(folder / "ttft-against-frames.png")
        figure.savefig(written[-1], dpi=150)
        pyplot.close(figure)
    return written


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise EarlyTomConfigError(
            "--plot needs matplotlib: pip install 'earlytom-compile[plot]' (or leave --plot out)."
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
