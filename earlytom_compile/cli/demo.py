"""``earlytom demo``: everything a real run does, on a small model that really answers and a video made on the spot.

Draw and encode a video of the toy world -> load the trained checkpoint and decode the video with the code for real
ones -> answer with the full and with the compressed model -> table -> report -> more questions.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import earlytom_compile

from ..toyworld.model import WEIGHTS
from ..toyworld.questions import Question, ask
from ..toyworld.world import FILE_FRAMES, SIZE, rng_of, sample_video, write_mp4
from .comparison import compare, comparison_table, decode, timed_answer
from .loading import Loaded, load_checkpoint, prepare_inputs
from .toolchain import missing_toolchain

_SEED = 0  # of the video, in the split "test": the model has never seen it


def execute(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Run the demo; checkpoint and video stay in ``arguments.save`` if that is given."""
    if arguments.save:
        folder = Path(arguments.save)
        shutil.copytree(WEIGHTS, folder / "checkpoint", dirs_exist_ok=True)
        _demo(folder, arguments, options)
        Console().print(f"\nCheckpoint and video are in {folder}.", soft_wrap=True, highlight=False)
    else:
        with tempfile.TemporaryDirectory(prefix="earlytom-demo-") as name:
            _demo(Path(name), arguments, options)


def write_demo_video(path: Path) -> list[Question]:
    """Encode the demo's video to ``path``; returns what is asked about it."""
    video = sample_video("test", _SEED)
    write_mp4(video, path)
    return list(ask(video, rng_of("test", _SEED, stream=3)).values())


def _demo(folder: Path, arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    console, progress = Console(highlight=False), Console(stderr=True)
    transformers.utils.logging.disable_progress_bar()
    clip = folder / "clip.mp4"
    first, *others = write_demo_video(clip)
    loaded = load_checkpoint(str(WEIGHTS))
    inputs = prepare_inputs(loaded, clip, first.text, frames=arguments.frames, progress_on=progress)
    console.print(_introduction(loaded, first, arguments.frames), soft_wrap=True)
    missing = missing_toolchain(loaded.device)
    if missing and options.get("lowering") != "eager":
        options = {**options, "lowering": "eager"}
        console.print(f"Inductor cannot compile here, both models run eagerly: {missing}.\n", soft_wrap=True)
    comparison = compare(
        loaded,
        inputs,
        options,
        max_new_tokens=arguments.max_new_tokens,
        repeats=arguments.repeats,
        progress_on=progress,
    )
    console.print(comparison_table(comparison))
    console.print("\n" + comparison.explanation + "\n", markup=False, soft_wrap=True)
    console.print(_more_answers(loaded, clip, others, arguments, progress))


def _introduction(loaded: Loaded, question: Question, frames: int) -> str:
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    vision = loaded.model.config.vision_config.num_hidden_layers
    text = loaded.model.config.text_config.num_hidden_layers
    return (
        f"model     LLaVA-OneVision with {parameters / 1e6:.1f} M parameters, {vision} vision and {text} language "
        "layers, trained on videos like this one\n"
        f"video     {FILE_FRAMES} frames of {SIZE}x{SIZE}, {frames} of them sampled\n"
        f"question  {question.text}\n"
        f"truth     {question.answer}\n"
        f"machine   torch {torch.__version__} on {loaded.device}, {torch.get_num_threads()} threads, "
        f"transformers {transformers.__version__}\n"
    )


def _more_answers(
    loaded: Loaded, clip: Path, questions: list[Question], arguments: argparse.Namespace, progress: Console
) -> Table:
    """Asks the compressed model, undoes the compression, and asks again."""
    asked = [
        prepare_inputs(loaded, clip, question.text, frames=arguments.frames, progress_on=progress)
        for question in questions
    ]

    def answers() -> list[str]:
        return [decode(loaded, timed_answer(loaded.model, inputs, arguments.max_new_tokens)[0]) for inputs in asked]

    compressed = answers()
    earlytom_compile.restore(loaded.model)
    table = Table("question", "truth", "full model", "compressed", title="More questions", title_justify="left")
    for question, before, after in zip(questions, answers(), compressed, strict=True):
        table.add_row(question.text, question.answer, before, after)
    return table
