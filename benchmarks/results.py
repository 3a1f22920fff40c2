"""What ``earlytom bench`` prints and writes: five tables a workload, the same as JSON and Markdown.

Plots are in result_plots.py.

The numbers here are made up:

| arm           | compile s | first call s | TTFT ms | range     | vs inductor | vs eager | frames left | ...
| inductor      |      45.3 |         48.1 |    2902 | 2890-2950 |       1.00x |    1.10x |             | ...
| earlytom 0.1  |      29.8 |         31.0 |    1398 | 1390-1401 |       2.08x |    2.28x |         75% | ...

| arm           | video tokens | a layer | of all | exact TFLOP | of full | TTFT ms | of full time
| inductor      |         1568 |    1568 |   100% |       2.513 |    100% |    2902 |         100%
| earlytom 0.1  |          157 |     157 |    10% |       0.846 |     34% |    1398 |          48%

| arm           | patches computed | encoder ms | range     | of its time | TFLOP | of its work | time / work
| inductor      |                  |       1900 | 1890-1930 |        100% |  1.20 |        100% |        1.00
| earlytom 0.1  |              31% |        700 |   690-710 |         37% |  0.42 |         35% |   1.05, met

| arm           | vision encoding | token processing | LLM prefill | overhead | profiled ms | TFLOP | of full | ...
| inductor      |       900 (30%) |          60 (2%) |  1960 (66%) |  60 (2%) |        2980 |   1.2 |    100% | ...

| arm           | vision encoding | token processing | LLM prefill | whole call | device GiB |
| inductor      |      120 (100%) |       100 (100%) |  110 (100%) | 120 (100%) |            |
| earlytom 0.1  |       118 (98%) |         90 (90%) |    20 (18%) |  118 (98%) |            |
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from earlytom_compile.benchmarks import markdown
from earlytom_compile.benchmarks.breakdown import NOT_SEPARABLE, STAGES, Breakdown
from earlytom_compile.benchmarks.measure import Result, speeds

REFERENCE, EAGER = "inductor", "transformers"
"""Arms with all tokens, which the others are compared with."""
MOST_TIME_FOR_WORK = 1.25
"""What an encoder's share of the time is to be at most, in its shares of the work."""
_HEADINGS = (
    "arm", "compile s", "first call s", "TTFT ms", "range", f"vs {REFERENCE}", "vs eager", "frames left",
    "video tokens", "tokens/s", "compiled later",
)  # fmt: skip
_COST_HEADINGS = (
    "arm", "video tokens", "a layer", "of all", "exact TFLOP", "of full", "TTFT ms", "of full time",
)  # fmt: skip
_COST_TITLE = (
    "video tokens that enter the language model, and that a layer of it sees on average; all operations of the prefill"
)
_ENCODER_HEADINGS = (
    "arm", "patches computed", "encoder ms", "range", "of its time", "TFLOP", "of its work", "time / work",
)  # fmt: skip
_ENCODER_TITLE = (
    f"the vision encoder of the timed calls beside {REFERENCE}'s: its share of the time over its share of the work, at "
    f"most {MOST_TIME_FOR_WORK:g}"
)
_BREAKDOWN_HEADINGS = (
    "arm", "vision encoding", "token processing", "LLM prefill", "overhead", "profiled ms", "TFLOP", "of full",
    "GB", "floor ms", "TTFT / floor",
)  # fmt: skip
_MEMORY_HEADINGS = ("arm", "vision encoding", "token processing", "LLM prefill", "whole call", "device GiB")
_MEMORY_TITLE = f"peak memory of the profiled call: MiB beyond what was there before it (share of {REFERENCE}'s)"


