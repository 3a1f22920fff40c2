"""A checkpoint, a video and a question -> a model and its inputs, with errors a user can act on.

loaded = load_checkpoint("path/or/hub-id", device="auto", dtype="auto")
inputs = prepare_inputs(loaded, "jobs.mp4", "What happens?", frames=32, progress_on=console)
loaded.model.generate(**inputs)
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from transformers.utils.hub import cached_file

from ..errors import EarlyTomConfigError
from ..integrations.preprocess import Processor, conversation, frame_resizer, load_processor, torchvision_works

Inputs = dict[str, torch.Tensor]
"""``input_ids``, ``attention_mask`` int64 [1, S] and ``pixel_values_videos`` [1, F, 3, H, W]."""

FAMILY = "llava_onevision"


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode on its device, and the processor that goes with it."""

    model: Any
    processor: Processor

    @property
    def device(self) -> torch.device:
        return self.model.device


def load_checkpoint(name: str, *, device: str = "auto", dtype: str = "auto") -> Loaded:
    """Load a LLaVA-OneVision checkpoint folder or Hub id with transformers' own code.

    Raises :class:`EarlyTomConfigError` if there is none, or if it is of another family or incomplete.
    """
    name = _checked(name)
    try:
        processor = load_processor(name)
    except (OSError, ValueError) as error:
        raise EarlyTomConfigError(f"the processor of {name!r} cannot be loaded: {error}") from error
    return Loaded(load_model(name, device=device, dtype=dtype), processor)


def load_model(name: str, *, device: str = "auto", dtype: str = "auto") -> Any:
    """Only the model of a checkpoint, which needs no tokenizer; raises as :func:`load_checkpoint` does."""
    place, name = resolve_device(device), _checked(name)
    torchvision_works()
    from transformers import LlavaOnevisionForConditionalGeneration

    try:
        model: Any = LlavaOnevisionForConditionalGeneration.from_pretrained(name)
    except OSError as error:
        raise EarlyTomConfigError(f"{name!r} cannot be loaded: {error}") from error
    return model.to(place, resolve_dtype(dtype, place, model.dtype)).eval()


def prepare_inputs(
    loaded: Loaded,
    video: str | Path,
    question: str,
    *,
    frames: int | None,
    default_frames: int = 32,
    progress_on: Console,
) -> Inputs:
    """Decode ``frames`` frames and make the model's inputs on its device, with a progress bar.

    ``frames``: None takes ``default_frames``, or all of a video that has fewer.
    """
    with progress_bars(progress_on) as progress:
        task = progress.add_task("decoding the video", total=None)

        def advance(done: int, of: int) -> None:
            progress.update(task, completed=done, total=of)

        from ..integrations.video import read_video  # timing needs no PyAV, and a lent machine may lack it

        resize = frame_resizer(loaded.processor)
        clip = read_video(video, frames, default=default_frames, resize=resize, progress=advance)
    prompt = loaded.processor.apply_chat_template(conversation(question), add_generation_prompt=True)
    inputs = loaded.processor(text=prompt, videos=clip.pixels, return_tensors="pt")
    names = ("input_ids", "attention_mask", "pixel_values_videos")
    moved = {name: inputs[name].to(loaded.device) for name in names}
    moved["pixel_values_videos"] = moved["pixel_values_videos"].to(loaded.model.dtype)
    return moved


def progress_bars(console: Console) -> Progress:
    """Bars that vanish when done; none where nobody watches."""
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def _checked(name: str) -> str:
    """The name without ~; looks at config.json before anything large is read."""
    name = str(Path(name).expanduser()) if name.startswith("~") else name
    local = Path(name)
    if not local.is_dir() and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise EarlyTomConfigError(f"no checkpoint folder at {name!r}: give a folder or a Hub id (owner/name).")
    if local.is_dir() and not (local / "config.json").is_file():
        raise EarlyTomConfigError(f"{name!r} is no checkpoint folder: it has no config.json.")
    try:
        file = cached_file(name, "config.json")
        family = json.loads(Path(str(file)).read_text(encoding="utf-8")).get("model_type")
    except OSError as error:
        raise EarlyTomConfigError(
            f"{name!r} is neither a folder here nor a checkpoint the Hugging Face Hub gives out: {error}"
        ) from error
    except ValueError as error:
        raise EarlyTomConfigError(f"config.json of {name!r} is not valid JSON: {error}.") from error
    if family != FAMILY:
        raise EarlyTomConfigError(
            f"{name!r} is a checkpoint of the family {family!r}: only {FAMILY!r} is supported, such as "
            "llava-hf/llava-onevision-qwen2-0.5b-ov-hf."
        )
    return name


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise EarlyTomConfigError(f"--device {name}: {reason} Take auto or cpu, or a GPU torch can see.") from error
    return device


def resolve_dtype(name: str, device: torch.device, checkpoint: torch.dtype) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)
    return torch.float32 if device.type == "cpu" else checkpoint
