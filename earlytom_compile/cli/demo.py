"""``earlytom demo``: what compression keeps and what it gains, in a minute, with what comes along.

Draw and encode a video of the toy world -> load the checkpoint that was trained on such videos, decode the video with
the code for real ones -> ask with all tokens and with fewer -> time a model of a size at which it matters -> a page.

Nothing is compiled by Inductor unless ``lowering`` says so: what differs between the columns is compression alone, and
nobody waits for a compiler.
"""

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import earlytom_compile

from ..benchmarks.arms import twin_of
from ..benchmarks.workload import make_inputs, random_model
from ..errors import EarlyTomConfigError
from ..picture import Asked
from ..reused import patches_of
from ..shapes import config_of
from ..toyworld.model import WEIGHTS
from ..toyworld.questions import Question, ask
from ..toyworld.world import FILE_FRAMES, SIZE, rng_of, sample_video, write_mp4
from .comparison import decode, full_model, timed_answer
from .loading import Inputs, Loaded, ask_again, load_checkpoint, prepare_inputs
from .outputs import check_outputs, output_console
from .picture import facts_of, filmed, write_pictures
from .progress import step
from .toolchain import missing_toolchain

_SEED = 0  # of the video, in the split "test": the model has never seen it
_FILE_WIDTH = 110  # columns, where nobody watches


@dataclass(frozen=True)
class _Size:
    """What is timed: a named shape with random weights, and how many frames."""

    shape: str
    frames: int
    dtype: torch.dtype
    words: str


_ON_CPU = _Size("cpu-demo", 8, torch.float32, "6 vision and 8 language layers, the real number of tokens a frame")
_ON_GPU = _Size("llava-onevision-0.5b", 32, torch.bfloat16, "the shape of LLaVA-OneVision 0.5B")


