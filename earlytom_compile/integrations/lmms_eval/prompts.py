"""What lmms-eval hands over for a sample -> turns of text, pictures and videos, in reading order.

simple   ("<image>\\nWho is it?", [picture], metadata)      -> Turn("user", (Picture, "\\nWho is it?"))
simple   ("What happens?", ["a.mp4"], metadata)            -> Turn("user", (Film("a.mp4"), "What happens?"))
chat     [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}, {"type": "text", "text": "Who?"}]}]
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ...config import bad_option, is_whole_number
from ...errors import EarlyTomConfigError
from ..video import sample_indices

_MARKS = re.compile("<image>|<video>")
_PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".tiff", ".webp")


@dataclass(frozen=True)
class Picture:
    """An image, RGB."""

    image: Image.Image


@dataclass(frozen=True)
class Film:
    """A video: the path or address of a file, or its frames as pictures."""

    source: str | Sequence[Image.Image]

    def __str__(self) -> str:
        return repr(self.source) if isinstance(self.source, str) else f"a video of {len(self.source)} pictures"


Part = str | Picture | Film


@dataclass(frozen=True)
class Turn:
    """What one side says at once."""

    role: str
    parts: tuple[Part, ...]

    def media(self) -> tuple[Picture | Film, ...]:
        """All but the text."""
        return tuple(part for part in self.parts if not isinstance(part, str))

    def media_first(self) -> bool:
        """Whether no text comes before a picture or a video."""
        kinds = [isinstance(part, str) for part in self.parts]
        return kinds == sorted(kinds)


def from_visuals(context: str, visuals: Any, metadata: Mapping[str, Any]) -> list[Turn]:
    """A question of a simple task and what ``doc_to_visual`` gave for it: pictures, and paths of videos.

    In place of as many ``<image>`` or ``<video>`` in the text as there are pictures and videos, else in front of it.
    With ``task_type: video`` and ``sample_frames`` in the task's metadata the pictures are the frames of one video, of
    which so many are taken, spread evenly. Raises :class:`EarlyTomConfigError` for what cannot be shown.
    """
    given = [] if visuals is None else list(visuals) if isinstance(visuals, list | tuple) else [visuals]
    if metadata.get("task_type") == "video" and "sample_frames" in metadata:
        given = [_sampled(given, metadata["sample_frames"])]
    media = [medium(each) for each in given]
    texts = _MARKS.split(context)
    if len(texts) == 1 or len(texts) != len(media) + 1:
        return [Turn("user", (*media, context))]
    between: list[Part] = [texts[0]]
    for part, text in zip(media, texts[1:], strict=True):
        between += [part, text]
    return [Turn("user", tuple(part for part in between if part != ""))]


def from_messages(messages: Iterable[Mapping[str, Any]]) -> list[Turn]:
    """A conversation of a chat task; raises :class:`EarlyTomConfigError` for what cannot be shown."""
    turns = []
    for message in messages:
        content = message["content"]
        parts = [content] if isinstance(content, str) else [_part(part) for part in content]
        turns.append(Turn(message["role"], tuple(parts)))
    return turns


def medium(given: Any) -> Picture | Film:
    """A picture of Pillow or its file, the path or address of a video, or a list of pictures that is a video."""
    if isinstance(given, Image.Image):
        return Picture(given.convert("RGB"))
    if isinstance(given, str | Path):
        return Picture(_opened(str(given))) if str(given).lower().endswith(_PICTURES) else Film(str(given))
    if isinstance(given, list | tuple) and given and all(isinstance(each, Image.Image) for each in given):
        return Film([each.convert("RGB") for each in given])
    if isinstance(given, Mapping) and ("video_start" in given or "video_end" in given):
        raise EarlyTomConfigError(f"{dict(given)!r}: a part of a video cannot be read; give a file that has only it.")
    raise EarlyTomConfigError(
        f"the task shows a {type(given).__name__}: only pictures (PIL.Image), paths of videos, and lists of pictures "
        "that are one video can be shown; sound cannot."
    )


def _part(part: Mapping[str, Any]) -> Part:
    kind = part.get("type")
    if kind == "text":
        return str(part["text"])
    if kind not in ("image", "video"):
        raise EarlyTomConfigError(f"the task's message has a part of type {kind!r}: must be text, image or video.")
    given = part.get("url", part.get(kind))
    if isinstance(given, str | Path):  # what it is called decides, not how the file is named
        return Film(str(given)) if kind == "video" else Picture(_opened(str(given)))
    found = medium([given] if kind == "video" and isinstance(given, Image.Image) else given)
    if isinstance(found, Film) and kind == "image":
        raise EarlyTomConfigError(f"the task's message calls {found} an image.")
    return found


def _sampled(frames: list[Any], count: Any) -> list[Any]:
    if not is_whole_number(count) or count < 1:
        raise bad_option("sample_frames", count, "a whole number, at least 1")
    if not frames or not all(isinstance(each, Image.Image) for each in frames):
        raise EarlyTomConfigError(
            f"the task's metadata says sample_frames={count}, and it shows {len(frames)} thing(s) that are not all "
            "pictures: those of a video are wanted."
        )
    return [frames[index] for index in sample_indices(len(frames), min(count, len(frames)))]


def _opened(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise EarlyTomConfigError(f"{path!r} cannot be read as a picture: {error}") from error
