"""The vision encoder of a checkpoint, and the pixels that it takes.

module, pixels = load_tower("path/to/siglip", device=torch.device("cpu"), dtype="auto")
module(pixels.apply(frames)).last_hidden_state        # [F, S, D]
"""

from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..errors import EarlyTomConfigError
from ..integrations.checkpoint_files import in_one_line, read_json, video_settings
from ..integrations.pixels import PixelSettings
from .loading import require_weights, resolve_dtype

_INSIDE = ("vision_model", "vision_tower")
"""Where models of transformers have theirs."""


def load_tower(name: str, *, device: torch.device, dtype: str) -> tuple[Any, PixelSettings]:
    """The encoder in a checkpoint folder or Hub id: SigLIP, CLIP, DINOv2, or a model with one of them inside.

    Frames are resized to the encoder's own square, whatever the checkpoint's processor would cut off. Raises
    :class:`EarlyTomConfigError` for what is no such checkpoint, or incomplete.
    """
    name = str(Path(name).expanduser()) if name.startswith("~") else name
    require_weights(name)
    tower = _tower_in(_model(name), name)
    size, layers = (getattr(tower.config, key, None) for key in ("image_size", "num_hidden_layers"))
    settings = video_settings(name)
    if not isinstance(size, int) or not isinstance(layers, int):
        raise EarlyTomConfigError(f"the encoder in {name!r} does not tell its image_size and its num_hidden_layers.")
    if not settings:
        raise EarlyTomConfigError(f"{name!r} has no preprocessor_config.json, which says what pixels it takes.")
    known = {key: settings[key] for key in ("image_mean", "image_std", "rescale_factor") if settings.get(key)}
    pixels = PixelSettings(size={"height": size, "width": size}, **known)
    own = next(tower.parameters()).dtype
    return tower.to(device, resolve_dtype(dtype, device, own)).eval(), pixels


def _model(name: str) -> Any:
    from transformers import AutoModel

    logging.disable_progress_bar()
    try:
        if not read_json(name, "config.json"):
            raise EarlyTomConfigError(f"{name!r} is no checkpoint: it has no config.json.")
        model, found = AutoModel.from_pretrained(name, output_loading_info=True)
    except EarlyTomConfigError:
        raise
    except Exception as error:  # whatever transformers meets in files that it did not expect
        raise EarlyTomConfigError(f"{name!r} cannot be loaded: {in_one_line(error)}") from error
    missing = sorted(found["missing_keys"])
    if missing:  # transformers fills them with random numbers
        raise EarlyTomConfigError(
            f"{name!r} cannot be loaded: its weights lack {len(missing)} tensors that config.json asks for, such as "
            f"{missing[0]}."
        )
    return model


def _tower_in(model: Any, name: str) -> Any:
    inside = next((getattr(model, part) for part in _INSIDE if hasattr(model, part)), model)
    if not hasattr(inside, "config") or getattr(inside, "main_input_name", "pixel_values") != "pixel_values":
        raise EarlyTomConfigError(f"{name!r} has no vision encoder that is known by {' or '.join(_INSIDE)}.")
    return inside
