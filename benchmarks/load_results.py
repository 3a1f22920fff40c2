"""What ``earlytom bench --concurrency`` prints and writes: one table a number of clients, and plots over all of them.

The numbers here are made up:

| model        | requests/s | range     | speed | TTFT p50/p90/p99 ms | answer p50/p90/p99 ms | batch | frames left | ..
| inductor     |       1.81 | 1.79-1.84 | 1.00x | 4102 / 4210 / 4220  | 4391 / 4480 / 4492    |     8 |             | ..
| earlytom 0.1 |       5.21 | 5.18-5.23 | 2.88x | 1407 / 1433 / 1440  | 1530 / 1552 / 1559    |     8 |         75% | ..
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from earlytom_compile.benchmarks import markdown
from earlytom_compile.benchmarks.load import PERCENTILES, REQUESTS_EACH, LoadResult, percentiles
from earlytom_compile.benchmarks.result_plots import pyplot_without_screen
from earlytom_compile.benchmarks.results import REFERENCE

_PERCENTILES = "/".join(f"p{share}" for share in PERCENTILES)
_HEADINGS = (
    "model", "requests/s", "range", "speed", f"TTFT {_PERCENTILES} ms", f"answer {_PERCENTILES} ms", "batch",
    "frames left", "patches computed", "recompiles",
)  # fmt: skip


@dataclass(frozen=True)
class Load:
    """One number of clients, and how every server did."""

    frames: int
    prompt_length: int
    new_tokens: int
    max_batch: int
    concurrency: int
    results: list[LoadResult]

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Load":
        """One of those that :func:`load_to_dict` wrote."""
        known = {entry.name: content[entry.name] for entry in dataclasses.fields(cls)}
        names = [entry.name for entry in dataclasses.fields(LoadResult)]
        results = [LoadResult(**{name: result[name] for name in names}) for result in content["results"]]
        return cls(**{**known, "results": results})

    @property
    def title(self) -> str:
        """What was measured."""
        clients = "1 client" if self.concurrency == 1 else f"{self.concurrency} clients"
        return (
            f"{clients}, batches of up to {self.max_batch}, "
            f"{self.concurrency * REQUESTS_EACH} requests a round, {self.frames} frames, "
            f"up to {self.prompt_length} words beside the video, answers of {self.new_tokens} tokens"
        )

    @property
    def failures(self) -> list[str]:
        """Who failed, and why."""
        return [f"{result.name}: {result.failure}" for result in self.results if result.failure]

    def rows(self) -> list[tuple[str, ...]]:
        """Cells of the table, a row for each server."""
        reference = next((result.rate for result in self.results if result.name == REFERENCE), None)
        return [_row(result, reference) for result in self.results]


def _row(result: LoadResult, reference: float | None) -> tuple[str, ...]:
    rate = result.rate
    if rate is None:
        return (result.name, "failed", *[""] * (len(_HEADINGS) - 2))
    return (
        result.name,
        f"{rate:.2f}",
        f"{min(result.rates):.2f}-{max(result.rates):.2f}",
        "" if reference is None else f"{rate / reference:.2f}x",
        _milliseconds(result.ttft),
        _milliseconds(result.latency),
        f"{result.batch:.3g}",
        "" if result.retention is None else f"{result.retention:.0%}",
        "" if result.computed is None else f"{result.computed:.0%}",
        str(result.recompiles),
    )


def _milliseconds(seconds: Sequence[float]) -> str:
    return " / ".join(f"{1e3 * value:.0f}" for value in percentiles(seconds))


def load_table(load: Load) -> Table:
    """For people at a terminal."""
    table = Table(title=load.title, title_justify="left")
    for heading in _HEADINGS:
        table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=heading == "model")
    for row in load.rows():
        table.add_row(*row)
    if load.failures:
        table.caption, table.caption_justify = escape("\n".join(load.failures)), "left"
    return table


def load_to_dict(loads: Sequence[Load], about: dict[str, Any]) -> dict[str, Any]:
    """For programs: every single time in seconds, and what the tables make of them."""
    return {**about, "percentiles": list(PERCENTILES), "loads": [_load_to_dict(load) for load in loads]}


def _load_to_dict(load: Load) -> dict[str, Any]:
    results = [
        {
            **dataclasses.asdict(result),
            "requests_per_second": result.rate,
            "ttft_percentiles": None if result.failure else percentiles(result.ttft),
            "latency_percentiles": None if result.failure else percentiles(result.latency),
        }
        for result in load.results
    ]
    return {**dataclasses.asdict(load), "results": results}


def load_to_markdown(loads: Sequence[Load], about: dict[str, Any]) -> str:
    """For documents: the tables, and what they need beside them."""
    lines = markdown.heading(about)
    for load in loads:
        lines += markdown.table(load.title, _HEADINGS, load.rows())
        lines += [f"- {failure}" for failure in load.failures] + [""] * bool(load.failures)
    return "\n".join(lines)


def write_load_plots(loads: Sequence[Load], folder: Path) -> list[Path]:
    """Requests a second and time to the first token against clients; a PNG file in ``folder`` for each video length."""
    pyplot = pyplot_without_screen()
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for frames in sorted({load.frames for load in loads}):
        figure, (rates, waits) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
        chosen = [load for load in loads if load.frames == frames]
        for index in range(len(chosen[0].results)):
            _plot_server(rates, waits, [load.results[index] for load in chosen])
        ticks = [load.concurrency for load in chosen]
        for axes, what in ((rates, "requests/s"), (waits, "time to first token (ms)")):
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.set(xlabel="clients", ylabel=what, yscale="log")
            axes.grid(alpha=0.3)
        rates.legend()
        waits.set_title("p50, dashed: p99")
        figure.suptitle(f"{frames} frames, batches of up to {chosen[0].max_batch}")
        written.append(folder / f"load-{frames}-frames.png")
        figure.savefig(written[-1], dpi=150)
        pyplot.close(figure)
    return written


def _plot_server(rates: Any, waits: Any, results: Sequence[LoadResult]) -> None:
    """One server's lines, with gaps where it failed."""
    clients = [result.concurrency for result in results]
    missing = [float("nan")] * len(PERCENTILES)
    spread = [missing if result.failure else percentiles(result.ttft) for result in results]
    heights = [float("nan") if result.rate is None else result.rate for result in results]
    (line,) = rates.plot(clients, heights, marker="o", label=results[0].name)
    for share, style in ((50, "-"), (99, "--")):
        index = PERCENTILES.index(share)
        waits.plot(clients, [1e3 * values[index] for values in spread], style, marker="o", color=line.get_color())
