"""The checkpoint that ``earlytom eval --tasks`` asks: what it says without its weights, and the plugin's model of it.

    subject = look_at_checkpoint("path/or/hub-id", device="auto", dtype="auto", options={})
    subject.half_billion, subject.shape           # which rows of Table 8, and how much work
    model = subject.load(batch_size="1", ...)     # an lmms of lmms-eval

There are two kinds: checkpoints of transformers, and those of LLaVA's own code, which transformers does not know.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import EarlyTomConfigError, EarlyTomError
from ..families.llava import ARCHITECTURE
from ..integrations.checkpoint_files import read_json
from ..qwen_shape import is_qwen
from ..shapes import SHAPES, ModelShape
from .loading import open_checkpoint, resolve_device
from .options import require_effect

_PLUGIN = "earlytom_compile.integrations.lmms_eval.model"
_OPTIONS = {"pretrained": "--model", "max_frames_num": "--frames", "torch_dtype": "--dtype"}
"""Names of lmms-eval -> the options of this command that mean the same."""
_TOWER = "so400m-patch14-384"
"""Part of the name of the tower that every named shape of the paper has."""
_HALF_BILLION_WIDTH = 896  # of the language model of LLaVA-OneVision-0.5B


@dataclass(frozen=True)
class Subject:
    """A checkpoint whose weights are not read yet."""

    name: str
    device: torch.device
    dtype: str
    half_billion: bool
    """Whether Table 8's rows for LLaVA-OneVision-0.5B are those for it."""
    shape: ModelShape | None
    """None where nobody knows how to count the work of such a model."""
    kind: str
    """The plugin's class."""

    def load(self, **arguments: Any) -> Any:
        """The plugin's model; raises :class:`EarlyTomConfigError` for ``arguments`` that it does not take."""
        kind = getattr(importlib.import_module(_PLUGIN), self.kind)
        return kind(pretrained=self.name, device=str(self.device), dtype=self.dtype, **arguments)


def look_at_checkpoint(name: str, *, device: str, dtype: str, options: Mapping[str, Any]) -> Subject:
    """Look at a checkpoint folder or Hub id; raises :class:`EarlyTomConfigError` where it cannot be used, or not so."""
    content = _own_code(name)
    if content is not None:
        place = resolve_device(device)
        require_effect(options, place.type)
        small = content.get("hidden_size") == _HALF_BILLION_WIDTH
        return Subject(name, place, dtype, small, _named_shape(content), "EarlyTomLlavaOnevision")
    checkpoint = open_checkpoint(name, device=device, dtype=dtype, options=options)
    text = getattr(checkpoint.config, "text_config", None)
    small = getattr(text, "hidden_size", None) == _HALF_BILLION_WIDTH
    return Subject(checkpoint.name, checkpoint.device, dtype, small, _shape(checkpoint.config), "EarlyTom")


def read_model_args(text: str | None, kind: str) -> dict[str, Any]:
    """``"conv_template=qwen_1_5,add_time_instruction=True"`` as lmms-eval reads it.

    Raises :class:`EarlyTomConfigError` for names that only other kinds of checkpoint have, or that have options here.
    """
    if text is None:
        return {}
    given: dict[str, Any] = importlib.import_module("lmms_eval.utils").simple_parse_args_string(text)
    taken = getattr(importlib.import_module(_PLUGIN), kind).own_arguments
    for name in given:
        if name not in taken:
            allowed = f"there are {', '.join(taken)}" if taken else "there are none for this kind of checkpoint"
            option = _OPTIONS.get(name, f"--{name.replace('_', '-')}")
            raise EarlyTomConfigError(
                f"model_args: unknown {name!r}; {allowed}. Everything else has an option here, such as {option} "
                "(earlytom eval --help-all)."
            )
    return given


def _own_code(name: str) -> dict[str, Any] | None:
    """config.json of a checkpoint of LLaVA's own code; None for any other, or where there is none."""
    try:
        content = read_json(name, "config.json")
    except EarlyTomError:  # said better by whoever opens the others
        return None
    return content if content.get("architectures") == [ARCHITECTURE] else None


def _named_shape(content: Mapping[str, Any]) -> ModelShape | None:
    """One of the paper's, for a language model and a tower of its size."""
    sizes = tuple(content.get(name) for name in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    alike = (shape for shape in SHAPES.values() if (shape.llm_layers, shape.llm_width, shape.llm_mlp) == sizes)
    return next(alike, None) if _TOWER in str(content.get("mm_vision_tower")) else None


def _shape(config: Any) -> ModelShape | None:
    if is_qwen(config):  # whose work depends on the size of each video
        return None
    try:
        return ModelShape.from_config(config)
    except (EarlyTomConfigError, AttributeError):
        return None
