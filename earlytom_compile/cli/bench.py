"""``earlytom bench``: the time to the first token with all tokens and with fewer, side by side in one run."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..benchmark.arms import make_arms
from ..benchmark.measure import measure
from ..benchmark.results import Workload, environment, table, to_dict, to_markdown, write_plots
from ..benchmark.workload import make_inputs, random_model
from ..errors import EarlyTomConfigError
from ..shapes import config_of, shape_of
from .bench_load import check_load, measure_loads
from .loading import load_checkpoint, progress_bars, resolve_device, resolve_dtype
from .toolchain import require_toolchain

_FILE_WIDTH = 120  # columns, where nobody watches


def execute(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Measure every workload, print and write what came out."""
    _check(arguments)
    progress_on, console = Console(stderr=True), Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    model = _model(arguments)
    frame_counts = arguments.frames or ((32,) if arguments.model else (shape_of(arguments.shape).frames,))
    require_toolchain(model.device, options)
    options = {name: value for name, value in options.items() if name != "retain_ratio"}
    about, workloads = environment(model.device), []
    if arguments.concurrency:
        measure_loads(arguments, model, options, frame_counts, about, console, progress_on)
        return
    for frames in frame_counts:
        inputs = make_inputs(
            model,
            frames=frames,
            batch=arguments.batch,
            prompt_length=arguments.prompt_length,
            redundancy=arguments.redundancy,
        )
        with progress_bars(progress_on) as progress:
            task = progress.add_task(f"{frames} frames", total=None)
            results = measure(
                model,
                make_arms(model, inputs, arguments.retain_ratios, options),
                repeats=arguments.repeats,
                decode_tokens=arguments.decode_tokens,
                progress=lambda text, task=task, bar=progress: bar.update(task, description=text),  # type: ignore[misc]
            )
        workloads.append(Workload(frames, arguments.batch, arguments.prompt_length, results))
        console.print(table(workloads[-1]))
    _write(arguments, workloads, about, console)


def _model(arguments: argparse.Namespace) -> Any:
    if arguments.model:
        return load_checkpoint(arguments.model, device=arguments.device, dtype=arguments.dtype).model
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
    bad = [ratio for ratio in arguments.retain_ratios if not 0 < ratio <= 1]
    if bad:
        raise EarlyTomConfigError(f"retain_ratio={bad[0]}: must be in (0, 1].")


def _write(arguments: argparse.Namespace, workloads: list[Workload], about: dict[str, Any], console: Console) -> None:
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(to_dict(workloads, about), indent=2) + "\n", encoding="utf-8")
    if arguments.markdown:
        Path(arguments.markdown).write_text(to_markdown(workloads, about), encoding="utf-8")
    if arguments.plot:
        for path in write_plots(workloads, Path(arguments.plot)):
            console.print(f"wrote {path}")
