"""``earlytom explain``: one video with all tokens and with fewer, for people first, for compiler engineers last.

What you gain (tokens, work, time, memory) -> what both models answer, if they are asked -> what was found in the
video -> what the words mean -> the report.
"""

import argparse
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console

from ..config import EarlyTomConfig
from ..errors import EarlyTomConfigError
from ..methods.registry import EARLYTOM, method_named
from ..picture import Asked
from ..reused import ComputedPatches
from ..toyworld.model import WEIGHTS
from ..words import counted
from .comparison import EMPTY, BothModels, Comparison, decode, timed_answer
from .demo import require_demo_frames, write_demo_video
from .gains import gains_of, gains_table
from .loading import (
    Inputs,
    Loaded,
    ask_again,
    frames_in,
    grid_in,
    keeps_places,
    open_checkpoint,
    prepare_inputs,
    require_question,
)
from .outputs import output_console
from .picture import Answered, both_answers, check_pictures, filmed, wants_picture, write_pictures
from .progress import step
from .toolchain import require_toolchain

_QUESTION = "what color is the circle ?"  # where nobody asks, any will do: only the lengths are reported
_REPEATS = 3
_CHOSEN_BY = {
    "paper": "those that receive most attention inside the vision encoder, in every segment its share",
    "released": "those that receive most attention inside the vision encoder; how many depends on the video",
    "plus": "those that together represent all others best",
}
_LEGEND = """\
frame             a picture of the video, or with Qwen two; the encoder turns each into the same number of tokens
token             what the language model reads; a video has far more of them than a question
patch             a small square of a frame; the vision encoder's layers compute a state of each
merge layer       an encoder layer behind which frames that look alike become one, so that later layers do less
segment           neighbouring frames that are compared with each other; a cut ends it
keys and values   what the language model remembers of the prompt while it writes the answer
vision encoder    in the report: where in the model the encoder was found, and its merge layers
inserted          operations that were put into the model's graph
computed by       "native": plain PyTorch; "triton": kernels for GPUs
lowering          "staged", "whole": Inductor compiles, in pieces or all at once; "eager": nothing is compiled
compiled          how often the compiler ran and why; no other length of a video does it again
left alone        what kept all tokens, and why"""


