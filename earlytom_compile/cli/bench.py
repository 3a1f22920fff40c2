"""``earlytom bench``: the time to the first token with all tokens and with fewer, side by side in one run."""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..benchmarks.arms import Arm, choose, make_arms
from ..benchmarks.ceilings import Clock, ceilings
from ..benchmarks.environment import environment
from ..benchmarks.floor import Work, floor, work_of
from ..benchmarks.measure import Result, measure
from ..benchmarks.profiling import Trace, profile_arms
from ..benchmarks.results import Workload, tables, to_dict, to_markdown, write_plots
from ..benchmarks.workload import make_inputs, random_model
from ..config import EarlyTomConfig
from ..errors import EarlyTomConfigError
from ..shapes import ModelShape, config_of, shape_of
from .bench_load import check_load, measure_loads
from .loading import load_model, progress_bars, resolve_device, resolve_dtype
from .outputs import check_outputs
from .toolchain import require_toolchain

_FILE_WIDTH = 120  # columns, where nobody watches
_NOT_INDUCTORS = ("transformers", "earlytom")


def execute(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Measure every workload, print and write what came out."""
    _check(arguments)
    start = time.perf_counter()
    progress_on, console = Console(stderr=True), Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    model = _model(arguments)
    frame_counts = arguments.frames or ((32,) if arguments.model else (shape_of(arguments.shape).frames,))
    _require_compiler(arguments, model, options)
    options = {name: value for name, value in options.items() if name != "retain_ratio"}
    about, workloads = {**environment(model.device), **_asked(arguments, model)}, []
    if arguments.concurrency:
        measure_loads(arguments, model, options, frame_counts, about, start, console, progress_on)
        return
    rates = _ceilings(model, console)
    for frames in frame_counts:
        with progress_bars(progress_on) as progress:
            task = progress.add_task(f"{frames} frames", total=None)
            results, trace = _measure(
                arguments,
                model,
                options,
                frames,
                rates,
                lambda text, task=task, bar=progress: bar.update(task, description=text),  # type: ignore[misc]
            )
        dtype = str(model.dtype).removeprefix("torch.")
        workloads.append(Workload(frames, arguments.batch, arguments.prompt_length, results, dtype, rates))
        console.print(*tables(workloads[-1]))
        about["seconds"] = round(time.perf_counter() - start, 1)
        plots = _write(arguments, workloads, about)  # now, so that nothing is lost if the next one fails
        if arguments.trace:
            path = _trace_path(Path(arguments.trace), frames if len(frame_counts) > 1 else None)
            path.write_text(json.dumps(trace), encoding="utf-8")
            console.print(f"wrote {path}")
    for plot in plots:
        console.print(f"wrote {plot}")
    console.print(f"{about['seconds']:.0f} s in all")


def _require_compiler(arguments: argparse.Namespace, model: Any, options: dict[str, Any]) -> None:
    """Whatever EarlyTom's lowering is, the other arms are Inductor's."""
    ours = bool(arguments.arms) and all(name.startswith(_NOT_INDUCTORS) for name in arguments.arms)
    otherwise = f"--lowering eager --arms {','.join(_NOT_INDUCTORS)}, which compile nothing"
    require_toolchain(model.device, options if ours else {}, otherwise=otherwise)


def _asked(arguments: argparse.Namespace, model: Any) -> dict[str, Any]:
    """What the numbers depend on beside the machine."""
    name = {"model": arguments.model} if arguments.model else {"shape": arguments.shape}
    return {
        **name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "scene_frames": arguments.scene_frames,
        "redundancy": arguments.redundancy,
    }


def _measure(
    arguments: argparse.Namespace,
    model: Any,
    options: dict[str, Any],
    frames: int,
    rates: dict[str, float],
    progress: Callable[[str], None],
) -> tuple[list[Result], Trace]:
    """Every arm: timed in turn, then one call each under the profiler, and its floor."""
    inputs = make_inputs(
        model,
        frames=frames,
        batch=arguments.batch,
        prompt_length=arguments.prompt_length,
        scene_frames=arguments.scene_frames,
        redundancy=arguments.redundancy,
    )
    arms = choose(make_arms(model, inputs, arguments.retain_ratios, options), arguments.arms)
    with tempfile.TemporaryDirectory(prefix="earlytom-bench-") as caches:
        results = measure(
            model,
            arms,
            repeats=arguments.repeats,
            decode_tokens=arguments.decode_tokens,
            progress=progress,
            caches=caches,
        )
        able = [arm for arm, result in zip(arms, results, strict=True) if not result.failure]
        breakdowns, trace = profile_arms(model, able, progress)
    for arm, result in zip(arms, results, strict=True):
        result.breakdown = breakdowns.get(arm.name)
        if rates and not result.failure:
            result.floor = floor(_work(model, arm, result, arguments.batch, options), rates)
    return results, trace


def _ceilings(model: Any, console: Console) -> dict[str, float]:
    """Those of the machine; none where the work of the model cannot be counted."""
    try:
        ModelShape.from_config(model.config)
    except EarlyTomConfigError as reason:
        console.print(f"no floor: {reason}")
        return {}
    return ceilings(Clock(model.device), model.dtype, model.device)


def _work(model: Any, arm: Arm, result: Result, batch: int, options: dict[str, Any]) -> dict[str, Work]:
    return work_of(
        model,
        schedules=result.frames or [[arm.frames]] * batch,
        prompt=result.cache_tokens,
        merge_layers=result.merge_layers or None,
        variant=EarlyTomConfig.from_options(options).variant,
    )


def _trace_path(path: Path, frames: int | None) -> Path:
    """The file asked for, or one for each number of frames."""
    return path if frames is None else path.with_stem(f"{path.stem}-{frames}-frames")


def _model(arguments: argparse.Namespace) -> Any:
    if arguments.model:
        return load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    device = resolve_device(arguments.device)
    config = config_of(arguments.shape)
    return random_model(config, device=device, dtype=resolve_dtype(arguments.dtype, device, torch.bfloat16))


def _check(arguments: argparse.Namespace) -> None:
    for name in ("batch", "repeats", "prompt_length"):
        if getattr(arguments, name) < 1:
            raise EarlyTomConfigError(f"{name}={getattr(arguments, name)}: must be at least 1.")
    if arguments.decode_tokens < 0:
        raise EarlyTomConfigError(f"decode_tokens={arguments.decode_tokens}: must be at least 0.")
    if arguments.frames and min(arguments.frames) < 1:
        raise EarlyTomConfigError(f"frames={min(arguments.frames)}: must be at least 1.")
    if arguments.concurrency:
        check_load(arguments)
        if arguments.trace:
            raise EarlyTomConfigError(f"trace={arguments.trace!r} with --concurrency: calls are traced without load.")
    bad = [ratio for ratio in arguments.retain_ratios if not 0 < ratio <= 1]
    if bad:
        raise EarlyTomConfigError(f"retain_ratio={bad[0]}: must be in (0, 1].")
    check_outputs(arguments)


def _write(arguments: argparse.Namespace, workloads: list[Workload], about: dict[str, Any]) -> list[Path]:
    """What was asked for, over what was there; returns the plots."""
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(to_dict(workloads, about), indent=2) + "\n", encoding="utf-8")
    if arguments.markdown:
        Path(arguments.markdown).write_text(to_markdown(workloads, about), encoding="utf-8")
    return write_plots(workloads, Path(arguments.plot)) if arguments.plot else []
