"""Rows of the comparison that run the very code that users run: EarlyTom's variants, and the methods of other papers.

compress = Installed(model, {"retain_ratio": 0.1, "method": "visionzip"})
compress(pixels)           # pixels [F, 3, H, W] of one video -> its tokens [K, C], and what they cost

earlytom paper             as the options say
earlytom paper, inner      the same with ``inner_layer``: video tokens merge once more inside the language model
visionzip                  a name of earlytom_compile.methods, each of which is a row, and with ``, inner`` another
                           one where the method does not leave tokens out inside the language model itself
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from transformers import LlavaOnevisionForConditionalGeneration

import earlytom_compile
from earlytom_compile.benchmarks.arms import twin_of
from earlytom_compile.config import EarlyTomConfig
from earlytom_compile.errors import EarlyTomConfigError
from earlytom_compile.methods.registry import EARLYTOM, method_named, method_names
from earlytom_compile.reporting import Counts, GraphRecord
from earlytom_compile.shapes import ModelShape
from earlytom_compile.toyworld import cost


class Compressed(NamedTuple):
    """What is left of a video: the ``tokens`` [K, C] that the language model gets, the ``work`` that was done in the
    vision encoder's layers, as a share of that for all places of all frames, and all operations (``flops``, a
    multiply-add is two) before the language model."""

    tokens: torch.Tensor
    work: float
    flops: float


Compress = Callable[[torch.Tensor], Compressed]
"""Takes the pixels of one video, [F, 3, H, W]."""
Model: TypeAlias = LlavaOnevisionForConditionalGeneration

INNER = ", inner"
REUSE = "only reuse"
PLUS_MERGING = "earlytom plus, merging"
_VARIANTS = ("paper", "released", "plus")
OURS = (*(f"earlytom {variant}{inner}" for variant in _VARIANTS for inner in ("", INNER)), PLUS_MERGING)
"""EarlyTom's rows with a ratio."""
_OWN: dict[str, dict[str, Any]] = {
    **{f"earlytom {variant}": {"variant": variant} for variant in _VARIANTS},
    PLUS_MERGING: {"variant": "plus", "reuse": False},
    REUSE: {"variant": "plus", "retain_ratio": 1.0},
}
OF_SEGMENTS = ("merge_layers", "tau_seg", "alpha")
_OF_REUSE = ("tau_reuse", "full_layers", "encode_ratio")
_OF_INNER = ("inner_layer", "inner_drop_ratio")
_DEPTH = 18 / 28  # share of the language model's layers before HoliTom's inner_layer, in the paper's tables


def other_methods() -> tuple[str, ...]:
    """The rows of other papers' methods, each of which has a ratio."""
    names = [name for name in method_names() if name != EARLYTOM]
    return tuple(row for name in names for row in ([name, name + INNER] if _may_merge_inside(name) else [name]))


def _may_merge_inside(name: str) -> bool:
    try:
        method = method_named(name)
    except EarlyTomConfigError:  # one of another package that cannot be loaded: who asks for its row is told so
        return False
    return method is not None and method.inside is None


def own_options(row: str) -> dict[str, Any] | None:
    """Those of :func:`earlytom_compile.compile` that make the row of that name, without ``inner_layer``, which depends
    on the model; None for a row that runs no installed code."""
    base = row.removesuffix(INNER)
    if base in _OWN:
        return _OWN[base]
    return {"method": base} if base != EARLYTOM and base in method_names() else None


def inner_options(row: str, layers: int) -> dict[str, Any]:
    """``inner_layer`` of a row that merges inside a language model of so many layers: as deep as in the paper's tables.

    Raises :class:`EarlyTomConfigError` where there is no such layer.
    """
    if not row.endswith(INNER):
        return {}
    if layers < 2:
        raise EarlyTomConfigError(
            f"{row}: tokens merge between two layers of the language model, and this one has {layers}. Leave the row "
            "out, by naming the others with --methods."
        )
    return {"inner_layer": min(max(1, round(_DEPTH * layers)), layers - 1)}


def reduces_inside(row: str) -> bool:
    """Whether the language model's later layers get fewer tokens than its first."""
    own = own_options(row)
    return own is not None and (row.endswith(INNER) or EarlyTomConfig.from_options(own).reduces_inside())


def takes(row: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the options that mean something to that row, beside ``options``."""
    own = own_options(row)
    if own is None:
        return ()
    inner = _OF_INNER if row.endswith(INNER) else ()
    choice = () if row in (REUSE, PLUS_MERGING) else ("reuse",)
    reuse = own.get("reuse", options.get("reuse") if choice else None)
    reuses = EarlyTomConfig.from_options({**own, "reuse": reuse}).reuses()
    of_encoder = _OF_REUSE if reuses else ()
    if "method" in own:
        return (*choice, *of_encoder, *inner)
    if own["variant"] == "plus" and reuses:
        return (*choice, *of_encoder, *inner)
    segments = (*OF_SEGMENTS, "max_window") if reuses else (*OF_SEGMENTS, "tau_merge", "max_window")
    return (*choice, *of_encoder, *segments, *inner)


class Installed:
    """A compiled twin of ``model``; what it is called with is compressed."""

    def __init__(self, model: Model, options: Mapping[str, Any]) -> None:
        # Eager, since compiling takes longer than all the videos; the lowerings agree.
        self.model: Any = earlytom_compile.compile(twin_of(model), lowering="eager", strict=True, **options)
        self.config = EarlyTomConfig.from_options(options)
        self._shape = ModelShape.from_config(model.config)
        self.steps = self.config.steps_inside(self._shape.llm_layers)

    def __call__(self, pixels: torch.Tensor) -> Compressed:
        """Of one video."""
        (rows,) = earlytom_compile.encode_videos(self.model, pixels[None])
        report = earlytom_compile.report(self.model)
        (call,) = report.calls or ()
        work = share(_computed_frames(*call), len(pixels))
        # The newline is put back later.
        return Compressed(rows[:-1], work, cost.of_report(self._shape, report.to_dict(), self.config))


def _computed_frames(record: GraphRecord, counts: Counts) -> list[float]:
    """How many frames each layer of the vision encoder computed in a call with one video; reused patches make it a
    broken number."""
    frames = [int(merged) for merged in counts.frames]
    if counts.reuse is None:
        return [frames[sum(layer > merged for merged in record.merge_layers)] for layer in range(record.layers)]
    assert record.config is not None
    full = record.config.resolve_full_layers(record.layers)
    changed = int(counts.reuse.computed) / counts.reuse.source.shape[-1]
    distinct = int(counts.reuse.distinct)
    return [distinct if layer in full else changed for layer in range(record.layers)]


def share(computed_frames: Sequence[float], frames: int) -> float:
    """Work of the vision encoder's layers, which computed so many frames each, beside that for all."""
    return sum(computed_frames) / (len(computed_frames) * frames)
