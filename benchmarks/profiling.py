"""One call of every arm under torch's profiler, with a mark where each stage begins.

    profile_arms(model, arms)   ->   {"earlytom 0.1": Breakdown(...), ...} and a Chrome trace
                                     with ranges "earlytom 0.1" and "earlytom 0.1: vision encoding", ...

The arms run the very code that was timed. Where Python calls the parts of the model, hooks mark the stages. Inside a
compiled graph nothing is called by name, but a stage can be told by its weights: the first product with a weight of
the projector begins visual token processing, the first with one of the first decoder layer the LLM prefill. Inductor
calls products through a namespace, where they are watched during the call.

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
from torch.utils.hooks import RemovableHandle

from earlytom_compile.benchmarks.arms import Arm
from earlytom_compile.benchmarks.breakdown import LLM, STAGES, TOKENS, VISION, Breakdown, break_down, stage_range
from earlytom_compile.benchmarks.failures import attempt

Trace = dict[str, Any]
_THREAD = "stages"  # where a viewer of the trace shows them


def profile_arms(
    model: Any, arms: Sequence[Arm], progress: Callable[[str], None] = lambda text: None
) -> tuple[dict[str, Breakdown], Trace]:
    """Breakdowns by name of arms that have been called before, and the trace they were read from.

    ``model`` owns the weights that all arms share. An arm for which there is no memory has no breakdown.
    """
    device, stage_of = model.device, _stages_of_weights(model.model)
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
        current: str | None = None

        def begin(stage: str) -> None:
            nonlocal current
            if stage != current:
                current = stage
                open_range.close()
                open_range.enter_context(_nvtx(stage_range(arm.name, stage), on_gpu))
                with record_function(_mark(arm.name, stage)):
                    pass

        begin(VISION)
        hooks = [_before_forward(module, begin, stage) for module, stage in _called_by_python(arm)]
        try:
            with _watched_products(stage_of, begin):
                yield
        finally:
            for hook in hooks:
                hook.remove()


def _mark(call: str, stage: str) -> str:
    return f"{stage_range(call, stage)} begins"


def _called_by_python(arm: Arm) -> Iterator[tuple[torch.nn.Module, str]]:
    for name, stage in (("vision_tower", VISION), ("multi_modal_projector", TOKENS), ("language_model", LLM)):
        if name in arm.called:
            yield getattr(arm.model.model, name), stage


def _before_forward(module: torch.nn.Module, begin: Callable[[str], None], stage: str) -> RemovableHandle:
    return module.register_forward_pre_hook(lambda module, args: begin(stage))


def _stages_of_weights(inner: Any) -> dict[int, str]:
    """{address of a weight: the stage that its product belongs to}."""
    parts = ((inner.vision_tower, VISION), (inner.multi_modal_projector, TOKENS), (inner.language_model.layers[0], LLM))
    return {weight.data_ptr(): stage for part, stage in parts for weight in part.parameters()}


@contextmanager
def _watched_products(stage_of: dict[int, str], begin: Callable[[str], None]) -> Iterator[None]:
    """Products that compiled code calls, and those of graphs that run uncompiled, tell the stage of their weight."""
    from torch._inductor.select_algorithm import extern_kernels

    originals: list[tuple[Any, str, Any]] = [(extern_kernels, *item) for item in vars(extern_kernels).items()]
    originals.append((torch._C._nn, "linear", torch._C._nn.linear))

    def watched(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            for argument in args:
                if isinstance(argument, torch.Tensor) and (stage := stage_of.get(argument.data_ptr())):
                    begin(stage)
            return kernel(*args, **kwargs)

        return call

    for owner, name, kernel in originals:
        setattr(owner, name, watched(kernel))
    try:
        yield
    finally:
        for owner, name, kernel in originals:
            setattr(owner, name, kernel)


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