def execute(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Run the demo; checkpoint and video stay in ``arguments.save`` if that is given."""
    check_outputs(arguments)
    require_demo_frames(arguments.frames)
    if arguments.save:
        folder = Path(arguments.save)
        shutil.copytree(WEIGHTS, folder / "checkpoint", dirs_exist_ok=True)
        _demo(folder, arguments, options)
        Console().print(f"Checkpoint and video are in {folder}.", soft_wrap=True, highlight=False)
    else:
        with tempfile.TemporaryDirectory(prefix="earlytom-demo-") as name:
            _demo(Path(name), arguments, options)


def write_demo_video(path: Path) -> list[Question]:
    """Encode the demo's video to ``path``; returns what is asked about it."""
    video = sample_video("test", _SEED)
    write_mp4(video, path)
    return list(ask(video, rng_of("test", _SEED, stream=3)).values())


def require_demo_frames(frames: int | None) -> None:
    """Raise :class:`EarlyTomConfigError` for more frames than the demo's video has; others are checked as anyone's."""
    if frames is not None and frames > FILE_FRAMES:
        raise EarlyTomConfigError(f"frames={frames}: the made-up clip has {FILE_FRAMES} frames; take at most so many.")


def _demo(folder: Path, arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    console, progress_on = output_console(arguments, width=_FILE_WIDTH), Console(stderr=True)
    transformers.utils.logging.disable_progress_bar()
    clip = folder / "clip.mp4"
    with step(progress_on, "drawing a video"):
        questions = write_demo_video(clip)
    with step(progress_on, "loading the model"):
        loaded = load_checkpoint(str(WEIGHTS), options=options)
    options = _possible(loaded, options, console)
    console.print(_introduction(loaded, arguments.frames), soft_wrap=True)
    inputs = _inputs(loaded, clip, questions, arguments.frames, progress_on)
    answers, report = _answers(loaded, inputs, options, arguments.max_new_tokens, progress_on)
    console.print(_questions_table(questions, answers, report))
    console.print(_kept_text(report), markup=False, soft_wrap=True)
    gain = _measure(loaded.device, options, arguments.repeats, progress_on)
    console.print(_gain_text(gain), soft_wrap=True)
    asked = [Asked(question.text, *pair, question.answer) for question, pair in zip(questions, answers, strict=True)]
    write_pictures(
        loaded,
        [filmed(clip, inputs[0], asked, name="a drawn video")],
        options,
        html=arguments.html or (folder / "demo.html" if arguments.save else _page()),
        model="a small LLaVA-OneVision",
        facts=facts_of(report["prompt"]),
        progress_on=console,
    )


def _possible(loaded: Loaded, options: dict[str, Any], console: Console) -> dict[str, Any]:
    """The options, without a compiler where there is none."""
    missing = missing_toolchain(loaded.device)
    if missing and options.get("lowering") != "eager":
        console.print(f"Inductor cannot compile here, both models run eagerly: {missing}.\n", soft_wrap=True)
        return {**options, "lowering": "eager"}
    return options


def _page() -> Path:
    """Where the page goes if nobody says: it stays there."""
    return Path(tempfile.mkdtemp(prefix="earlytom-demo-")) / "demo.html"


def _introduction(loaded: Loaded, frames: int) -> str:
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    return (
        f"model     LLaVA-OneVision with {parameters / 1e6:.1f} M parameters, trained on videos like this one\n"
        f"video     {FILE_FRAMES} frames of {SIZE}x{SIZE}, {frames} of them sampled\n"
        f"machine   torch {torch.__version__} on {loaded.device}, {torch.get_num_threads()} threads, "
        f"transformers {transformers.__version__}\n"
    )


def _inputs(
    loaded: Loaded, clip: Path, questions: Sequence[Question], frames: int, progress_on: Console
) -> list[Inputs]:
    """Those of each question; the video is decoded once."""
    first = prepare_inputs(loaded, clip, questions[0].text, frames=frames, progress_on=progress_on)
    return [first, *(ask_again(loaded, first, question.text) for question in questions[1:])]


def _answers(
    loaded: Loaded, asked: Sequence[Inputs], options: dict[str, Any], max_new_tokens: int, progress_on: Console
) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """Each question's answer with all tokens and with fewer, and what the compressed model reports."""

    def answers() -> list[str]:
        return [decode(loaded, timed_answer(loaded.model, inputs, max_new_tokens)[0]) for inputs in asked]

    with step(progress_on, "asking with all video tokens"):
        full = answers()
    with step(progress_on, "asking with fewer: tracing, rewriting, answering"):
        earlytom_compile.compile(loaded.model, **options)
        compressed = answers()
    report = earlytom_compile.report(loaded.model).to_dict()
    earlytom_compile.restore(loaded.model)
    return list(zip(full, compressed, strict=True)), report


def _questions_table(
    questions: Sequence[Question], answers: Sequence[tuple[str, str]], report: dict[str, Any]
) -> Table:
    (video,) = report["videos"] or [{"frames": [0], "tokens": [0, 0]}]
    before, after = video["tokens"]
    table = Table(title="The same answers from fewer tokens", title_justify="left")
    for heading in ("question", "truth", f"all {before} video tokens", f"{after} of them"):
        table.add_column(heading, overflow="fold")
    for question, (full, compressed) in zip(questions, answers, strict=True):
        table.add_row(question.text, question.answer, full, compressed)
    return table


def _kept_text(report: dict[str, Any]) -> str:
    if not report["videos"]:
        return "This call ran uncompressed: " + "; ".join(report["reasons"])
    before, after = report["prompt"]
    return f"{_encoded(report)}; the prompt has {after} tokens instead of {before}."


def _encoded(report: dict[str, Any]) -> str:
    """What the vision encoder computed."""
    for patches in patches_of(report):
        return f"The vision encoder computes {patches.in_short()}, those that changed"
    frames = report["videos"][0]["frames"]
    if len(frames) == 1:
        return f"No frames merge with this method, {frames[0]} go through the vision encoder"
    return f"Frames merge inside the vision encoder, {' -> '.join(map(str, frames))}"


@dataclass(frozen=True)
class _Gain:
    """Seconds to the first token, run by run, of both models in turn."""

    size: _Size
    device: torch.device
    lowering: str
    full: list[float]
    compressed: list[float]
    report: dict[str, Any]


def _measure(device: torch.device, options: dict[str, Any], repeats: int, progress_on: Console) -> _Gain:
    size = _ON_CPU if device.type == "cpu" else _ON_GPU
    config = earlytom_compile.EarlyTomConfig.from_options(options)
    with step(progress_on, f"making a larger model with random weights ({size.shape})"):
        model = random_model(config_of(size.shape), device=device, dtype=size.dtype)
        inputs = make_inputs(model, frames=size.frames)
        full = twin_of(model) if config.lowering == "eager" else full_model(model, compiled=True)
        compressed = earlytom_compile.compile(model, **options)
    runs: dict[str, list[float]] = {"full": [], "compressed": []}
    for run in range(repeats + 1):
        what = "warming up" if run == 0 else f"timing both in turn, {run} of {repeats}"
        with step(progress_on, what):
            for name, arm in (("full", full), ("compressed", compressed)):
                _, seconds = timed_answer(arm, inputs, 1)
                if run > 0:
                    runs[name].append(seconds)
    report = earlytom_compile.report(model).to_dict()
    return _Gain(size, device, config.lowering, runs["full"], runs["compressed"], report)


def _gain_text(gain: _Gain) -> str:
    full, compressed = statistics.median(gain.full), statistics.median(gain.compressed)
    ratio = f"{full / compressed:.2f}x faster" if full >= compressed else f"{compressed / full:.2f}x slower"
    (video,) = gain.report["videos"] or [{"frames": [0], "tokens": [0, 0]}]
    left = [f"{patches.in_short()} computed" for patches in patches_of(gain.report)]
    left = left or [f"of which {video['frames'][-1]} are left"]
    compiled = "uncompiled, so that compression alone differs" if gain.lowering == "eager" else "compiled by Inductor"
    return (
        f"\nTime to the first token: [bold]{_milliseconds(gain.full)} -> {_milliseconds(gain.compressed)}, {ratio}[/]\n"
        f"  {gain.size.shape} on {gain.device}: {gain.size.words}; weights and video are random, which decides "
        "what is answered and not how long it takes.\n"
        f"  {video['frames'][0]} frames, {left[0]}, "
        "{} -> {} video tokens. ".format(*video["tokens"])
        + f"Both {compiled}, in turn; median of {len(gain.full)} runs, and the range.\n"
        "  More of it, on your machine or your model: earlytom bench, earlytom run --compare.\n"
    )


def _milliseconds(runs: Sequence[float]) -> str:
    return f"{1000 * statistics.median(runs):.0f} ms ({1000 * min(runs):.0f} to {1000 * max(runs):.0f})"
