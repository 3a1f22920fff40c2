"""``earlytom explain``: one compressed call, then what the compiler matched, inserted and left alone."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

import earlytom_compile

from ..toyworld.model import WEIGHTS
from .comparison import timed_answer
from .demo import write_demo_video
from .loading import load_checkpoint, prepare_inputs, progress_bars
from .picture import check_pictures, filmed, wants_picture, write_pictures
from .toolchain import require_toolchain

_QUESTION = "what color is the circle ?"  # any will do: only the lengths are reported


def execute(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Call once, print the report, draw."""
    check_pictures(arguments)
    progress_on = Console(stderr=True)
    loaded = load_checkpoint(arguments.model or str(WEIGHTS), device=arguments.device, dtype=arguments.dtype)
    require_toolchain(loaded.device, options)
    with tempfile.TemporaryDirectory(prefix="earlytom-explain-") as folder:
        clip = arguments.video or Path(folder) / "clip.mp4"
        if not arguments.video:
            write_demo_video(clip)
        inputs = prepare_inputs(loaded, clip, _QUESTION, frames=arguments.frames, progress_on=progress_on)
        name = None if arguments.video else "a clip made on the spot"
        pictured = [filmed(clip, inputs, name=name)] if wants_picture(arguments) else []
    model = earlytom_compile.compile(loaded.model, **options)
    with progress_bars(progress_on) as progress:
        progress.add_task("compile and answer", total=None)
        timed_answer(model, inputs, max_new_tokens=1)
    Console(highlight=False).print(str(earlytom_compile.report(model)), markup=False, soft_wrap=True)
    if pictured:
        model_name = arguments.model or "the demo's model"
        where = {"html": arguments.html, "png": arguments.png}
        write_pictures(loaded, pictured, options, **where, model=model_name, progress_on=progress_on)
