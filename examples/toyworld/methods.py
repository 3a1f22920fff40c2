"""Ways to fewer video tokens: EarlyTom as installed, parts of it, and trivial baselines.

    compress = method("earlytom paper", model, retain_ratio=0.1)
    compress(pixels)           # pixels [8, 3, 96, 96] of one video -> its tokens [K, C], and what they cost

The rows named ``earlytom`` and ``only reuse`` run the very code that users run. The others are written from its
specification (``earlytom_compile.reference``) with hooks on the vision encoder, so that each part can be left out.

What a method costs is the work that it leaves of the vision encoder's layers. A layer's work is proportional to the
places that it computes, since each of them is projected, looks at all places of its frame and goes through the MLP;
so 1 is every place of every frame in every layer.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.nn import functional as F
from transformers import LlavaOnevisionForConditionalGeneration

import earlytom_compile
from earlytom_compile import reference
from earlytom_compile.benchmarks.arms import twin_of
from earlytom_compile.config import EarlyTomConfig
from earlytom_compile.reporting import Counts, GraphRecord
from earlytom_compile.toyworld.model import POOLED


class Compressed(NamedTuple):
    """What is left of a video: the ``tokens`` [K, C] that the language model gets, and the ``work`` that was done in
    the vision encoder's layers, as a share of that for all places of all frames."""

    tokens: torch.Tensor
    work: float


Compress = Callable[[torch.Tensor], Compressed]
"""Takes the pixels of one video, [8, 3, 96, 96]."""
Model: TypeAlias = LlavaOnevisionForConditionalGeneration

ALL_TOKENS = "all tokens"
NO_TOKENS = "no tokens"
STAGE_1 = "only stage 1"
REUSE = "only reuse"
PLUS_MERGING = "earlytom plus, merging"
METHODS = (
    "earlytom paper",
    "earlytom released",
    "earlytom plus",
    PLUS_MERGING,
    "only stage 2",
    "top-k without decoupling",
    "random tokens",
    "frame subsampling",
    "average pooling",
)
"""Those with a ratio; how much the others take does not depend on one."""
INSTALLED: dict[str, dict[str, Any]] = {
    "earlytom paper": {"variant": "paper"},
    "earlytom released": {"variant": "released"},
    "earlytom plus": {"variant": "plus"},
    PLUS_MERGING: {"variant": "plus", "reuse": False},
    REUSE: {"variant": "plus", "retain_ratio": 1.0},
}
"""Those that run the code that users run, and with what options."""
_BY_HOOKS = (STAGE_1, "only stage 2", "top-k without decoupling", "random tokens")
_OF_SEGMENTS = ("merge_layers", "tau_seg", "alpha")
_OF_REUSE = ("tau_reuse", "full_layers", "encode_ratio")


