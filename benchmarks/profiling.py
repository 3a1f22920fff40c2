"""One call of every arm under torch's profiler, with a mark where each stage begins.

    profile_arms(model, arms)   ->   {"earlytom 0.1": Breakdown(...), ...} and a Chrome trace
                                     with ranges "earlytom 0.1" and "earlytom 0.1: vision encoding", ...

The arms run the very code that was timed; stage_marks.py tells where a stage begins.

On a GPU the ranges are NVTX ranges too, for Nsight.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from earlytom_compile.benchmarks.arms import Arm
from earlytom_compile.benchmarks.breakdown import STAGES, Breakdown, break_down, stage_range
from earlytom_compile.benchmarks.failures import attempt
from earlytom_compile.benchmarks.stage_marks import stage_marks, stages_of_weights

Trace = dict[str, Any]
_THREAD = "stages"  # where a viewer of the trace shows them


def profile_arms(
    model: Any, arms: Sequence[Arm], progress: Callable[[str], None] = lambda text: None
) -> tuple[dict[str, Breakdown], Trace]:
    """Breakdowns by name of arms that have been called before, and the trace they were read from.

    ``model`` owns the weights that all arms share. An arm for which there is no memory has no breakdown.
    """
    device, stage_of = model.device, stages_of_weights(model.model)
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.inference_mode(), torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        torch.ones(1, device=device).item()  # what the profiler does once is no part of the first call
        failures = {}
        for arm in arms:
            progress(f"profile: {arm.name}")
            with _nvtx(arm.name, on_gpu), record_function(arm.name):
                with _marked(arm, stage_of, on_gpu):
                    failures[arm.name] = attempt(arm.first_token)
                if on_gpu:
                    torch.cuda.synchronize(device)
    trace = _exported(profiler)
    events = trace["traceEvents"] = [*trace["traceEvents"], *_stage_ranges(trace["traceEvents"], arms)]
    whole = [name for name, failure in failures.items() if failure is None]
    return {name: break_down(events, name, on_gpu=on_gpu) for name in whole}, trace


@contextmanager
def _marked(arm: Arm, stage_of: dict[int, str], on_gpu: bool) -> Iterator[None]:
    """While open, every beginning of a stage of ``arm`` leaves an empty range in the trace."""
    with ExitStack() as open_range:

        def begin(stage: str) -> None:
            open_range.close()
            open_range.enter_context(_nvtx(stage_range(arm.name, stage), on_gpu))
            with record_function(_mark(arm.name, stage)):
                pass

        with stage_marks(arm, stage_of, begin):
            yield


def _mark(call: str, stage: str) -> str:
    return f"{stage_range(call, stage)} begins"


@contextmanager
def _nvtx(name: str, on_gpu: bool) -> Iterator[None]:
    if not on_gpu:
        yield
        return
    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()


def _exported(profiler: torch.profiler.profile) -> Trace:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace: Trace = json.loads(path.read_text(encoding="utf-8"))
        return trace


def _stage_ranges(events: Sequence[dict[str, Any]], arms: Sequence[Arm]) -> Iterator[dict[str, Any]]:
    """From each mark to the next one or the end of the call, in a row of their own."""
    ranges = {event["name"]: event for event in events if event.get("cat") == "user_annotation"}
    for arm in arms:
        names = {_mark(arm.name, stage): stage_range(arm.name, stage) for stage in STAGES}
        marks = [event for event in events if event.get("cat") == "user_annotation" and event["name"] in names]
        marks.sort(key=lambda event: event["ts"])
        whole = ranges[arm.name]
        ends = [*(mark["ts"] for mark in marks[1:]), whole["ts"] + whole["dur"]]
        for mark, end in zip(marks, ends, strict=True):
            yield {**mark, "name": names[mark["name"]], "dur": end - mark["ts"], "tid": _THREAD}
