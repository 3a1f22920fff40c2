"""A checkpoint, a video and a question -> a model and its inputs, with errors a user can act on.

checkpoint = open_checkpoint("path/or/hub-id", device="auto", dtype="auto")     # weights are looked at, not read
inputs = prepare_inputs(checkpoint, "jobs.mp4", "What happens?", frames=None, progress_on=console)
loaded = checkpoint.load(console)
loaded.model.generate(**inputs)

Reading the weights of a large model takes a minute: whatever else can be wrong is found before.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from rich.console import Console
from transformers.utils import logging
from transformers.utils.hub import cached_file

from ..config import EarlyTomConfig
from ..errors import EarlyTomConfigError
from ..families.registry import family_of_checkpoint
from ..integrations.preprocess import (
    FRAMES,
    PixelSettings,
    Processor,
    conversation,
    frame_resizer,
    frames_of,
    in_one_line,
    load_processor,
    makes_patches,
    torchvision_works,
)
from .options import require_effect
from .progress import progress_bars

Inputs = dict[str, torch.Tensor]
"""``input_ids``, ``attention_mask`` int64 [1, S] and ``pixel_values_videos`` [1, F, 3, H, W]; of a model of Qwen
patches [T·h·w, ...], ``video_grid_thw`` [1, 3], ``mm_token_type_ids`` [1, S] and ``second_per_grid_ts`` [1]."""

_OF_THE_MODEL = (
    "input_ids", "attention_mask", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids",
)  # fmt: skip
_OF_THE_VIDEO = ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")


class VideoInputs(Inputs):
    """Inputs that know which frames of which file they were made of, to be asked again."""

    clip: "Clip"


@dataclass(frozen=True)
class Clip:
    """A video as it was decoded: ``shape`` [F, H, W, 3], where its frames lie in the file, and how fast that is."""

    shape: tuple[int, ...]
    indices: tuple[int, ...]
    total: int
    rate: float | None

    @property
    def told(self) -> dict[str, Any]:
        """``video_metadata`` for transformers' processors, by which they tell the time of each frame."""
        return {"total_num_frames": self.total, "fps": self.rate, "frames_indices": list(self.indices)}


_WEIGHTS = "model.safetensors"
_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode on its device, and the processor that goes with it."""

    model: Any
    processor: Processor
    frames: int = FRAMES
    """How many frames a video has unless the user says so."""

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says without its weights, and where the model is going to be."""

    name: str
    config: Any
    processor: Processor
    device: torch.device
    dtype: torch.dtype
    frames: int
    """As in :class:`Loaded`."""

    def load(self, progress_on: Console) -> Loaded:
        """Read the weights; raises :class:`EarlyTomConfigError` where that fails."""
        with progress_bars(progress_on) as progress:
            progress.add_task("loading the weights", total=None)
            return Loaded(_read_weights(self.name, self.config, self.device, self.dtype), self.processor, self.frames)


