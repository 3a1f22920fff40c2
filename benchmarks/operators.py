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


def cases(frames: int, shape: Shape, dtype: torch.dtype, device: str, inductor: bool) -> Iterator[Case]:
    """Built one after the other: not all inputs of 128 frames need to be on the device at once."""
    config = EarlyTomConfig(retain_ratio=RETAIN_RATIO)
    segmentation = {"variant": "paper", "tau_seg": config.tau_seg, "alpha": config.alpha, "max_window": config.window()}
    planning = {**segmentation, "tau_merge": math.nan, "min_frames": config.min_frames(frames)}
    torch.compiler.reset()  # the arms of other frame counts count as recompilations

    def case(op: str, inputs: tuple[Any, ...], options: dict[str, Any], formula: str, **facts: Any) -> Case:
        arms: dict[str, Callable[..., Any]] = {"earlytom": functools.partial(getattr(ops, op), **options)}
        if inductor:
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
    """Largest difference over largest value; NaN, missing values and a wrong infinity count as infinite."""
    worst = 0.0
    for actual, right in zip((result,) if isinstance(result, Tensor) else result, expected, strict=False):
        actual, right = actual.double().cpu().flatten()[: right.numel()], right.double().flatten()
        if actual.shape != right.shape or actual.isnan().any():
            return math.inf
        largest = right[right.isfinite()].abs().max().clamp_min(1e-30)
        worst = max(worst, float(torch.where(actual == right, 0.0, (actual - right).abs()).max() / largest))
    return worst