@dataclass(frozen=True)
class Workload:
    """One model and video length, and what every arm took for it."""

    frames: int
    batch: int
    prompt_length: int
    results: list[Result]
    dtype: str = ""
    ceilings: dict[str, float] = field(default_factory=dict)  # operations and bytes a second
    complete: bool = True  # else somebody stopped it, and it can be gone on with
    pictures: int = 1  # of the video that make a frame of the encoder

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Workload":
        """One of those that :func:`to_dict` wrote."""
        known = {entry.name: content[entry.name] for entry in dataclasses.fields(cls) if entry.name in content}
        return cls(**{**known, "results": [Result.from_dict(result) for result in content["results"]]})

    @property
    def title(self) -> str:
        """What was measured."""
        video = f"{self.frames} frames"
        if self.pictures > 1:
            video += f" in {-(-self.frames // self.pictures)} temporal patches"
        return f"{video}, batch {self.batch}, {self.prompt_length} words beside the video"

    def rows(self) -> list[tuple[str, ...]]:
        """Cells of the table, a row for each arm."""
        compiled, eager = speeds(self.results, REFERENCE), speeds(self.results, EAGER)
        return [
            _row(result, (compiled.get(result.name), eager.get(result.name)), self.video_tokens(result))
            for result in self.results
        ]

    @property
    def measured(self) -> list[Result]:
        """What did not fail."""
        return [result for result in self.results if not result.failure]

    @property
    def reference(self) -> Result | None:
        """All tokens, compiled, if that did not fail."""
        return next((result for result in self.measured if result.name == REFERENCE), None)

    @property
    def failures(self) -> list[str]:
        """Who failed, and why."""
        return [f"{result.name}: {result.failure}" for result in self.results if result.failure]

    def video_tokens(self, result: Result) -> int | None:
        """Of a row: positions of the prompt without the words and what comes with the video, such as a newline."""
        beside = result.beside or self.prompt_length + 1
        return None if result.failure or not result.ttft else result.cache_tokens - beside

    @property
    def breakdown_title(self) -> str:
        """What the second table holds, and the ceilings behind its floor."""
        title = "where the time goes: ms of one profiled call"
        if not self.ceilings:
            return title
        matmul, copy = self.ceilings["matmul"] / 1e12, self.ceilings["copy"] / 1e9
        return f"{title}; floor at {matmul:.3g} TFLOP/s ({self.dtype}) and {copy:.0f} GB/s"

    def breakdown_rows(self) -> list[tuple[str, ...]]:
        """Cells of the table of stages and floors, a row for each arm."""
        full = self.full_flops
        return [
            (result.name, *_breakdown_cells(result.breakdown), *_floor_cells(result, full)) for result in self.results
        ]

    @property
    def full_flops(self) -> float | None:
        """Operations with all tokens, if an arm has them."""
        return next((result.floor.flops for result in self.results if result.retain_ratio == 1 and result.floor), None)

    def layer_tokens(self, result: Result) -> float | None:
        """Of a row: video tokens that a layer of the language model sees, on average; where some are left out inside,
        the newline is one of those that stay, or it is gone."""
        entered = self.video_tokens(result)
        if entered is None:
            return None
        later = [length - self.prompt_length for length in result.layer_tokens if length != result.cache_tokens]
        layers = len(result.layer_tokens)
        return (entered * (layers - len(later)) + sum(later)) / layers if later else float(entered)

    def cost_rows(self) -> list[tuple[str, ...]]:
        """Cells of the table of tokens and operations, a row for each arm."""
        full = next((result for result in self.measured if result.retain_ratio == 1 and result.ttft), None)
        return [self._cost_row(result, full) for result in self.results]

    def _cost_row(self, result: Result, full: Result | None) -> tuple[str, ...]:
        entered, seen = self.video_tokens(result), self.layer_tokens(result)
        if entered is None or seen is None:
            return (result.name, *[""] * (len(_COST_HEADINGS) - 1))
        every = self.layer_tokens(full) if full else None
        work, time = "", ""
        if full and full.floor and result.floor:
            work = f"{result.floor.exact_flops / full.floor.exact_flops:.0%}"
        if full:
            time = f"{result.median / full.median:.0%}"
        return (
            result.name,
            str(entered),
            f"{seen:.0f}",
            f"{seen / every:.0%}" if every else "",
            _short(result.floor.exact_flops / 1e12) if result.floor else "",
            work,
            _milliseconds(result.median),
            time,
        )

    def encoder_rows(self) -> list[tuple[str, ...]]:
        """Cells of the table of the vision encoder, a row for each arm."""
        return [_encoder_row(result, self.reference) for result in self.results]

    def memory_rows(self) -> list[tuple[str, ...]]:
        """Cells of the table of peaks, a row for each arm."""
        reference = next((peaks(result) for result in self.results if result.name == REFERENCE), _NO_PEAKS)
        return [_memory_row(result, reference) for result in self.results]

    def sections(self) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
        """(title, headings, rows) of every table."""
        return [
            (self.title, _HEADINGS, self.rows()),
            (_COST_TITLE, _COST_HEADINGS, self.cost_rows()),
            (_ENCODER_TITLE, _ENCODER_HEADINGS, self.encoder_rows()),
            (self.breakdown_title, _BREAKDOWN_HEADINGS, self.breakdown_rows()),
            (_MEMORY_TITLE, _MEMORY_HEADINGS, self.memory_rows()),
        ]


def _row(result: Result, speed: Sequence[float | None], video_tokens: int | None) -> tuple[str, ...]:
    if result.failure:
        return (result.name, "failed", *[""] * (len(_HEADINGS) - 2))
    return (
        result.name,
        f"{result.compilation:.1f}",
        f"{result.cold:.1f}",
        f"{1e3 * result.median:.0f}",
        f"{1e3 * min(result.ttft):.0f}-{1e3 * max(result.ttft):.0f}",
        *("" if times is None else f"{times:.2f}x" for times in speed),
        "" if result.retention is None else f"{result.retention:.0%}",
        str(video_tokens),
        "" if result.decode_rate is None else f"{result.decode_rate:.1f}",
        str(result.recompiles),
    )


