"""What ``earlytom bench`` knows while it measures, single calls or load."""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from ..qwen_shape import QwenShape, is_qwen
from ..shapes import ModelShape
from .loading import progress_bars
from .outputs import STANDARD_OUTPUT, write_text


@dataclass(frozen=True)
class Session:
    """A model to be measured, and where to tell about it."""

    arguments: argparse.Namespace
    model: Any
    shape: ModelShape | None
    """The model's, for pictures of the size they have; None where its work cannot be counted."""
    options: dict[str, Any]
    """Those of EarlyTom, without a ratio."""
    clips: dict[int, torch.Tensor]
    """A video's pixels [frames, 3, H, W] by number of frames; empty where videos are made up."""
    about: dict[str, Any]
    start: float
    """When all began, seconds of ``time.perf_counter``; earlier, by as long as an earlier run took."""
    saved: dict[str, Any]
    """What an earlier run wrote, to go on with."""
    console: Console
    progress_on: Console

    @property
    def layers(self) -> int:
        """Of both parts of the model."""
        vision = self.model.config.vision_config
        encoder = vision.depth if is_qwen(self.model.config) else vision.num_hidden_layers
        return encoder + self.model.config.text_config.num_hidden_layers

    def look(self, frames: int) -> dict[str, Any]:
        """What ``make_inputs`` takes for prompts and videos."""
        arguments = self.arguments
        made_up = {"scene_frames": arguments.scene_frames, "redundancy": arguments.redundancy}
        if isinstance(self.shape, QwenShape):
            made_up["picture_size"] = self.shape.picture_size
        return {
            "prompt_length": arguments.prompt_length,
            **({"video": self.clips[frames]} if self.clips else made_up),
        }

    def told(self) -> dict[str, Any]:
        """What stands beside the numbers, and how long all took up to now."""
        return {
            **self.about,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "seconds": round(time.perf_counter() - self.start, 1),
        }

    def write_json(self, content: Callable[[dict[str, Any]], dict[str, Any]], *, last: bool = False) -> None:
        """Write what ``content`` makes of :meth:`told`; to the standard output only what comes ``last``."""
        file = self.arguments.json
        if file and (last or file != STANDARD_OUTPUT):
            write_text(file, json.dumps(content(self.told()), indent=2) + "\n")

    def say(self, text: str) -> None:
        """To whoever watches."""
        self.progress_on.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def bars(self, text: str) -> Iterator[Callable[[str], None]]:
        """A bar, and what changes its text."""
        with progress_bars(self.progress_on) as progress:
            task = progress.add_task(text, total=None)
            yield lambda description: progress.update(task, description=description)
