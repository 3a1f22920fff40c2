"""Ways to fewer video tokens: EarlyTom as installed, parts of it, and trivial baselines.

    compress = method("earlytom paper", model, retain_ratio=0.1)
    compress(pixels)           # pixels [F, 3, H, W] of one video -> its tokens [K, C], and what they cost

Rows of ``installed.py`` run the very code that users run: those named ``earlytom``, ``only reuse``, and other papers'
methods. Those of ``baselines.py`` and ``merging.py`` are plain PyTorch, as fast as they can be called. The others are
written from its specification (``earlytom_compile.reference``) with hooks on the vision encoder, so that each part can
be left out.

What a method costs is the work that it leaves of the vision encoder's layers. A layer's work is proportional to the
places that it computes, since each of them is projected, looks at all places of its frame and goes through the MLP;
so 1 is every place of every frame in every layer. All operations before the language model are counted beside it
(``cost.py``).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from earlytom_compile import reference
from earlytom_compile.config import EarlyTomConfig
from earlytom_compile.shapes import ModelShape
from earlytom_compile.toyworld import baselines, cost, installed, merging
from earlytom_compile.toyworld.baselines import BASELINES, baseline
from earlytom_compile.toyworld.installed import (
    OF_SEGMENTS,
    OURS,
    Compress,
    Compressed,
    Installed,
    Model,
    inner_options,
    own_options,
    share,
)
from earlytom_compile.toyworld.merging import RUNS, Merging, by_paper, encoder_layers

ALL_TOKENS = "all tokens"
NO_TOKENS = "no tokens"
STAGE_1 = "only stage 1"
RANDOM = "random tokens"
METHODS = (
    *OURS,
    "only stage 2",
    "top-k without decoupling",
    RANDOM,
    *BASELINES,
)
"""Those with a ratio; how much the others take does not depend on one."""
UNCONFIGURED = (*BASELINES, RUNS)
"""Those that take options of their own, and none of :func:`earlytom_compile.compile`."""
PLAIN = (STAGE_1, *UNCONFIGURED)
"""Rows of plain PyTorch whose time says something (:class:`~earlytom_compile.toyworld.baselines.Plain`)."""
_BY_HOOKS = (STAGE_1, "only stage 2", "top-k without decoupling", RANDOM)
_TAKES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_BY_HOOKS, (*OF_SEGMENTS, "tau_merge")),
    **dict.fromkeys(BASELINES, baselines.OPTIONS),
    RUNS: merging.OPTIONS,
}


def taken(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``options`` that mean something to the method of that name; compile() refuses the others."""
    takes = _TAKES[name] if name in _TAKES else installed.takes(name, options)
    return {option: value for option, value in options.items() if option in takes}


def method(name: str, model: Model, retain_ratio: float | None, **options: Any) -> Compress:
    """The method of that name; ``options`` are those of :func:`earlytom_compile.compile`, or its own (UNCONFIGURED),
    which may do without a ratio."""
    if name in BASELINES:
        return baseline(name, model, retain_ratio, **options)
    if name == RUNS:
        return merging.runs(model, options["tau_run"], retain_ratio)
    own = own_options(name)
    if own is not None:
        inner = inner_options(name, model.config.text_config.num_hidden_layers)
        return Installed(model, {"retain_ratio": retain_ratio, **own, **inner, **options})
    config = EarlyTomConfig.from_options({"retain_ratio": retain_ratio, "variant": "paper", **options})
    if name in (STAGE_1, RANDOM):
        stage_1 = Merging(model, by_paper(config), config.resolve_merge_layers(len(encoder_layers(model))))
        return stage_1 if name == STAGE_1 else partial(_random, stage_1, config)
    parts: dict[str, Callable[[Model, EarlyTomConfig, torch.Tensor], Compressed]] = {
        ALL_TOKENS: _all_tokens,
        NO_TOKENS: _no_tokens,
        "only stage 2": _stage_2,
        "top-k without decoupling": _top_k,
    }
    compress = parts[name]
    return torch.no_grad()(lambda pixels: compress(model, config, pixels))


