"""``earlytom demo``: everything a real run does, on a model and a video made on the spot.

Write checkpoint and clip -> load and decode them with the code for real ones -> answer with the full and with
the compressed model -> table -> report. Only the weights are not real.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from .clip import FRAMES, HEIGHT, WIDTH, write_clip
from .comparison import compare, comparison_table
from .loading import load_checkpoint, prepare_inputs, progress_bars
from .tiny_checkpoint import write_checkpoint
from .toolchain import missing_toolchain

QUESTION = "What happens in the video?"


def execute(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Run the demo; checkpoint and clip stay in ``arguments.save`` if that is given."""
    if arguments.save:
        _demo(Path(arguments.save), arguments, options)
        Console().print(f"\nCheckpoint and clip are in {arguments.save}.", soft_wrap=True, highlight=False)
    else:
        with tempfile.TemporaryDirectory(prefix="earlytom-demo-") as folder:
            _demo(Path(folder), arguments, options)


def _demo(folder: Path, arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    console, progress = Console(highlight=False), Console(stderr=True)
    transformers.utils.logging.disable_progress_bar()
    checkpoint, clip = write_demo_files(folder, progress)
    loaded = load_checkpoint(str(checkpoint))
    inputs = prepare_inputs(loaded, clip, QUESTION, frames=arguments.frames, progress_on=progress)
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    vision = loaded.model.config.vision_config.num_hidden_layers
    text = loaded.model.config.text_config.num_hidden_layers
    console.print(
        f"model     LLaVA-OneVision with {parameters / 1e6:.1f} M parameters, {vision} vision and {text} "
        "language layers, [bold]random weights[/]: the answers mean nothing\n"
        f"video     {FRAMES} frames of {WIDTH}x{HEIGHT}, {arguments.frames} of them sampled\n"
        f"question  {QUESTION}\n"
        f"machine   torch {torch.__version__} on {loaded.device}, {torch.get_num_threads()} threads, "
        f"transformers {transformers.__version__}\n",
        soft_wrap=True,
    )
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
    console.print("\n" + comparison.explanation, markup=False, soft_wrap=True)


def write_demo_files(folder: Path, progress_on: Console) -> tuple[Path, Path]:
    """The demo's checkpoint folder and video file, made in ``folder``."""
    with progress_bars(progress_on) as progress:
        progress.add_task("writing a tiny checkpoint and a clip", total=None)
        checkpoint = write_checkpoint(folder / "checkpoint")
        clip = folder / "clip.mp4"
        write_clip(clip)
    return checkpoint, clip
