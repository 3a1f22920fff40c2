"""A vision tower alone, for pipelines of one's own: its frames merge, and everything is told that this takes.

    encode = earlytom_compile.compile_tower(SiglipVisionModel.from_pretrained(...), retain_ratio=0.2)
    frames = encode(pixels)                    # one video [F, 3, H, W]
    frames.hidden                              # [N, S, D], what the tower returns, of N frames instead of F
    frames.sources[2]                          # ((3, 0.5), (4, 0.5)): merged frame 2 is made of frames 3 and 4
    frames.importance                          # [N, S], what "paper" would keep tokens by

``torch.compile(tower, backend="earlytom")`` leaves a tower alone, with a warning: whoever calls it expects a row for
each picture.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import EarlyTomConfig
from ..errors import EarlyTomConfigError
from ..families.base import Family, Video
from ..frame_sources import Source, blend, parts, untouched
from ..methods.registry import EARLYTOM
from ..stages import LAST_MERGES, Kinds, asks_for_cuda_graphs
from . import placement
from .tracing import prepare_transformers
from .vision_path import VisionPath, describe, kind_of

Hidden = Callable[[Any, Tensor], Tensor]
"""(tower, pixels [F, 3, H, W]) -> [F, S, D], by the tower's own code."""


@dataclass(frozen=True)
class MergedFrames:
    """One video of F frames through a tower: N frames are left, of S tokens each."""

    hidden: Tensor
    """[N, S, D] in the tower's dtype; class and register tokens among the S, merged with their frame."""
    importance: Tensor | None
    """float32 [N, S]: the attention each token receives in the last merge layer, a mean over heads and queries (Eq. 4);
    None under ``variant="plus"`` and where the call ran uncompressed."""
    sources: tuple[Source, ...]
    """Of each of the N frames, (frame of the F, weight) of each part; weights add up to 1."""
    computed_in: Tensor | None = None
    """int64 [F, S] with ``reuse``: the frame in which each token was last computed, its own for one that changed; None
    where every token of every frame was. No frames merge then."""
    frame_counts: tuple[int, ...] = ()
    """Frames at first, and after each merge layer; only the first where the call ran uncompressed."""
    distinct: int | None = None
    """With ``reuse``, frames that the layers in full computed: those that repeat no other to the last pixel."""


def compile_tower(tower: nn.Module, *, hidden: Hidden | None = None, **options: Any) -> "CompiledTower":
    """A function that encodes one video with ``tower`` and merges its redundant frames on the way.

    ``tower`` is a SigLIP, CLIP, DINOv2 or another encoder of pre-norm blocks; it stays as it is. One that takes more
    than pixels gets it by ``hidden``: SigLIP2 wants patches and ``pixel_attention_mask=None``. ``hidden``
    says which output is wanted: by default the tensor that ``tower(pixels)`` returns, or its ``last_hidden_state``;
    another layer is ``lambda tower, pixels: tower(pixels, output_hidden_states=True).hidden_states[-2]``. ``options``
    are those of :class:`EarlyTomConfig`: ``retain_ratio`` is the share of the frames that stay at least, and the
    language model's have no effect. Raises :class:`EarlyTomConfigError` for bad options, a ``method``, which would
    select tokens behind the tower, or what is no module.
    """
    if not isinstance(tower, nn.Module):
        raise EarlyTomConfigError(f"compile_tower() got a {type(tower).__name__}; it takes a vision tower, a module.")
    if "grid_thw" in inspect.signature(tower.forward).parameters:
        raise EarlyTomConfigError(
            f"compile_tower() got a {type(tower).__name__}, which takes the patches of all frames of all videos as one "
            "sequence. Give the model it belongs to to earlytom_compile.compile(model): encode_videos(model, ...) of "
            "that encodes videos alone."
        )
    config = EarlyTomConfig.from_options(options)
    if config.method != EARLYTOM:
        raise EarlyTomConfigError(
            f"method={config.method!r} with compile_tower(), which selects nothing: what a method keeps is chosen "
            "behind projector and pooling, which a tower does not have. Leave method out, or give the whole model to "
            "earlytom_compile.compile()."
        )
    return CompiledTower(tower, hidden or _last_hidden_state, config)