def open_checkpoint(
    name: str, *, device: str = "auto", dtype: str = "auto", options: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Look at a checkpoint folder or Hub id of a known family, with transformers' own code.

    Raises :class:`EarlyTomConfigError` if there is none, if it is of another family, incomplete or damaged, and if
    ``options``, those of :func:`earlytom_compile.compile`, name layers that its encoder does not have or what the
    device has no use for.
    """
    place, (name, config) = resolve_device(device), checked_config(name)
    require_effect(options or {}, place.type)
    require_layers(config, options or {})
    require_weights(name)
    try:
        processor = load_processor(name)
    except EarlyTomConfigError:
        raise
    except Exception as error:  # a broken tokenizer.json raises Exception itself
        raise EarlyTomConfigError(f"the processor of {name!r} cannot be loaded: {in_one_line(error)}") from error
    known = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return Checkpoint(name, config, processor, place, resolve_dtype(dtype, place, known), frames_of(name))


def load_checkpoint(
    name: str, *, device: str = "auto", dtype: str = "auto", options: Mapping[str, Any] | None = None
) -> Loaded:
    """All of a checkpoint at once; raises as :func:`open_checkpoint` and its ``load`` do."""
    return open_checkpoint(name, device=device, dtype=dtype, options=options).load(Console(stderr=True))


def load_model(name: str, *, device: str = "auto", dtype: str = "auto") -> Any:
    """Only the model of a checkpoint, which needs no tokenizer; raises as :func:`load_checkpoint` does."""
    place, (name, config) = resolve_device(device), checked_config(name)
    require_weights(name)
    known = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return _read_weights(name, config, place, resolve_dtype(dtype, place, known))


def prepare_inputs(
    loaded: Loaded | Checkpoint,
    video: str | Path,
    question: str,
    *,
    frames: int | None,
    default_frames: int = FRAMES,
    progress_on: Console,
) -> Inputs:
    """Decode ``frames`` frames and make the model's inputs on its device, with a progress bar.

    ``frames``: None takes ``default_frames``, or all of a video that has fewer. Raises :class:`EarlyTomConfigError` for
    a file that cannot be read.
    """
    with progress_bars(progress_on) as progress:
        task = progress.add_task("decoding the video", total=None)

        def advance(done: int, of: int) -> None:
            progress.update(task, completed=done, total=of)

        from ..integrations.video import read_video  # timing needs no PyAV, and a lent machine may lack it

        resize = frame_resizer(loaded.processor)
        read = read_video(video, frames, default=default_frames, resize=resize, progress=advance)
    clip = Clip(read.pixels.shape, read.indices, read.total, read.rate)
    inputs = VideoInputs(_encoded(loaded, question, read.pixels, clip))
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(loaded.dtype)
    inputs.clip = clip
    return inputs


def _encoded(loaded: Loaded | Checkpoint, question: str, pixels: np.ndarray, clip: Clip) -> Inputs:
    """What the processor makes of a question and a video, on the model's device."""
    processor = loaded.processor
    prompt = processor.apply_chat_template(conversation(question), add_generation_prompt=True)
    options: dict[str, Any] = {}
    if makes_patches(processor):  # which would take other frames, and look for another size
        options = {"do_sample_frames": False, "do_resize": False, "video_metadata": [clip.told]}
    encoded = processor(text=prompt, videos=pixels, return_tensors="pt", **options)
    return {name: torch.as_tensor(encoded[name]).to(loaded.device) for name in _OF_THE_MODEL if name in encoded}


def decoded(
    video: str | Path, pixels: PixelSettings, frames: int | None, default_frames: int, progress_on: Console
) -> torch.Tensor:
    """A video's pixels as a model takes them, float32 [F, 3, H, W], for what needs no processor."""
    from ..integrations.video import read_video

    with progress_bars(progress_on) as progress:
        task = progress.add_task("decoding the video", total=None)

        def advance(done: int, of: int) -> None:
            progress.update(task, completed=done, total=of)

        clip = read_video(video, frames, default=default_frames, resize=pixels.resized_frame, progress=advance)
    return pixels.apply(clip.pixels)


def ask_again(loaded: Loaded | Checkpoint, inputs: Inputs, question: str) -> Inputs:
    """Inputs for another ``question`` about the only video of ``inputs``, which is not decoded again; those that
    :func:`prepare_inputs` made."""
    assert isinstance(inputs, VideoInputs)
    clip = inputs.clip
    # As many tokens as that video has: of one size for all, or as many as its own size makes.
    shape = clip.shape if makes_patches(loaded.processor) else (clip.shape[0], 2, 2, 3)
    again = VideoInputs(_encoded(loaded, question, np.zeros(shape, np.uint8), clip))
    again.update(of_the_video(inputs))
    again.clip = clip
    return again


def of_the_video(inputs: Inputs) -> Inputs:
    """Those that any question about the video has."""
    return {name: inputs[name] for name in _OF_THE_VIDEO if name in inputs}


def keeps_places(inputs: Inputs) -> bool:
    """Whether what stays of the video keeps its places in the prompt, as with models of Qwen; others have a newline
    behind it."""
    return "video_grid_thw" in inputs


def grid_in(inputs: Inputs) -> tuple[int, int] | None:
    """Patches of a picture of the only video, height x width, where a model takes any; else None."""
    if "video_grid_thw" not in inputs:
        return None
    _, height, width = inputs["video_grid_thw"][0].tolist()
    return height, width


def frames_in(inputs: Inputs) -> int:
    """Frames that the encoder sees of the only video: pictures, or temporal patches of Qwen."""
    if "video_grid_thw" in inputs:
        return int(inputs["video_grid_thw"][0, 0])
    return inputs["pixel_values_videos"].shape[1]


def require_question(question: str) -> None:
    """Raise :class:`EarlyTomConfigError` for what cannot be asked."""
    if not question.strip():
        raise EarlyTomConfigError(f"prompt={question!r}: must be a question, such as 'What happens in the video?'.")
    for token in ("<video>", "<image>", "<|video_pad|>", "<|image_pad|>"):
        if token in question:
            raise EarlyTomConfigError(
                f"prompt={question!r}: {token} stands for the video itself, which goes before the question by itself."
            )


def require_layers(config: Any, options: Mapping[str, Any]) -> None:
    """Raise :class:`EarlyTomConfigError` where ``options`` name encoder layers that ``config`` does not have."""
    layers = family_of_checkpoint(config.name_or_path, config.model_type).encoder_layers(config)
    if layers is not None:
        EarlyTomConfig.from_options(options).require_layers(layers)


def checked_config(name: str) -> tuple[str, Any]:
    """The name without ~, and the configuration in config.json, before anything large is read."""
    name = str(Path(name).expanduser()) if name.startswith("~") else name
    local = Path(name)
    beside = len(local.parts) == 2 and local.parent.is_dir()  # a folder called like an owner: it is a path
    if not local.is_dir() and (beside or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)):
        raise EarlyTomConfigError(f"no checkpoint folder at {name!r}: give a folder or a Hub id (owner/name).")
    if local.is_dir() and not (local / "config.json").is_file():
        raise EarlyTomConfigError(f"{name!r} is no checkpoint folder: it has no config.json.")
    try:
        file = cached_file(name, "config.json")
        content = json.loads(Path(str(file)).read_text(encoding="utf-8"))
        model_type = content.get("model_type")
    except OSError as error:
        raise EarlyTomConfigError(
            f"{name!r} is neither a folder here nor a checkpoint the Hugging Face Hub gives out: {_first_line(error)}"
        ) from error
    except (ValueError, AttributeError) as error:
        raise EarlyTomConfigError(f"config.json of {name!r} is not valid JSON: {error}.") from error
    family = family_of_checkpoint(name, model_type)
    family.require_versions()
    torchvision_works()
    from transformers import CONFIG_MAPPING

    try:
        return name, CONFIG_MAPPING[model_type].from_dict(content)
    except Exception as error:  # whatever transformers meets in values that it did not expect
        raise EarlyTomConfigError(f"config.json of {name!r} cannot be read: {_first_line(error)}") from error