# --- Parts ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """A video behind projector and pooling: ``tokens`` [N, P, C], their ``importance`` [N, P], the segments of the N
    frames, how many frames each layer of the vision encoder computed and how many the one that importance is of, and
    all operations up to here but those that importance and segments need."""

    tokens: torch.Tensor
    importance: torch.Tensor
    segments: torch.Tensor
    computed_frames: tuple[int, ...]
    scored_frames: int
    flops: float

    def left(self, tokens: torch.Tensor, frames: int, choice: float = 0.0) -> Compressed:
        """``tokens`` of a video of so many frames; ``choice``: operations that it took to choose them."""
        return Compressed(tokens, share(self.computed_frames, frames), self.flops + choice)


def encode(model: Model, config: EarlyTomConfig, pixels: torch.Tensor, *, merge: bool = True) -> Encoded:
    """Vision encoder with frame merging behind the merge layers, or without; then projector and pooling."""
    with _merging(model, config, len(pixels), merge) as (seen, computed_frames):
        hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    tokens = model.model.apply_pooling(model.model.multi_modal_projector(hidden))
    side = math.isqrt(seen["importance"].shape[1])
    grid = seen["importance"].view(-1, 1, side, side)
    pooled = math.isqrt(tokens.shape[1])
    importance = F.interpolate(grid, size=(pooled, pooled), mode="bilinear").flatten(1)
    segments = reference.segment_frames(
        seen["features"], variant=config.merge_variant(), tau_seg=config.tau_seg, alpha=config.alpha
    )
    merges = config.resolve_merge_layers(len(computed_frames))
    schedule = [len(pixels), *([*computed_frames, len(tokens)][layer + 1] for layer in merges if merge)]
    flops = cost.of_frames(ModelShape.from_config(model.config), schedule, merges)
    return Encoded(tokens, importance, segments, tuple(computed_frames), computed_frames[merges[-1]], flops)


@contextmanager
def _merging(
    model: Model, config: EarlyTomConfig, frames: int, merge: bool
) -> Iterator[tuple[dict[str, torch.Tensor], list[int]]]:
    """Hooks that merge frames, and note importance and features of the last merge layer, and every layer's frames."""
    layers = encoder_layers(model)
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


def attention_received(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Importance [N, S]: mean over heads and queries of the attention that each token receives in ``layer``."""
    attention, normed = layer.self_attn, layer.layer_norm1(hidden)
    split = (*hidden.shape[:2], attention.num_heads, -1)
    query, key = (project(normed).view(split).transpose(1, 2) for project in (attention.q_proj, attention.k_proj))
    return (query @ key.transpose(-1, -2) * attention.scale).softmax(-1).mean((1, 2))


def _all_tokens(model: Model, config: EarlyTomConfig, pixels: torch.Tensor) -> Compressed:
    flops = cost.of_frames(ModelShape.from_config(model.config), (len(pixels),), ())
    return Compressed(baselines.all_tokens(model, pixels).flatten(0, 1), 1.0, flops)


def _no_tokens(model: Model, config: EarlyTomConfig, pixels: torch.Tensor) -> Compressed:
    return Compressed(model.model.image_newline[None][:0], 0.0, 0.0)


def _stage_2(model: Model, config: EarlyTomConfig, pixels: torch.Tensor) -> Compressed:
    encoded, shape = encode(model, config, pixels, merge=False), ModelShape.from_config(model.config)
    choice = cost.importance(shape, encoded.scored_frames) + cost.similarities(shape, len(encoded.tokens))
    return _selected(encoded, encoded.segments, config, len(pixels), choice)


def two_stages(model: Model, config: EarlyTomConfig, pixels: torch.Tensor) -> Compressed:
    """What is installed where frames merge, by hooks and specification: the oracle of test_methods.py."""
    encoded, shape = encode(model, config, pixels), ModelShape.from_config(model.config)
    if config.selects_by_attention():
        choice = cost.importance(shape, encoded.scored_frames) + cost.similarities(shape, len(encoded.tokens))
        return _selected(encoded, encoded.segments, config, len(pixels), choice)
    kept = reference.select_representatives(encoded.tokens, frames_in=len(pixels), retain_ratio=config.retain_ratio)
    choice = cost.representatives(shape, len(encoded.tokens))
    return encoded.left(encoded.tokens[kept[:, 0], kept[:, 1]], len(pixels), choice)


def _top_k(model: Model, config: EarlyTomConfig, pixels: torch.Tensor) -> Compressed:
    encoded, shape = encode(model, config, pixels), ModelShape.from_config(model.config)
    alone = torch.arange(len(encoded.tokens))[:, None].expand(-1, 2)  # every frame a segment: none is static
    return _selected(encoded, alone, config, len(pixels), cost.importance(shape, encoded.scored_frames))


def _selected(
    encoded: Encoded, segments: torch.Tensor, config: EarlyTomConfig, frames: int, choice: float
) -> Compressed:
    kept = reference.select_tokens(
        encoded.importance,
        segments,
        frames_in=frames,
        retain_ratio=config.retain_ratio,
        variant=str(config.variant),
    )
    return encoded.left(encoded.tokens[kept[:, 0], kept[:, 1]], frames, choice)


def _random(stage_1: Merging, config: EarlyTomConfig, pixels: torch.Tensor) -> Compressed:
    every, budget = stage_1(pixels), config.token_budget(len(pixels), stage_1.shape.pooled_tokens)
    # Random for every video, and the same in every run: the sum of its pixels is the seed.
    generator = torch.Generator().manual_seed(int(pixels.double().sum().item() * 1000) % 2**31)
    kept = torch.randperm(len(every.tokens), generator=generator)[:budget].sort().values
    return every._replace(tokens=every.tokens[kept])