class CompiledTower:
    """What :func:`compile_tower` returns; one compilation serves videos of 2 and more frames of one resolution."""

    def __init__(self, tower: nn.Module, hidden: Hidden, config: EarlyTomConfig) -> None:
        self.tower = tower
        self.config = config
        self._family = _Tower(hidden)
        self._kinds: Kinds = {}
        self._paths: dict[Any, VisionPath] = {}
        self._family.prepare_for(tower)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> MergedFrames:
        """Encode one video [F, 3, H, W]. Raises :class:`EarlyTomConfigError` for another shape; what cannot be
        compressed runs as it is, with a warning, or an error under ``strict=True``."""
        if not isinstance(pixels, Tensor) or pixels.dim() != 4 or len(pixels) == 0:
            given = f"of shape {tuple(pixels.shape)}" if isinstance(pixels, Tensor) else f"a {type(pixels).__name__}"
            raise EarlyTomConfigError(f"a video is a tensor [frames, channels, height, width]; got {given}.")
        video = Video(self._as_taken(pixels))
        any_length = len(pixels) > 1 and not asks_for_cuda_graphs(self.config.mode)
        placed = placement.Placement.of(self.tower, self._family)
        if placed.reason_against is not None:
            raise EarlyTomConfigError(f"the tower cannot be compiled: {'. '.join(placed.reason_against)}.")
        key = (*kind_of(video, any_length), placed.hooks)
        if key not in self._paths:
            cause = describe(video, any_length)
            path = VisionPath(self._family, self.config, any_length, self._kinds, cause, frames_only=True)
            self._paths.setdefault(key, path)
        token = LAST_MERGES.set(None)
        try:
            hidden, _ = self._paths[key](self.tower, placed.on_device(video))
            return _told(hidden, len(pixels), LAST_MERGES.get())
        finally:
            LAST_MERGES.reset(token)

    def _as_taken(self, pixels: Tensor) -> Tensor:
        """``pixels`` in the tower's dtype; raises for what it cannot take, where it says what it can."""
        dtype = next((x.dtype for x in self.tower.parameters() if x.is_floating_point()), pixels.dtype)
        config = getattr(self.tower, "config", None)
        channels, size = (getattr(config, name, None) for name in ("num_channels", "image_size"))
        wrong = isinstance(channels, int) and pixels.shape[1] != channels
        wrong |= isinstance(size, int) and tuple(pixels.shape[2:]) != (size, size)
        if wrong or not pixels.is_floating_point():
            raise EarlyTomConfigError(
                f"a video of shape {tuple(pixels.shape)} and {pixels.dtype}: this tower takes floating-point frames of "
                f"{channels} channels and {size}x{size} pixels. Prepare it with the tower's own processor."
            )
        return pixels.to(dtype)


class _Tower(Family):
    """A tower as the rest of the package sees a model: what it returns are the rows."""

    name = "a vision tower"

    def __init__(self, hidden: Hidden) -> None:
        self._hidden = hidden

    def prepare_for(self, tower: nn.Module) -> None:
        """What Dynamo needs of the modeling files of transformers that its modules are from."""
        kinds = {type(module) for module in tower.modules()}
        for modeling in {kind.__module__ for kind in kinds if kind.__module__.startswith("transformers.models.")}:
            prepare_transformers(modeling, *(kind.__name__ for kind in kinds if kind.__module__ == modeling))

    def vision_tower(self, model: Any) -> nn.Module:
        return model

    def embedding(self, model: Any) -> None:  # type: ignore[override]
        return None

    def rows(self, model: Any, pixels: Tensor, **arguments: Any) -> Tensor:
        """[F, S, D] of [1, F, 3, H, W]."""
        return self._hidden(model, pixels.flatten(0, 1))


def _last_hidden_state(tower: Any, pixels: Tensor) -> Tensor:
    output = tower(pixels)
    return output if isinstance(output, Tensor) else output.last_hidden_state


def _told(hidden: Tensor, frames: int, merges: Any) -> MergedFrames:
    """Put together what the operators of a call told; waits for the device."""
    made = untouched(frames)
    if merges is None:
        return MergedFrames(hidden, None, made, frame_counts=(frames,))
    counts, rest, reuse = merges
    plans = rest[: len(rest) - len(rest) % 2]
    for left, source, weight in zip(counts[len(counts) - len(plans) // 2 :], plans[::2], plans[1::2], strict=True):
        rows = zip(source.tolist(), weight.tolist(), strict=True)
        made = tuple(blend(made, tuple(parts(*row))) for row in list(rows)[: int(left)])
    computed_in, distinct = (None, None) if reuse is None else (reuse.source[0], int(reuse.distinct[0]))
    frame_counts = tuple(int(count) for count in counts)
    return MergedFrames(hidden, rest[-1] if len(rest) % 2 else None, made, computed_in, frame_counts, distinct)
