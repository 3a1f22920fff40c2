"""What the files of a checkpoint folder or Hub id say about its processor, wherever the checkpoint's age has put it.

video_settings("path/to/checkpoint")     # {"size": {...}, "num_frames": 32, ...}
frames_of("path/to/checkpoint")          # 32
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import EarlyTomConfigError

FRAMES = 32
"""Frames of a file where neither the caller nor the checkpoint says how many: the paper's, and LLaVA-OneVision's."""


def video_settings(checkpoint: str) -> dict[str, Any]:
    """What a checkpoint says about videos, from the file in which transformers looks for it; empty if there is none."""
    return settings_in(checkpoint, read_json(checkpoint, "processor_config.json"))


def frames_of(checkpoint: str) -> int:
    """How many frames of a video a checkpoint folder or Hub id was made for: its ``num_frames``, else 32.

    >>> read_video("talk.mp4", default=frames_of("path/to/checkpoint"))
    """
    return frames_in(video_settings(checkpoint))


def settings_in(model: str, processor: Mapping[str, Any]) -> dict[str, Any]:
    """The same, where processor_config.json is read already."""
    return (
        processor.get("video_processor")
        or read_json(model, "video_preprocessor_config.json")
        or read_json(model, "preprocessor_config.json")
    )


def frames_in(settings: Mapping[str, Any]) -> int:
    """``num_frames`` of a checkpoint's video settings, else 32."""
    frames = settings.get("num_frames")
    return frames if isinstance(frames, int) and frames > 0 else FRAMES


def patches_per_frame(model: str, processor: Mapping[str, Any]) -> int:
    """Of the encoder's grid, before pooling."""
    patches = processor.get("num_image_tokens")
    if patches is None:
        vision = read_json(model, "config.json")["vision_config"]
        patches = (vision["image_size"] // vision["patch_size"]) ** 2
    return patches


def chat_template_of(model: str, processor: Mapping[str, Any]) -> str | None:
    """The processor's template from wherever the checkpoint's age has put it, in transformers' order."""
    template = processor.get("chat_template") or read_json(model, "chat_template.json").get("chat_template")
    return template or _read_text(model, "chat_template.jinja")


@contextlib.contextmanager
def missing_files_named(model: str) -> Iterator[None]:
    """Where a folder cannot be loaded, say which of its files are missing; transformers speaks in riddles then."""
    try:
        yield
    except Exception as error:
        missing = _missing_files(model) if Path(model).is_dir() else []
        if not missing:
            raise
        raise EarlyTomConfigError(
            f"the processor of {model!r} cannot be loaded: {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing there. Copy all files of the checkpoint."
        ) from error


def _missing_files(folder: str) -> list[str]:
    missing = []
    if not any((Path(folder) / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        missing.append("tokenizer.json")
    nested = "image_processor" in read_json(folder, "processor_config.json")
    if not nested and not (Path(folder) / "preprocessor_config.json").is_file():
        missing.append("preprocessor_config.json")
    return missing


def in_one_line(error: Exception) -> str:
    """All that an error says."""
    return " ".join(str(error).split()) or type(error).__name__


def read_json(model: str, name: str) -> dict[str, Any]:
    """A JSON object of the checkpoint, empty if there is none."""
    try:
        content = json.loads(_read_text(model, name) or "{}")
    except (OSError, ValueError) as error:
        raise EarlyTomConfigError(f"{name} of {model!r} cannot be read: {in_one_line(error)}") from error
    return content if isinstance(content, dict) else {}


def _read_text(model: str, name: str) -> str | None:
    from transformers.utils.hub import cached_file

    file = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
    return None if file is None else Path(file).read_text(encoding="utf-8")
