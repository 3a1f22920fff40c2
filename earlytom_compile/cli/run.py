"""``earlytom run``: questions about videos, answered with compressed video tokens, or with both to compare.

earlytom run --model path/to/checkpoint --video talk.mp4 --prompt "What is on the slide?" --retain-ratio 0.1

Everything but the weights is looked at first: the files to be written, the checkpoint's settings, the videos.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import transformers
from rich.console import Console

import earlytom_compile

from ..benchmarks.environment import environment
from ..benchmarks.measure import compile_seconds
from ..config import EarlyTomConfig
from ..errors import EarlyTomConfigError
from ..reused import ComputedPatches
from .comparison import EMPTY, BothModels, Comparison, comparison_table, decode, timed_answer
from .loading import (
    Checkpoint,
    Inputs,
    Loaded,
    ask_again,
    frames_in,
    open_checkpoint,
    prepare_inputs,
    progress_bars,
    require_question,
)
from .outputs import STANDARD_OUTPUT, output_console, write_text
from .picture import Answered, check_pictures, facts_of, wants_picture, write_run_pictures
from .toolchain import require_toolchain


@dataclass(frozen=True)
class Asked:
    """A question about a video, ready for the model."""

    video: str
    question: str
    inputs: Inputs


def execute(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Look, load, answer, print."""
    _check(arguments)
    if arguments.quiet:
        transformers.utils.logging.set_verbosity_error()
    progress = Console(stderr=True, quiet=arguments.quiet)
    with progress_bars(progress) as bars:
        bars.add_task("looking at the checkpoint", total=None)
        checkpoint = open_checkpoint(arguments.model, device=arguments.device, dtype=arguments.dtype, options=options)
    require_toolchain(checkpoint.device, options)
    asked = list(_ask(checkpoint, arguments, progress))
    loaded = checkpoint.load(progress)
    console, about = _console(arguments), _about(arguments, loaded, options)
    both = BothModels(loaded, options) if arguments.compare else None
    if both is None:
        earlytom_compile.compile(loaded.model, **options)
    try:
        for one in asked:
            if len(asked) > 1 and not arguments.quiet:
                console.print(f"{one.video}: {one.question}", style="bold", markup=False, soft_wrap=True)
            if both is None:
                answer = _answer(loaded, one, arguments, console, progress)
            else:
                answer = _compare(both, one, arguments, console, progress)
            about["answers"].append({"video": one.video, "prompt": one.question, **answer})
            if arguments.json and (arguments.json != STANDARD_OUTPUT or one is asked[-1]):
                write_text(arguments.json, json.dumps(about, indent=2) + "\n")
    except KeyboardInterrupt:
        if not arguments.json or arguments.json == STANDARD_OUTPUT or not about["answers"]:
            raise
        saved = f"{arguments.json} has {len(about['answers'])} of {len(asked)} answers."
        raise KeyboardInterrupt(saved) from None
    if wants_picture(arguments):
        _draw(loaded, asked, about["answers"], arguments, options, progress)


def _draw(
    loaded: Loaded,
    asked: list[Asked],
    answers: list[dict[str, Any]],
    arguments: argparse.Namespace,
    options: dict[str, Any],
    progress_on: Console,
) -> None:
    answered = [
        Answered(one.video, one.question, one.inputs, answer["answer"], answer.get("full_model", {}).get("answer"))
        for one, answer in zip(asked, answers, strict=True)
    ]
    first, times = answers[0], None
    if arguments.compare:
        times = first["full_model"]["first_token_seconds"], first["first_token_seconds"]
    write_run_pictures(
        loaded,
        answered,
        options,
        html=arguments.html,
        png=arguments.png,
        model=arguments.model,
        facts=facts_of(first["prompt_tokens"], times) if len(answers) == 1 else [],
        max_new_tokens=arguments.max_new_tokens,
        progress_on=progress_on,
    )


