"""Ways to fewer video tokens: EarlyTom as installed, parts of it, and trivial baselines.

    compress = method("earlytom paper", model, retain_ratio=0.1)
    compress(pixels)           # pixels [8, 3, 96, 96] of one video -> its tokens [K, C]

The rows named ``earlytom`` run the very code that users run. The others are written from its specification
(``earlytom_compile.reference``) with hooks on the vision encoder, so that each part can be left out.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.nn import functional as F
from transformers import LlavaOnevisionForConditionalGeneration

import earlytom_compile
from earlytom_compile import reference
from earlytom_compile.benchmarks.arms import twin_of
from earlytom_compile.config import EarlyTomConfig
from earlytom_compile.toyworld.model import POOLED

Compress = Callable[[torch.Tensor], torch.Tensor]
"""Pixels of one video, [8, 3, 96, 96], to the tokens [K, C] that the language model gets."""
Model: TypeAlias = LlavaOnevisionForConditionalGeneration

ALL_TOKENS = "all tokens"
NO_TOKENS = "no tokens"
STAGE_1 = "only stage 1"
METHODS = (
    "earlytom paper",
    "earlytom released",
    "earlytom plus",
    "only stage 2",
    "top-k without decoupling",
    "random tokens",
    "frame subsampling",
    "average pooling",
)
"""Those with a ratio; how much the others take does not depend on one."""


def method(name: str, model: Model, retain_ratio: float, **options: Any) -> Compress:
    """The method of that name; ``options`` are those of :func:`earlytom_compile.compile`."""
    if name.startswith("earlytom "):
        variant = name.removeprefix("earlytom ")
        return _installed(model, {"variant": variant, "retain_ratio": retain_ratio, **options})
    config = EarlyTomConfig.from_options({"retain_ratio": retain_ratio, **options})
    parts: dict[str, Callable[[Model, EarlyTomConfig, torch.Tensor], torch.Tensor]] = {
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

    def compress(pixels: torch.Tensor) -> torch.Tensor:
        return earlytom_compile.encode_videos(compiled, pixels[None])[0][:-1]  # the newline is put back later

    return compress


# --- Parts ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """A video behind projector and pooling: ``tokens`` [N, P, C], their ``importance`` [N, P], and the segments
    of the N frames."""

    tokens: torch.Tensor
    importance: torch.Tensor
    segments: torch.Tensor


def encode(model: Model, config: EarlyTomConfig, pixels: torch.Tensor, *, merge: bool = True) -> Encoded:
    """Vision encoder with frame merging behind the merge layers, or without; then projector and pooling."""
    with _merging(model, config, len(pixels), merge) as seen:
        hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    tokens = model.model.apply_pooling(model.model.multi_modal_projector(hidden))
    side = math.isqrt(seen["importance"].shape[1])
    grid = seen["importance"].view(-1, 1, side, side)
    importance = F.interpolate(grid, size=(POOLED, POOLED), mode="bilinear").flatten(1)
    segments = reference.segment_frames(
        seen["features"], variant=config.merge_variant(), tau_seg=config.tau_seg, alpha=config.alpha
    )
    return Encoded(tokens, importance, segments)


@contextmanager
def _merging(model: Model, config: EarlyTomConfig, frames: int, merge: bool) -> Iterator[dict[str, torch.Tensor]]:
    """Hooks that merge frames, and note importance and features of the last merge layer."""
    layers = _encoder_layers(model)
    chosen = config.resolve_merge_layers(len(layers))
    seen: dict[str, torch.Tensor] = {}

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

    def before(layer: Any, hidden: torch.Tensor) -> None:
        seen["importance"] = attention_received(layer, hidden)

    handles = [
        layers[chosen[-1]].register_forward_pre_hook(
            lambda layer, args, kwargs: before(layer, args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    ]
    for index in chosen:
        handles.append(layers[index].register_forward_hook(lambda _m, _a, output, i=index: behind(i, output)))
    try:
        yield seen
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


def _all_tokens(model: Model, config: EarlyTomConfig, pixels: torch.Tensor) -> torch.Tensor:
    return encode(model, config, pixels, merge=False).tokens.flatten(0, 1)


def _no_tokens(model: Model, config: EarlyTomConfig, pixels: torch.Tensor) -> torch.Tensor:
    return model.model.image_newline[None][:0]


def _stage_1(model: Model, config: EarlyTomConfig, pixels: torch.Tensor) -> torch.Tensor:
    return encode(model, config, pixels).tokens.flatten(0, 1)


def _stage_2(model: Model, config: EarlyTomConfig, pixels: torch.Tensor) -> torch.Tensor:
    encoded = encode(model, config, pixels, merge=False)
    return _selected(encoded, encoded.segments, config, len(pixels))


def two_stages(model: Model, config: EarlyTomConfig, pixels: torch.Tensor) -> torch.Tensor:
    """What is installed, by hooks and specification: the oracle of test_methods.py."""
    encoded = encode(model, config, pixels)
    if config.selects_by_attention():
        return _selected(encoded, encoded.segments, config, len(pixels))
    kept = reference.select_representatives(encoded.tokens, frames_in=len(pixels), retain_ratio=config.retain_ratio)
    return encoded.tokens[kept[:, 0], kept[:, 1]]


def _top_k(model: Model, config: EarlyTomConfig, pixels: torch.Tensor) -> torch.Tensor:
    encoded = encode(model, config, pixels)
    alone = torch.arange(len(encoded.tokens))[:, None].expand(-1, 2)  # every frame a segment: none is static
    return _selected(encoded, alone, config, len(pixels))


def _selected(encoded: Encoded, segments: torch.Tensor, config: EarlyTomConfig, frames: int) -> torch.Tensor:
    kept = reference.select_tokens(
        encoded.importance,
        segments,
        frames_in=frames,
        retain_ratio=config.retain_ratio,
        variant=config.variant,
    )
    return encoded.tokens[kept[:, 0], kept[:, 1]]


def _random(model: Model, config: EarlyTomConfig, pixels: torch.Tensor) -> torch.Tensor:
    tokens = encode(model, config, pixels).tokens.flatten(0, 1)
    # Random for every video, and the same in every run: the sum of its pixels is the seed.
    generator = torch.Generator().manual_seed(int(pixels.double().sum().item() * 1000) % 2**31)
    return tokens[torch.randperm(len(tokens), generator=generator)[: _budget(config, len(pixels))].sort().values]


# --- Baselines --------------------------------------------------------------------------------------


def _subsampling(model: Model, config: EarlyTomConfig, pixels: torch.Tensor) -> torch.Tensor:
    """As many evenly spaced frames as the budget has room for, at least one."""
    count = max(1, round(_budget(config, len(pixels)) / POOLED**2))
    middle = (torch.arange(count) + 0.5) * len(pixels) / count
    return encode(model, config, pixels[middle.long()], merge=False).tokens.flatten(0, 1)


def _average_pooling(model: Model, config: EarlyTomConfig, pixels: torch.Tensor) -> torch.Tensor:
    """Means over 2 x 2 tokens of a frame, and over as many frames as the budget demands."""
    tokens = encode(model, config, pixels, merge=False).tokens
    side = POOLED // 2
    times = max(1, round(_budget(config, len(pixels)) / side**2))
    volume = tokens.view(len(tokens), POOLED, POOLED, -1).permute(3, 0, 1, 2)
    return F.adaptive_avg_pool3d(volume, (times, side, side)).flatten(1).T
