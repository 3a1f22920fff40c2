"""``earlytom bench --concurrency 1,8,32``: the same models with several clients at once, in place of single calls."""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..benchmarks.arms import choose
from ..benchmarks.load import make_prompts, make_servers, measure_load
from ..benchmarks.load_results import Load, load_table, load_to_dict, load_to_markdown, write_load_plots
from ..errors import EarlyTomConfigError
from .loading import progress_bars


def check_load(arguments: argparse.Namespace) -> None:
    """Raise :class:`EarlyTomConfigError` for what cannot be measured."""
    if min(arguments.concurrency) < 1:
        raise EarlyTomConfigError(f"concurrency={min(arguments.concurrency)}: must be at least 1 client.")
    if arguments.max_batch < 1:
        raise EarlyTomConfigError(f"max_batch={arguments.max_batch}: must be at least 1.")
    if arguments.batch != 1:
        raise EarlyTomConfigError(
            f"batch={arguments.batch} with --concurrency: the queue makes the batches; limit them with --max-batch."
        )


def measure_loads(
    arguments: argparse.Namespace,
    model: Any,
    options: dict[str, Any],
    frame_counts: Sequence[int],
    about: dict[str, Any],
    start: float,
    console: Console,
    progress_on: Console,
) -> None:
    """Measure every number of clients, print and write what came out; ``start`` is when all began."""
    servers = choose(make_servers(model, arguments.retain_ratios, options), arguments.arms)
    new_tokens, loads = 1 + arguments.decode_tokens, []
    for frames in frame_counts:
        prompts = make_prompts(
            model,
            max(arguments.concurrency),
            frames=frames,
            prompt_length=arguments.prompt_length,
            scene_frames=arguments.scene_frames,
            redundancy=arguments.redundancy,
        )
        for clients in arguments.concurrency:
            with progress_bars(progress_on) as progress:
                task = progress.add_task(f"{clients} clients", total=None)
                results = measure_load(
                    servers,
                    prompts[:clients],
                    max_batch=arguments.max_batch,
                    rounds=arguments.repeats,
                    new_tokens=new_tokens,
                    progress=lambda text, task=task, bar=progress: bar.update(task, description=text),  # type: ignore[misc]
                )
            loads.append(Load(frames, arguments.prompt_length, new_tokens, arguments.max_batch, clients, results))
            console.print(load_table(loads[-1]))
            about["seconds"] = round(time.perf_counter() - start, 1)
            plots = _write(arguments, loads, about)  # now, so that nothing is lost if the next one fails
    for plot in plots:
        console.print(f"wrote {plot}")
    console.print(f"{about['seconds']:.0f} s in all")


def _write(arguments: argparse.Namespace, loads: list[Load], about: dict[str, Any]) -> list[Path]:
    """What was asked for, over what was there; returns the plots."""
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(load_to_dict(loads, about), indent=2) + "\n", encoding="utf-8")
    if arguments.markdown:
        Path(arguments.markdown).write_text(load_to_markdown(loads, about), encoding="utf-8")
    return write_load_plots(loads, Path(arguments.plot)) if arguments.plot else []