def _check(arguments: argparse.Namespace) -> None:
    check_pictures(arguments)
    for question in arguments.prompt:
        require_question(question)
    for name in ("frames", "max_new_tokens", "repeats"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise EarlyTomConfigError(f"{name}={value}: must be at least 1.")
    if "repeats" in arguments.given and not arguments.compare:
        raise EarlyTomConfigError(f"repeats={arguments.repeats} without --compare: nothing is timed repeatedly.")


def _ask(checkpoint: Checkpoint, arguments: argparse.Namespace, progress: Console) -> Iterator[Asked]:
    """Every question about every video, each of which is decoded once."""
    for video in arguments.video:
        first, *others = arguments.prompt
        inputs = prepare_inputs(
            checkpoint,
            video,
            first,
            frames=arguments.frames,
            default_frames=checkpoint.frames,
            progress_on=progress,
        )
        yield Asked(video, first, inputs)
        for question in others:
            yield Asked(video, question, ask_again(checkpoint, inputs, question))


def _about(arguments: argparse.Namespace, loaded: Loaded, options: dict[str, Any]) -> dict[str, Any]:
    """What the answers depend on; their list is empty yet."""
    config = dataclasses.asdict(EarlyTomConfig.from_options(options))
    return {
        **environment(loaded.device),
        "model": arguments.model,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "options": config,
        "max_new_tokens": arguments.max_new_tokens,
        "answers": [],
    }


def _console(arguments: argparse.Namespace) -> Console:
    """Where answers and tables go; nowhere if the standard output is for JSON and nobody wants to read beside it."""
    console = output_console(arguments)
    console.quiet = arguments.quiet and arguments.json == STANDARD_OUTPUT
    return console


def _answer(
    loaded: Loaded, asked: Asked, arguments: argparse.Namespace, console: Console, progress_on: Console
) -> dict[str, Any]:
    """Answer with the compressed model, print, and tell everything about it."""
    with progress_bars(progress_on) as progress:
        progress.add_task("compiling and answering", total=None)
        before = compile_seconds()
        tokens, seconds = timed_answer(loaded.model, asked.inputs, arguments.max_new_tokens)
    compiling = compile_seconds() - before
    text, report = decode(loaded, tokens), earlytom_compile.report(loaded.model).to_dict()
    shown = EMPTY if not text and not arguments.quiet else text
    console.print(shown, markup=False, soft_wrap=True)
    said = {"answer": text, "tokens": len(tokens), "seconds": seconds, "compile_seconds": compiling}
    progress_on.print("; ".join(_summary(said, report)), markup=False, highlight=False, soft_wrap=True)
    return {**said, **_kept(asked.inputs, report)}


def _summary(said: dict[str, Any], report: dict[str, Any]) -> list[str]:
    """What came out, in few words."""
    compiling = f", {said['compile_seconds']:.1f} s of it compilation" if said["compile_seconds"] >= 0.05 else ""
    summary = [f"{said['tokens']} tokens in {said['seconds']:.1f} s{compiling}"]
    if not said["answer"]:
        summary.append("none of them is text: the model ended its turn at once")
    for video in report["videos"]:
        summary.append("frames " + " -> ".join(map(str, video["frames"])))
        if "patches" in video:
            summary.append(f"{ComputedPatches(**video['patches']).in_short()} computed")
        summary.append("video tokens {} -> {}".format(*video["tokens"]))
    return summary + (report["reasons"] if report["videos"] else ["NOT compressed", *report["reasons"]])


def _compare(
    both: BothModels, asked: Asked, arguments: argparse.Namespace, console: Console, progress_on: Console
) -> dict[str, Any]:
    """Answer with both models, print the table, and tell everything about it."""
    comparison = both.compare(
        asked.inputs,
        max_new_tokens=arguments.max_new_tokens,
        repeats=arguments.repeats,
        progress_on=progress_on,
    )
    if arguments.quiet:
        for name, arm in (("full model", comparison.full), ("compressed", comparison.compressed)):
            console.print(f"{name}: {arm.text}", markup=False, soft_wrap=True)
    else:
        console.print(comparison_table(comparison))
    for reason in comparison.report["reasons"]:
        console.print(f"left alone: {reason}", markup=False, soft_wrap=True)
    return {**_both(comparison), **_kept(asked.inputs, comparison.report)}


def _both(comparison: Comparison) -> dict[str, Any]:
    """The compressed model's answer and times, those of the full one, and whether both say the same."""
    compressed, full = (
        {
            "answer": arm.text,
            "tokens": len(arm.answer),
            "seconds": arm.first_seconds,
            "first_token_seconds": arm.ttft_seconds,
        }
        for arm in (comparison.compressed, comparison.full)
    )
    return {**compressed, "full_model": full, "agree": comparison.agree, "common_tokens": comparison.common_tokens}


def _kept(inputs: Inputs, report: dict[str, Any]) -> dict[str, Any]:
    """Frames at first and after each merge, patches where they are reused, and tokens before and after, of the video
    and of the whole prompt."""
    videos, length = report["videos"], inputs["input_ids"].shape[1]
    return {
        "compressed": bool(videos),
        "frames": videos[0]["frames"] if videos else [frames_in(inputs)],
        "merge_layers": report["merge_layers"],
        "patches": videos[0].get("patches") if videos else None,
        "full_layers": report["full_layers"],
        "video_tokens": videos[0]["tokens"] if videos else None,
        "prompt_tokens": report["prompt"] or [length, length],
        "reasons": report["reasons"],
    }
