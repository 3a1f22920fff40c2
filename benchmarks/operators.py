"""Every operator on inputs of a real size, and other ways to the same result.

for case in cases(32, Shape(), torch.bfloat16, "cuda", inductor=True):
    case.arms["earlytom"](*case.inputs)     # the operator; others are of formulas.py
    case.expected                           # what its native body gives on the CPU
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from earlytom_compile import EarlyTomConfig
from earlytom_compile.benchmarks import formulas
from earlytom_compile.kernels import all_ops  # noqa: F401  (registers torch.ops.earlytom)
from earlytom_compile.kernels.providers import provider_of

ops = torch.ops.earlytom
RETAIN_RATIO = 0.1


SHARE_COMPUTED = 0.3
"""Of the places of a video, by the layers that reuse."""
PATCH = 14
"""Pixels of a side."""


@dataclass(frozen=True)
class Shape:
    """Of one video: SigLIP-so400m at 384 pixels, features as wide as a 7B language model."""

    tokens: int = 729
    channels: int = 1152
    heads: int = 16
    pooled: int = 196
    features: int = 3584


SMALL = Shape(tokens=81, channels=288, heads=4, pooled=25, features=256)


@dataclass(frozen=True)
class Target:
    """What a row of numbers should come to on an H200."""

    metric: str  # a key of the row
    limit: float
    text: str
    at_least: bool = False

    def met_by(self, row: dict[str, Any]) -> bool:
        value = row[self.metric]
        return value >= self.limit if self.at_least else value <= self.limit


NEARLY_A_COPY = Target("share_of_ceiling", 0.7, ">= 70 %", at_least=True)
ONE_FORWARD = Target("times_sdpa", 1.2, "<= 1.2 x sdpa")
TOGETHER = Target("median_us", 60.0, "<= 60 us")
OF_A_PREFILL = Target("share", 0.02, "<= 2 %")


@dataclass(frozen=True)
class Case:
    """An operator on inputs of one shape, and other ways to the same result."""

    op: str
    inputs: tuple[Any, ...]  # tensors, and lists of them
    arms: dict[str, Callable[..., Any]]  # each takes the inputs
    expected: tuple[Tensor, ...]  # may end before the results do
    provider: str
    bytes: int = 0
    flops: int = 0
    target: Target | None = None
    notes: dict[str, str] = dataclasses.field(default_factory=dict)  # of arms


def scenes(frames: int, *shape: int) -> Tensor:
    """Scenes of 8 frames that barely move, so that frames merge."""
    return torch.randn((frames + 7) // 8, *shape).repeat_interleave(8, 0)[:frames] + 0.1 * torch.randn(frames, *shape)


def clip(frames: int, tokens: int) -> Tensor:
    """Pixels [F, 3, H, W] of a square grid of patches, and a strip beside it: of each frame 3 of 10 patches are new."""
    side = math.isqrt(tokens)
    patches = torch.randn(frames, 3, side, PATCH, side, PATCH)
    for frame in range(1, frames):
        still = torch.rand(side, 1, side, 1) >= SHARE_COMPUTED
        patches[frame] = torch.where(still, patches[frame - 1], patches[frame])
    pixels = patches.flatten(4).flatten(2, 3) + 0.01 * torch.randn(frames, 3, side * PATCH, side * PATCH)
    return F.pad(pixels, (0, 6, 0, 6))


def cases(frames: int, shape: Shape, dtype: torch.dtype, device: str, inductor: bool) -> Iterator[Case]:
    """Built one after the other: not all inputs of 128 frames need to be on the device at once."""
    config = EarlyTomConfig(retain_ratio=RETAIN_RATIO)
    segmentation = {"variant": "paper", "tau_seg": config.tau_seg, "alpha": config.alpha, "max_window": config.window()}
    planning = {**segmentation, "tau_merge": math.nan, "min_frames": config.min_frames(frames)}
    torch.compiler.reset()  # the arms of other frame counts count as recompilations

    def case(op: str, inputs: tuple[Any, ...], options: dict[str, Any], formula: str, **facts: Any) -> Case:
        arms: dict[str, Callable[..., Any]] = {"earlytom": functools.partial(getattr(ops, op), **options)}
        if inductor and hasattr(formulas, f"plain_{formula}"):
            plain = torch.compile(getattr(formulas, f"plain_{formula}"), dynamic=False)
            arms["inductor"] = functools.partial(plain, **options)
        arms["naive"] = functools.partial(getattr(formulas, f"naive_{formula}"), **options)
        inputs = tree_map(lambda x: x.to(device), inputs)
        return Case(op, inputs, arms, provider=provider_of(op, device, *inputs, **options), **facts)

    hidden = scenes(frames, shape.tokens, shape.channels).to(dtype)
    band = {"band": config.similarity_band(frames)}
    similarity = ops.frame_similarity(hidden, **band)
    yield case("frame_similarity", (hidden,), band, "similarity",
               expected=(similarity,), bytes=hidden.nbytes, target=NEARLY_A_COPY if frames == 32 else None)  # fmt: skip

    counts = torch.tensor([frames])
    source, weight, merged_counts = plan = ops.plan_merge(similarity, counts, **planning)
    n = int(merged_counts.sum())
    carried = [hidden, torch.rand(frames, shape.tokens)]  # importance rides along
    merged, scores = ops.merge_frames(carried, source, weight, n)
    moved = int((weight != 0).sum()) * sum(x[0].nbytes for x in carried) + merged.nbytes + scores.nbytes
    yield case("merge_frames", (carried, source, weight), {"n": n}, "merge",
               expected=(merged, scores), bytes=moved, target=NEARLY_A_COPY if frames == 32 else None)  # fmt: skip

    query, key, scale = *queries_and_keys(frames, shape, dtype), (shape.channels // shape.heads) ** -0.5
    few = ops.attention_received(query[:4], key[:4], scale)  # rows of frames are independent
    attention = case("attention_received", (query, key), {"scale": scale}, "attention",
                     expected=(few,), flops=4 * query.numel() * shape.tokens, target=ONE_FORWARD)  # fmt: skip
    attention.arms["sdpa"] = lambda query, key: F.scaled_dot_product_attention(query, key, key, scale=scale)
    yield attention
    del attention

    planner = case("plan_merge", (similarity, counts), planning, "plan", expected=plan)
    yield planner
    similarity = ops.frame_similarity(merged, **band)
    dynamic = ops.dynamic_frames(similarity, merged_counts, **segmentation)
    yield case("dynamic_frames", (similarity, merged_counts), segmentation, "dynamic",
               expected=(dynamic,))  # fmt: skip
    features = torch.randn(n, shape.pooled, shape.features).to(dtype)
    importance = torch.rand(n, shape.pooled)
    budget = {"budget": config.token_budget(frames, shape.pooled)}
    tokens = ops.select_tokens(features, importance, dynamic, merged_counts, **budget)[0]
    selector = case("select_tokens", (features, importance, dynamic, merged_counts), budget, "select",
                    expected=(tokens,), bytes=2 * tokens.nbytes + importance.nbytes)  # fmt: skip
    for place in ("host", "auto"):
        selector.arms[place] = functools.partial(ops.select_tokens, **budget, static_selection=place)
        selector.notes[place] = "" if device == "cuda" else "= device: no GPU"
    yield selector
    yield one_after_the_other(planner, selector, target=TOGETHER)
    del planner, selector
    yield from cases_of_reuse(frames, shape, dtype, case)


def cases_of_reuse(frames: int, shape: Shape, dtype: torch.dtype, case: Callable[..., Case]) -> Iterator[Case]:
    """The operators of the layers that reuse, on the plan of a budget."""
    side, total = math.isqrt(shape.tokens), round(SHARE_COMPUTED * frames * shape.tokens)
    pixels = clip(frames, shape.tokens).to(dtype)
    planning: dict[str, Any] = {"grid": [side, side], "patch": [PATCH, PATCH], "prefix": 0, "tau": 0.03}
    for budget in (0, max(total, shape.tokens)):
        source, *_ = ops.plan_reuse(pixels, **planning, budget=budget)
        planner = case("plan_reuse", (pixels,), {**planning, "budget": budget}, "plan_reuse",
                       expected=(source,), bytes=pixels.nbytes)  # fmt: skip
        yield dataclasses.replace(planner, op="plan_reuse, budget") if budget else planner
    del planner

    index, rows, offsets = packing = ops.pack_places(source, budget)
    moved = source.nbytes + sum(x.nbytes for x in packing)
    yield case("pack_places", (source,), {"total": budget}, "pack", expected=packing, bytes=moved)
    hidden = torch.randn(frames, shape.tokens, shape.channels).to(dtype)
    before = ops.take_places(hidden, index)
    yield case("take_places", (hidden, index), {}, "take", expected=(before,), bytes=2 * before.nbytes)
    packed = before + torch.randn(before.shape).to(dtype)
    back = ops.return_places(hidden, packed, index, rows)
    moved = before.nbytes + packed.nbytes + (hidden.nbytes - before.nbytes) + back.nbytes
    yield case("return_places", (hidden, packed, index, rows), {}, "return", expected=(back,), bytes=moved)

    query, key = queries_and_keys(1, dataclasses.replace(shape, tokens=budget), dtype)
    spread = ops.spread_places(query, rows)
    yield case("spread_places", (query, rows), {}, "spread", expected=(spread,), bytes=query.nbytes + spread.nbytes)
    scale, value = (shape.channels // shape.heads) ** -0.5, torch.randn(key.transpose(1, 2).shape).to(dtype)
    inputs = (query, key, value.transpose(1, 2), rows, offsets)
    share = budget / (frames * shape.tokens)
    target = Target("times_sdpa", 1.2 * share, f"<= {1.2 * share:.2f} x sdpa")
    attention = case("reuse_attention", inputs, {"scale": scale}, "reuse_attention",
                     expected=(ops.reuse_attention(*inputs, scale),), flops=4 * query.numel() * shape.tokens,
                     target=target)  # fmt: skip
    every, _ = queries_and_keys(frames, shape, dtype)
    every = every.to(attention.inputs[0].device)
    attention.arms["sdpa"] = lambda *_: F.scaled_dot_product_attention(every, every, every, scale=scale)
    attention.notes["sdpa"] = "every place of every frame"
    yield attention


def queries_and_keys(frames: int, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[F, H, S, d], as views of [F, S, H * d] projections, which is how an encoder has them."""
    sizes = (frames, shape.tokens, shape.heads, shape.channels // shape.heads)
    return torch.randn(sizes).to(dtype).transpose(1, 2), torch.randn(sizes).to(dtype).transpose(1, 2)


def one_after_the_other(first: Case, second: Case, target: Target) -> Case:
    def both(arm: str) -> Callable[..., Any]:
        one, other, border = first.arms[arm], second.arms[arm], len(first.inputs)
        return lambda *inputs: (*one(*inputs[:border]), other(*inputs[border:]))

    arms = {arm: both(arm) for arm in first.arms}
    return Case(f"{first.op} + {second.op}", first.inputs + second.inputs, arms, first.expected, second.provider,
                target=target)  # fmt: skip


def error(result: Any, expected: Sequence[Tensor]) -> float:
    """Largest difference over largest value; NaN and missing values count as infinite."""
    worst = 0.0
    for actual, right in zip((result,) if isinstance(result, Tensor) else result, expected, strict=False):
        actual, right = actual.double().cpu().flatten()[: right.numel()], right.double().flatten()
        if actual.shape != right.shape or actual.isnan().any():
            return math.inf
        apart = torch.where(actual == right, 0.0, (actual - right).abs())  # infinities too
        largest = torch.where(right.isfinite(), right, 0.0).abs().max()
        worst = max(worst, float(apart.max() / largest.clamp_min(1e-30)))
    return worst