def taken(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``options`` that mean something to the method of that name; compile() refuses the others."""
    if name in _BY_HOOKS:
        takes: tuple[str, ...] = (*_OF_SEGMENTS, "tau_merge")
    elif name in INSTALLED:
        own = INSTALLED[name]
        choice = () if name in (REUSE, PLUS_MERGING) else ("reuse",)
        reuse = own.get("reuse", options.get("reuse") if choice else None)
        if EarlyTomConfig(variant=own["variant"], reuse=reuse).reuses():
            takes = (*choice, *_OF_REUSE) + (() if own["variant"] == "plus" else (*_OF_SEGMENTS, "max_window"))
        else:
            takes = (*choice, *_OF_SEGMENTS, "tau_merge", "max_window")
    else:
        takes = ()
    return {option: value for option, value in options.items() if option in takes}


def method(name: str, model: Model, retain_ratio: float, **options: Any) -> Compress:
    """The method of that name; ``options`` are those of :func:`earlytom_compile.compile`."""
    if name in INSTALLED:
        return _installed(model, {"retain_ratio": retain_ratio, **INSTALLED[name], **options})
    config = EarlyTomConfig.from_options({"retain_ratio": retain_ratio, **options})
    parts: dict[str, Callable[[Model, EarlyTomConfig, torch.Tensor], Compressed]] = {
        ALL_TOKENS: _all_tokens,
        NO_TOKENS: _no_tokens,
        STAGE_1: _stage_1,
        "only stage 2": _stage_2,
        "top-k without decoupling": _top_k,
        "random tokens": _random,
        "frame subsampling": _subsampling,
        "average pooling": _average_pooling,
    }
    compress = parts[name]
    return torch.no_grad()(lambda pixels: compress(model, config, pixels))


def _installed(model: Model, options: dict[str, Any]) -> Compress:
    # Eager, since compiling takes longer than all the videos; the lowerings agree.
    compiled = earlytom_compile.compile(twin_of(model), lowering="eager", strict=True, **options)

    def compress(pixels: torch.Tensor) -> Compressed:
        (rows,) = earlytom_compile.encode_videos(compiled, pixels[None])
        (call,) = earlytom_compile.report(compiled).calls or ()
        return Compressed(rows[:-1], _share(_computed_frames(*call), len(pixels)))  # the newline is put back later

    return compress


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


def _share(computed_frames: Sequence[float], frames: int) -> float:
    return sum(computed_frames) / (len(computed_frames) * frames)


# --- Parts ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """A video behind projector and pooling: ``tokens`` [N, P, C], their ``importance`` [N, P], the segments of the N
    frames, and how many frames each layer of the vision encoder computed."""

    tokens: torch.Tensor
    importance: torch.Tensor
    segments: torch.Tensor
    computed_frames: tuple[int, ...]


def encode(model: Model, config: EarlyTomConfig, pixels: torch.Tensor, *, merge: bool = True) -> Encoded:
    """Vision encoder with frame merging behind the merge layers, or without; then projector and pooling."""
    with _merging(model, config, len(pixels), merge) as (seen, computed_frames):
        hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    tokens = model.model.apply_pooling(model.model.multi_modal_projector(hidden))
    side = math.isqrt(seen["importance"].shape[1])
    grid = seen["importance"].view(-1, 1, side, side)
    importance = F.interpolate(grid, size=(POOLED, POOLED), mode="bilinear").flatten(1)
    segments = reference.segment_frames(
        seen["features"], variant=config.merge_variant(), tau_seg=config.tau_seg, alpha=config.alpha
    )
    return Encoded(tokens, importance, segments, tuple(computed_frames))


@contextmanager
def _merging(
    model: Model, config: EarlyTomConfig, frames: int, merge: bool
) -> Iterator[tuple[dict[str, torch.Tensor], list[int]]]:
    """Hooks that merge frames, and note importance and features of the last merge layer, and every layer's frames."""
    layers = _encoder_layers(model)
    chosen = config.resolve_merge_layers(len(layers))
    seen: dict[str, torch.Tensor] = {}
    computed_frames: list[int] = []

    def behind(index: int, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if merge:
            plan = reference.plan_frame_merge(
                hidden,
                variant=config.merge_variant(),
                tau_seg=config.tau_seg,
                alpha=config.alpha,
                tau_merge=config.tau_merge,
                min_frames=config.min_frames(frames),
            )
            hidden = plan.apply(hidden)
            if index == chosen[-1]:
                seen["importance"] = plan.apply(seen["importance"])
        if index == chosen[-1]:
            seen["features"] = hidden
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def before(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        computed_frames.append(len(hidden))
        if layer is layers[chosen[-1]]:
            seen["importance"] = attention_received(layer, hidden)

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    for index in chosen:
        handles.append(layers[index].register_forward_hook(lambda _m, _a, output, i=index: behind(i, output)))
    try:
        yield seen, computed_frames
    finally:
        for handle in handles:
            handle.remove()


def _encoder_layers(model: Model) -> Any:
    """The layers of the vision encoder; where they hang depends on the version of transformers."""
    (layers,) = (m for name, m in model.model.vision_tower.named_modules() if name.endswith("encoder.layers"))
    return layers


def attention_received(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Importance [N, S]: mean over heads and queries of the attention that each token receives in ``layer``."""
    attention, normed = layer.self_attn, layer.layer_norm1(hidden)
    split = (*hidden.shape[:2], attention.num_heads, -1)
    query, key = (project(normed).view(split).transpose(1, 2) for project in (attention.q_proj, attention.k_proj))
    return (query @ key.transpose(-1, -2) * attention.scale).softmax(-1).mean((1, 2))


def _budget(config: EarlyTomConfig, frames: int) -> int:
    return config.token_budget(frames, POOLED**2)


def _every(encoded: Encoded, frames: int) -> Compressed:
    return Compressed(encoded.tokens.flatten(0, 1), _share(encoded.computed_frames, frames))


def _all_tokens(model: Model, config: EarlyTomConfig, pixels: torch.Tensor) -> Compressed:
    return _every(encode(model, config, pixels, merge=False), len(pixels))


def _no_tokens(model: Model, config: EarlyTomConfig, pixels: torch.Tensor) -> Compressed:
    return Compressed(model.model.image_newline[None][:0], 0.0)


def _stage_1(model: Model, config: EarlyTomConfig, pixels: torch.Tensor) -> Compressed:
    return _every(encode(model, config, pixels), len(pixels))


def _stage_2(model: Model, config: EarlyTomConfig, pixels: torch.Tensor) -> Compressed:
    encoded = encode(model, config, pixels, merge=False)
    return _selected(encoded, encoded.segments, config, len(pixels))


def two_stages(model: Model, config: EarlyTomConfig, pixels: torch.Tensor) -> Compressed:
    """What is installed where frames merge, by hooks and specification: the oracle of test_methods.py."""
    encoded = encode(model, config, pixels)
    if config.selects_by_attention():
        return _selected(encoded, encoded.segments, config, len(pixels))
    kept = reference.select_representatives(encoded.tokens, frames_in=len(pixels), retain_ratio=config.retain_ratio)
    return Compressed(encoded.tokens[kept[:, 0], kept[:, 1]], _share(encoded.computed_frames, len(pixels)))


def _top_k(model: Model, config: EarlyTomConfig, pixels: torch.Tensor) -> Compressed:
    encoded = encode(model, config, pixels)
    alone = torch.arange(len(encoded.tokens))[:, None].expand(-1, 2)  # every frame a segment: none is static
    return _selected(encoded, alone, config, len(pixels))


def _selected(encoded: Encoded, segments: torch.Tensor, config: EarlyTomConfig, frames: int) -> Compressed:
    kept = reference.select_tokens(
        encoded.importance,
        segments,
        frames_in=frames,
        retain_ratio=config.retain_ratio,
        variant=config.variant,
    )
    return Compressed(encoded.tokens[kept[:, 0], kept[:, 1]], _share(encoded.computed_frames, frames))


def _random(model: Model, config: EarlyTomConfig, pixels: torch.Tensor) -> Compressed:
    tokens, work = _stage_1(model, config, pixels)
    # Random for every video, and the same in every run: the sum of its pixels is the seed.
    generator = torch.Generator().manual_seed(int(pixels.double().sum().item() * 1000) % 2**31)
    kept = torch.randperm(len(tokens), generator=generator)[: _budget(config, len(pixels))].sort().values
    return Compressed(tokens[kept], work)


# --- Baselines --------------------------------------------------------------------------------------


def _subsampling(model: Model, config: EarlyTomConfig, pixels: torch.Tensor) -> Compressed:
    """As many evenly spaced frames as the budget has room for, at least one."""
    count = max(1, round(_budget(config, len(pixels)) / POOLED**2))
    middle = (torch.arange(count) + 0.5) * len(pixels) / count
    return _every(encode(model, config, pixels[middle.long()], merge=False), len(pixels))


def _average_pooling(model: Model, config: EarlyTomConfig, pixels: torch.Tensor) -> Compressed:
    """Means over 2 x 2 tokens of a frame, and over as many frames as the budget demands."""
    tokens, work = _all_tokens(model, config, pixels)
    side = POOLED // 2
    times = max(1, round(_budget(config, len(pixels)) / side**2))
    volume = tokens.view(len(pixels), POOLED, POOLED, -1).permute(3, 0, 1, 2)
    return Compressed(F.adaptive_avg_pool3d(volume, (times, side, side)).flatten(1).T, work)