def require_weights(name: str) -> None:
    """Raise :class:`EarlyTomConfigError` where files of a folder's weights are missing or cut off.

    Only headers are read. What is on the Hub arrives whole, or transformers says why not.
    """
    folder = Path(name)
    if not folder.is_dir():
        return
    index = folder / f"{_WEIGHTS}.index.json"
    if (folder / _WEIGHTS).is_file():
        files = [_WEIGHTS]
    elif index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise EarlyTomConfigError(f"{str(index)!r} is no index of weights: {error!r}.") from error
    elif list(folder.glob("pytorch_model*.bin*")):
        return
    else:
        raise EarlyTomConfigError(f"{name!r} has no weights: neither {_WEIGHTS} nor an index of its parts is there.")
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise EarlyTomConfigError(
            f"{name!r} cannot be loaded: {len(missing)} of its {len(files)} files of weights are missing "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); download the rest."
        )
    for file in files:
        _require_whole(folder / file)


def _require_whole(file: Path) -> None:
    with file.open("rb") as opened:
        if opened.read(len(_LFS)) == _LFS:
            raise EarlyTomConfigError(f"{str(file)!r} only points to the weights: fetch them with 'git lfs pull'.")
    try:
        with safetensors.safe_open(file, framework="pt"):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise EarlyTomConfigError(
            f"{str(file)!r} is damaged ({_first_line(error)}): a file that was cut off, perhaps; download it again."
        ) from error


def _read_weights(name: str, config: Any, place: torch.device, dtype: torch.dtype) -> Any:
    torchvision_works()
    kind = family_of_checkpoint(name, config.model_type).model_class()
    logging.disable_progress_bar()  # there is one of ours
    try:
        model, found = kind.from_pretrained(name, output_loading_info=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # an index of parts, say, without a key that transformers takes for granted
        raise EarlyTomConfigError(f"{name!r} cannot be loaded: {_first_line(error)}") from error
    missing = sorted(found["missing_keys"])
    if missing:  # transformers fills them with random numbers
        raise EarlyTomConfigError(
            f"{name!r} cannot be loaded: its weights lack {len(missing)} tensors that config.json asks for, such as "
            f"{missing[0]}."
        )
    return model.to(place, dtype).eval()


def _first_line(error: Exception) -> str:
    said = repr(error) if isinstance(error, KeyError) else str(error).strip()  # of the latter, str is only the key
    return next(iter(said.splitlines()), type(error).__name__)


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
