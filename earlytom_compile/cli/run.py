"""``earlytom run``: a question about a video, answered with compressed video tokens, or with both to compare.

earlytom run --model path/to/checkpoint --video talk.mp4 --prompt "What is on the slide?" --retain-ratio 0.1
"""

import argparse
from typing import Any

from rich.console import Console

import earlytom_compile

from .comparison import compare, comparison_table, decode, timed_answer
from .loading import Inputs, Loaded, load_checkpoint, prepare_inputs, progress_bars
from .toolchain import require_toolchain


def execute(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Load, answer, print."""
    console, progress = Console(highlight=False), Console(stderr=True)
    loaded = load_checkpoint(arguments.model, device=arguments.device, dtype=arguments.dtype)
    require_toolchain(loaded.device, options)
    inputs = prepare_inputs(loaded, arguments.video, arguments.prompt, frames=arguments.frames, progress_on=progress)
    if arguments.compare:
        comparison = compare(
            loaded,
            inputs,
            options,
            max_new_tokens=arguments.max_new_tokens,
            repeats=arguments.repeats,
            progress_on=progress,
        )
        console.print(comparison_table(comparison))
        for reason in comparison.report["reasons"]:
            console.print(f"left alone: {reason}", markup=False, soft_wrap=True)
    else:
        _answer(loaded, inputs, options, arguments.max_new_tokens, console, progress)


def _answer(
    loaded: Loaded,
    inputs: Inputs,
    options: dict[str, Any],
    max_new_tokens: int,
    console: Console,
    progress_on: Console,
) -> None:
    model = earlytom_compile.compile(loaded.model, **options)
    with progress_bars(progress_on) as progress:
        progress.add_task("compile and answer", total=None)
        tokens, seconds = timed_answer(model, inputs, max_new_tokens)
    console.print(decode(loaded, tokens), markup=False, soft_wrap=True)
    summary = [f"{len(tokens)} tokens in {seconds:.1f} s, compilation included"]
    report = earlytom_compile.report(model).to_dict()
    for video in report["videos"]:
        summary.append("frames " + " -> ".join(map(str, video["frames"])))
        summary.append("video tokens {} -> {}".format(*video["tokens"]))
    summary += report["reasons"] if report["videos"] else ["NOT compressed", *report["reasons"]]
    progress_on.print("; ".join(summary), markup=False, soft_wrap=True)
