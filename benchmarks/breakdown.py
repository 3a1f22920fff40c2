"""Where the time to the first token and the memory go (Figure 3 of the paper), from a profiler's trace of one call.

    |<------------------------------ wall: the range "earlytom 0.1" ------------------------------>|
    vision encoding            visual token processing              LLM prefill                        stages begin
      [layer] [layer]  [merge]  [layer]   [projector] [select]         [layer] [layer] [lm_head]       busy
    ->  vision encoding 3 layers, visual token processing merge + projector + select, LLM prefill the rest,
        overhead wall - busy

Busy is a device that runs a kernel or a copy; on a CPU, a thread inside an operator or a compiled graph. What is busy
belongs to the stage in which it was launched, and what an operator of ours launches to visual token processing,
wherever it happens. An instant at which two things are busy counts once, for the one that began first.

Memory is what the allocator has handed out beyond what it had when the call began: weights, inputs and what others keep
do not count. A stage's peak includes what earlier stages left for it.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from earlytom_compile.benchmarks.model_parts import LLM, TOKENS, VISION

STAGES = (VISION, TOKENS, LLM)
OVERHEAD, NOT_SEPARABLE = "overhead", "not separable"

Event = dict[str, Any]
"""A complete event of a Chrome trace: ``name``, ``cat``, ``ts`` and ``dur`` in microseconds, ``tid``, ``args``."""
Interval = tuple[float, float]

_RANGE = "user_annotation"
_ON_DEVICE = frozenset(("kernel", "gpu_memcpy", "gpu_memset"))
_LAUNCHES = frozenset(("cuda_runtime", "cuda_driver"))
_OURS = "earlytom::"
_COMPILED = "## Call CompiledFxGraph"  # Inductor's name for a call of what it compiled
_MEMORY, _CPU, _CUDA = "[memory]", 0, 1
_MICRO = 1e-6


@dataclass(frozen=True)
class Breakdown:
    """Seconds of one profiled call, and bytes at its peak.

    ``stages`` and ``stage_memory`` are None where stages cannot be told apart: one launch held several, or nothing
    showed where one began. ``overhead`` is None where no device event was recorded although there was a device,
    ``memory`` where nothing was allocated.
    """

    wall: float
    overhead: float | None
    stages: dict[str, float] | None
    memory: int | None = None
    stage_memory: dict[str, int] | None = None

    @property
    def parts(self) -> dict[str, float]:
        """What is known, by name; together the wall time."""
        overhead = {} if self.overhead is None else {OVERHEAD: self.overhead}
        return {**(self.stages or {NOT_SEPARABLE: self.wall - sum(overhead.values())}), **overhead}


def stage_range(call: str, stage: str) -> str:
    """Name of the range that covers a stage of a call."""
    return f"{call}: {stage}"


def break_down(events: Iterable[Event], call: str, *, on_gpu: bool) -> Breakdown:
    """The breakdown of the call that runs in the range called ``call``.

    Stages begin where ranges called :func:`stage_range` begin, in any order and more than once; until the first
    one, it is vision encoding. Raises :class:`ValueError` if there is no such call.
    """
    events = list(events)
    complete = [event for event in events if event.get("ph") == "X"]
    root = next((event for event in complete if event["cat"] == _RANGE and event["name"] == call), None)
    if root is None:
        raise ValueError(f"no range {call!r} in the trace.")
    begin, end = _interval(root)
    stages = _StageOf(call, [event for event in complete if begin <= event["ts"] <= end])
    peaks = _memory(events, stages, (begin, end), _CUDA if on_gpu else _CPU)
    if on_gpu:
        busy = list(_device_work(complete, stages, (begin, end)))
        if not busy:
            return Breakdown(_MICRO * (end - begin), None, None, *peaks)
    else:
        busy = list(_host_work(complete, stages, (begin, end)))
    seconds = dict.fromkeys(STAGES, 0.0)
    now = begin
    for start, stop, stage in sorted(busy):
        seconds[stage] += _MICRO * max(0.0, stop - max(start, now))
        now = max(now, stop)
    wall = _MICRO * (end - begin)
    overhead = max(0.0, wall - sum(seconds.values()))
    return Breakdown(wall, overhead, seconds if stages.all_seen else None, *peaks)


class _StageOf:
    """Which stage a moment on a thread belongs to."""

    def __init__(self, call: str, events: Sequence[Event]) -> None:
        names = {stage_range(call, stage): stage for stage in STAGES}
        begun = sorted((event["ts"], names[event["name"]]) for event in events if event["name"] in names)
        self._moments = [moment for moment, _ in begun]
        self._stages = [stage for _, stage in begun]
        self._ours = dict[Any, list[Interval]]()
        for event in events:
            if event["name"].startswith(_OURS):
                self._ours.setdefault(event["tid"], []).append(_interval(event))
        self._ours = {thread: list(_united(intervals)) for thread, intervals in self._ours.items()}

    @property
    def all_seen(self) -> bool:
        """Whether every stage after the first was seen to begin."""
        return {TOKENS, LLM} <= set(self._stages)

    def __call__(self, moment: float, thread: Any) -> str:
        ours = self._ours.get(thread, [])
        index = bisect_right(ours, (moment, float("inf"))) - 1
        if index >= 0 and moment < ours[index][1]:
            return TOKENS
        return self.begun(moment)

    def begun(self, moment: float) -> str:
        """The stage that began last, whoever is at work in it."""
        index = bisect_right(self._moments, moment) - 1
        return self._stages[index] if index >= 0 else VISION

    def cuts(self, thread: Any) -> list[float]:
        """Moments at which the stage may change on a thread."""
        return sorted([*self._moments, *(moment for interval in self._ours.get(thread, []) for moment in interval)])


def _memory(
    events: Sequence[Event], stages: _StageOf, window: Interval, device: int
) -> tuple[int | None, dict[str, int] | None]:
    """Peak of the call and of each of its stages."""
    changes = [
        (event["ts"], event["args"]["Total Allocated"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == _MEMORY
        and event["args"]["Device Type"] == device
        and window[0] <= event["ts"] <= window[1]
    ]
    if not changes:
        return None, None
    changes.sort(key=lambda change: change[0])
    _, total, change = changes[0]
    before = total - change
    peaks, held = dict.fromkeys(STAGES, 0), 0
    for moment, total, _ in changes:
        stage = stages.begun(moment)
        peaks[stage] = max(peaks[stage], held, total - before)
        held = total - before
    return max(peaks.values()), peaks if stages.all_seen else None


def _device_work(events: Sequence[Event], stages: _StageOf, window: Interval) -> Iterator[tuple[float, float, str]]:
    """(start, stop, stage) of what ran on the device and was launched inside ``window``."""
    launches = {event["args"].get("correlation"): event for event in events if event["cat"] in _LAUNCHES}
    stage = VISION
    for event in sorted((event for event in events if event["cat"] in _ON_DEVICE), key=_interval):
        launch = launches.get(event["args"].get("correlation"))
        if launch is not None:
            stage = stages(launch["ts"], launch["tid"])
        # Without its launch, a kernel ran when it ran, in the stage of the one before.
        if window[0] <= (launch or event)["ts"] <= window[1]:
            start, stop = _clipped(_interval(event), window)
            yield start, stop, stage


def _host_work(events: Sequence[Event], stages: _StageOf, window: Interval) -> Iterator[tuple[float, float, str]]:
    """(start, stop, stage) of operators and compiled graphs, cut where the stage changes inside them."""
    for event in events:
        outermost = event["cat"] == "cpu_op" and ("::" in event["name"] or event["name"].startswith(_COMPILED))
        if outermost and window[0] <= event["ts"] <= window[1]:
            start, stop = _clipped(_interval(event), window)
            moments = [start, *(moment for moment in stages.cuts(event["tid"]) if start < moment < stop), stop]
            for first, last in zip(moments, moments[1:], strict=False):
                yield first, last, stages((first + last) / 2, event["tid"])


def _interval(event: Event) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def _clipped(interval: Interval, window: Interval) -> Interval:
    start, stop = (min(max(moment, window[0]), window[1]) for moment in interval)
    return start, stop


def _united(intervals: Iterable[Interval]) -> Iterator[Interval]:
    """Disjoint intervals that cover the same."""
    current: Interval | None = None
    for start, stop in sorted(intervals):
        if current is None or start > current[1]:
            if current is not None:
                yield current
            current = start, stop
        else:
            current = current[0], max(current[1], stop)
    if current is not None:
        yield current