def encoder_shares(result: Result, full: Result | None) -> dict[str, float] | None:
    """Shares of the ``time`` and the ``work`` of ``full``'s vision encoder; None where one of them is not known."""
    if full is None or result.encoder_median is None or full.encoder_median is None:
        return None
    if result.floor is None or full.floor is None:
        return None
    work = result.floor.encoder_flops / full.floor.encoder_flops
    return {"time": result.encoder_median / full.encoder_median, "work": work}


def _encoder_row(result: Result, full: Result | None) -> tuple[str, ...]:
    if result.encoder_median is None or result.failure:
        return (result.name, *[""] * (len(_ENCODER_HEADINGS) - 1))
    seconds = (result.encoder_median, min(result.encoder), max(result.encoder))
    median, least, most = (_milliseconds(value) for value in seconds)
    work = _short(result.floor.encoder_flops / 1e12) if result.floor else ""
    cells, shares = ("", work, "", ""), encoder_shares(result, full)
    if shares is not None:
        times = shares["time"] / shares["work"]
        verdict = "" if not result.frames else ", met" if times <= MOST_TIME_FOR_WORK else ", MISSED"
        cells = (f"{shares['time']:.0%}", work, f"{shares['work']:.0%}", f"{times:.2f}{verdict}")
    computed = "" if result.computed is None else f"{result.computed:.0%}"
    return (result.name, computed, median, f"{least}-{most}", *cells)


def _breakdown_cells(breakdown: Breakdown | None) -> tuple[str, ...]:
    if breakdown is None:
        return ("",) * 5

    def cell(seconds: float | None) -> str:
        return "" if seconds is None else f"{_milliseconds(seconds)} ({seconds / breakdown.wall:.0%})"

    stages = [cell(breakdown.stages[name]) for name in STAGES] if breakdown.stages else [NOT_SEPARABLE, "", ""]
    return (*stages, cell(breakdown.overhead), _milliseconds(breakdown.wall))


def _floor_cells(result: Result, full: float | None) -> tuple[str, ...]:
    if result.floor is None:
        return ("",) * 5
    floor = result.floor
    share = f"{floor.flops / full:.0%}" if full else ""
    return (
        _short(floor.flops / 1e12),
        share,
        _short(floor.bytes / 1e9),
        _milliseconds(floor.seconds),
        f"{result.times_floor:.2f}",
    )


def _short(value: float) -> str:
    return f"{value:.{3 if value >= 1 else 2}g}"


_Peaks = tuple[int | None, ...]
_NO_PEAKS: _Peaks = (None,) * (len(STAGES) + 1)


def peaks(result: Result) -> _Peaks:
    """Bytes of each stage and of the whole call."""
    if result.breakdown is None:
        return _NO_PEAKS
    stages = result.breakdown.stage_memory or {}
    return (*(stages.get(stage) for stage in STAGES), result.breakdown.memory)


def _memory_row(result: Result, reference: _Peaks) -> tuple[str, ...]:
    def cell(peak: int | None, full: int | None) -> str:
        if peak is None:
            return ""
        return f"{peak / 2**20:.1f}" + (f" ({peak / full:.0%})" if full else "")

    cells = (cell(peak, full) for peak, full in zip(peaks(result), reference, strict=True))
    return result.name, *cells, "" if result.peak_memory is None else f"{result.peak_memory / 2**30:.2f}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.{0 if seconds >= 0.1 else 1}f}"


def tables(workload: Workload) -> list[Table]:
    """For people at a terminal."""
    printed = [_table(*section) for section in workload.sections()]
    if workload.failures:
        printed[0].caption, printed[0].caption_justify = escape("\n".join(workload.failures)), "left"
    return printed


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    # Eleven columns fit into 120 characters with one blank between them.
    result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    for heading in headings:
        result.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=heading == "arm")
    for row in rows:
        result.add_row(*row)
    return result


def to_dict(workloads: Sequence[Workload], about: dict[str, Any]) -> dict[str, Any]:
    """For programs: every single time in seconds, memory in bytes."""
    return {**about, "workloads": [_to_dict(workload) for workload in workloads]}


def _to_dict(workload: Workload) -> dict[str, Any]:
    full, speed = workload.full_flops, {name: speeds(workload.results, name) for name in (REFERENCE, EAGER)}
    reference = workload.reference
    results = [
        {
            **dataclasses.asdict(result),
            "video_tokens": workload.video_tokens(result),
            "video_tokens_of_a_layer": workload.layer_tokens(result),
            "speed": {name: times.get(result.name) for name, times in speed.items()},
            "share_of_full_flops": result.floor.flops / full if result.floor and full else None,
            "encoder_shares": encoder_shares(result, reference),
        }
        for result in workload.results
    ]
    return {**dataclasses.asdict(workload), "results": results}


def to_markdown(workloads: Sequence[Workload], about: dict[str, Any]) -> str:
    """For documents: the tables, and what they need beside them."""
    lines = markdown.heading(about)
    for workload in workloads:
        for section in workload.sections():
            lines += markdown.table(*section)
        lines += [f"- {failure}" for failure in workload.failures] + [""] * bool(workload.failures)
    return "\n".join(lines)
