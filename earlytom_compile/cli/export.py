"""``earlytom export``: the compressed video path of a checkpoint as one file, for processes without this package.

earlytom export --model path/to/checkpoint --frames 32 --retain-ratio 0.1 -o video.pt2
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from ..config import EarlyTomConfig
from ..errors import EarlyTomConfigError
from ..integrations.export import export, package, require_exportable, require_package_name
from .loading import open_checkpoint
from .progress import progress_bars
from .toolchain import missing_toolchain

LOADING = "torch._inductor.aoti_load_package"


def execute(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Look, load, export, compile, say what the file takes and gives."""
    require_exportable(EarlyTomConfig.from_options(options), options)
    require_package_name(arguments.output)
    console = Console(stderr=True)
    with progress_bars(console) as bars:
        bars.add_task("looking at the checkpoint", total=None)
        checkpoint = open_checkpoint(arguments.model, device=arguments.device, dtype=arguments.dtype, options=options)
    if missing := missing_toolchain(checkpoint.device):
        raise EarlyTomConfigError(f"{missing}.")
    loaded = checkpoint.load(console)
    frames = loaded.frames if arguments.frames is None else arguments.frames
    with progress_bars(console) as bars:
        bars.add_task("exporting the video path", total=None)
        program = export(loaded.model, frames=frames, frame_size=arguments.frame_size, **options)
    with progress_bars(console) as bars:
        bars.add_task("compiling it", total=None)
        metadata = package(program, arguments.output)
    for line in described(arguments.output, metadata):
        print(line)


def described(path: str, metadata: dict[str, str]) -> list[str]:
    """What a file takes, gives and was made of, for people."""
    takes, gives = (json.loads(metadata[name]) for name in ("inputs", "outputs"))
    options = {name: value for name, value in json.loads(metadata["options"]).items() if value is not None}
    versions = (f"{name} {metadata[name]}" for name in ("torch", "transformers", "earlytom_compile"))
    rows = {
        "file": f"{path}, {Path(path).stat().st_size / 1e6:.1f} MB, for {LOADING}()",
        "model": f"{metadata['model']}, videos of {metadata['frames']} pictures",
        "takes": ", ".join(f"{name} {what}" for name, what in takes.items()),
        "gives": ", ".join(f"{name} {what}" for name, what in gives.items()),
        "options": ", ".join(f"{name}={value}" for name, value in options.items()),
        "made with": ", ".join(versions),
    }
    return [f"{name:<11}{text}" for name, text in rows.items()]
