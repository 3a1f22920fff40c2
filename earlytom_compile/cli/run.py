"""``earlytom run``: a question about a video, answered with compressed video tokens, or with both to compare.

earlytom run --model path/to/checkpoint --video talk.mp4 --prompt "What is on the slide?" --retain-ratio 0.1
"""

import argparse
from typing import Any

from rich.console import Console

import earlytom_compile

from .comparison import compare, comparison_table, decode, timed_answer
from .loading import Inputs, Loaded, load_checkpoint, prepare_inputs, progress_bars
from .picture import Answered, check_pictures, facts_of, wants_picture, write_run_pictures
from .toolchain import require_toolchain


def execute(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Load, answer, print, draw."""
    check_pictures(arguments)
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
        answers: tuple[str, str | None] = comparison.compressed.text, comparison.full.text
        facts = facts_of(
            comparison.report["prompt"], (comparison.full.ttft_seconds, comparison.compressed.ttft_seconds)
        )
    else:
        answers = _answer(loaded, inputs, options, arguments.max_new_tokens, console, progress), None
        facts = facts_of(earlytom_compile.report(loaded.model).to_dict()["prompt"])
    if wants_picture(arguments):
        write_run_pictures(
            loaded,
            [Answered(arguments.video, arguments.prompt, inputs, *answers)],
            options,
            html=arguments.html,
            png=arguments.png,
            model=arguments.model,
            facts=facts,
            max_new_tokens=arguments.max_new_tokens,
            progress_on=progress,
        )


def _answer(
    loaded: Loaded,
    inputs: Inputs,
    options: dict[str, Any],
    max_new_tokens: int,
    console: Console,
    progress_on: Console,
) -> str:
    """Print the compressed model's answer, and return it."""
    model = earlytom_compile.compile(loaded.model, **options)
    with progress_bars(progress_on) as progress:
        progress.add_task("compile and answer", total=None)
        tokens, seconds = timed_answer(model, inputs, max_new_tokens)
    answer = decode(loaded, tokens)
    console.print(answer, markup=False, soft_wrap=True)
    summary = [f"{len(tokens)} tokens in {seconds:.1f} s, compilation included"]
    report = earlytom_compile.report(model).to_dict()
    for video in report["videos"]:
        summary.append("frames " + " -> ".join(map(str, video["frames"])))
        summary.append("video tokens {} -> {}".format(*video["tokens"]))
    summary += report["reasons"] if report["videos"] else ["NOT compressed", *report["reasons"]]
    progress_on.print("; ".join(summary), markup=False, soft_wrap=True)
    return answer