def execute(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Call both models, ask them, print what came out, draw."""
    _check(arguments)
    progress_on, console = Console(stderr=True), output_console(arguments)
    transformers.utils.logging.disable_progress_bar()
    name = arguments.model or str(WEIGHTS)
    checkpoint = open_checkpoint(name, device=arguments.device, dtype=arguments.dtype, options=options)
    require_toolchain(checkpoint.device, options)
    questions = arguments.prompt or []
    with tempfile.TemporaryDirectory(prefix="earlytom-explain-") as folder:
        clip = arguments.video or Path(folder) / "clip.mp4"
        if not arguments.video:
            write_demo_video(clip)
        inputs = prepare_inputs(
            checkpoint,
            clip,
            questions[0] if questions else _QUESTION,
            frames=arguments.frames,
            default_frames=checkpoint.frames,
            progress_on=progress_on,
        )
        name = None if arguments.video else "a clip made on the spot"
        pictured = [filmed(clip, inputs, name=name)] if wants_picture(arguments) else []
    loaded = checkpoint.load(progress_on)
    comparison = BothModels(loaded, options).compare(
        inputs, max_new_tokens=1, repeats=_REPEATS, progress_on=progress_on
    )
    gains = gains_of(loaded.model, comparison, options, grid_in(inputs))
    asked = _ask(loaded, questions, clip, inputs, arguments.max_new_tokens, progress_on)
    length = f"{frames_in(inputs)} {'temporal patches' if keeps_places(inputs) else 'frames'}"
    console.print(_subject(arguments, length), soft_wrap=True, markup=False)
    if gains is None:
        reasons = "; ".join(comparison.report["reasons"]) or "see the report"
        console.print(f"\nNothing: this call kept all tokens ({reasons}).", markup=False, soft_wrap=True)
    else:
        console.print(gains_table(gains))
    if asked:
        _print_part(console, "What both models answer", _answers(asked))
    if gains is not None:
        _print_part(console, "What was found", _findings(comparison, EarlyTomConfig.from_options(options)))
    _print_part(console, "What the words mean", _LEGEND)
    _print_part(console, "What the compiler says", comparison.explanation)
    if pictured:
        model_name = arguments.model or "the demo's model"
        where = {"html": arguments.html, "png": arguments.png}
        films = [replace(film, asked=asked) for film in pictured]
        write_pictures(loaded, films, options, **where, model=model_name, progress_on=progress_on)


def _check(arguments: argparse.Namespace) -> None:
    check_pictures(arguments)
    for question in arguments.prompt or ():
        require_question(question)
    if arguments.max_new_tokens < 1:
        raise EarlyTomConfigError(f"max_new_tokens={arguments.max_new_tokens}: must be at least 1.")
    if "max_new_tokens" in arguments.given and not arguments.prompt:
        raise EarlyTomConfigError(f"max_new_tokens={arguments.max_new_tokens} without --prompt: nothing is answered.")
    if not arguments.video:
        require_demo_frames(arguments.frames)


def _ask(
    loaded: Loaded,
    questions: Sequence[str],
    video: str | Path,
    inputs: Inputs,
    max_new_tokens: int,
    progress_on: Console,
) -> list[Asked]:
    """Both answers to each question about ``video``, that of ``inputs``; ``loaded`` is compressed, then no longer."""
    answered = []
    for question in questions:
        again = ask_again(loaded, inputs, question)
        with step(progress_on, "answering with fewer tokens"):
            tokens, _ = timed_answer(loaded.model, again, max_new_tokens)
        answered.append(Answered(video, question, again, decode(loaded, tokens)))
    return both_answers(loaded, answered, max_new_tokens, progress_on)


def _answers(asked: Sequence[Asked]) -> str:
    """Each question, and below it what both say, or each."""
    lines = []
    for one in asked:
        full, compressed = one.full or EMPTY, one.compressed or EMPTY
        lines.append(one.question)
        lines += [f"  both        {full}"] if one.agree else [f"  all tokens  {full}", f"  compressed  {compressed}"]
    return "\n".join(lines)


def _print_part(console: Console, title: str, text: str) -> None:
    console.print(f"\n{title}", style="italic", markup=False)
    console.print(text, markup=False, soft_wrap=True)


def _subject(arguments: argparse.Namespace, length: str) -> str:
    """What the numbers are about, above all where nobody chose it."""
    lines = []
    if not arguments.model:
        lines.append("The model is the demo's small one, since no --model was given.")
    if not arguments.video:
        lines.append(
            "The clip is made up, since no --video was given: drawn shapes, which stand still more than people do. How "
            "far frames merge depends on the video, so give one of yours."
        )
    return "\n".join(lines or [f"{arguments.video}, {length} of it"]) + "\n"


def _findings(comparison: Comparison, config: EarlyTomConfig) -> str:
    """Frames, patches and tokens of each video, in sentences."""
    report, lines = comparison.report, []
    for number, video in enumerate(report["videos"], start=1):
        name = "the video" if len(report["videos"]) == 1 else f"video {number}"
        reused = video.get("patches")
        said = _merged(name, video["frames"], report["merge_layers"])
        if config.method != EARLYTOM:
            said = f"The vision encoder gets {counted(video['frames'][0], 'frame')} of {name}; none merge."
        if reused is not None:
            said = _reused(name, ComputedPatches(**reused), config, report["encoder"]["layers"])
        before, after = video["tokens"]
        lines.append(
            f"{said} {after} of the video's {before} tokens ({after / before:.1%}) go to the language model: "
            f"{_chosen_by(config)}."
        )
    lines += [
        f"From layer {step['layer']} of the language model on, {step['prompt']} of the prompt's {report['prompt'][1]} "
        "positions are left."
        for step in report["inside"]
    ]
    return "\n".join(textwrap.fill(line, 110) for line in lines)


def _chosen_by(config: EarlyTomConfig) -> str:
    method = method_named(config.method)
    if method is None:
        return _CHOSEN_BY[str(config.variant)]
    if method.keep is None:
        return f"all of them, since method {method.name} leaves tokens out inside the language model only"
    return f"those that method {method.name} keeps"


def _merged(name: str, frames: Sequence[int], layers: Sequence[int]) -> str:
    steps = [f"{left} after layer {layer}" for layer, left in zip(layers, frames[1:], strict=True)]
    merged = f"of them are left {', '.join(steps)}, since the others look like a neighbour of theirs"
    if frames[0] == frames[-1]:
        merged = "no two of them look enough alike to merge"
    return f"The vision encoder gets {frames[0]} frames of {name}; {merged}."


def _reused(name: str, computed: ComputedPatches, config: EarlyTomConfig, layers: int) -> str:
    by_frame = f" Percent of each frame: {computed.frame_by_frame()}." if computed.reused else ""
    frames = f"The vision encoder gets {counted(len(computed.by_frame), 'frame')} of {name}."
    return f"{frames} {computed.told(config, layers)}{by_frame}"
