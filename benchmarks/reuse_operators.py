"""The operators of ``variant="plus"``, by which unchanged patches are reused and tokens selected, on inputs of a real
size: what benchmarks and checks call.

made = reuse_inputs(32, Shape(), torch.bfloat16)      # pixels before a still camera, and what comes of them
for case in reuse_cases(32, Shape(), torch.bfloat16, "cuda"):
    case.arms["native"](*case.inputs)                 # the native body on the same device
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from earlytom_compile.benchmarks.operators import RETAIN_RATIO, Case, Shape, Target
from earlytom_compile.config import EarlyTomConfig
from earlytom_compile.kernels.pack_places import pack_places, return_places, spread_places, take_places
from earlytom_compile.kernels.plan_reuse import plan_reuse
from earlytom_compile.kernels.providers import provider_of
from earlytom_compile.kernels.reuse_attention import reuse_attention
from earlytom_compile.kernels.select_representatives import select_representatives

CHANGING = 0.2
"""Share of the patches that change from one frame to the next."""
_PATCH, _BESIDE = 14, 6  # pixels of a patch's side, and of an edge that belongs to no patch
SHARE_OF_SDPA = 1.2
"""What packed attention may take of a forward of all, in shares of the queries."""
A_HUNDREDTH = Target("median_us", 600.0, "<= 600 us")
"""Of the encoder of LLaVA-OneVision on an H200, with 32 frames."""
OF_THE_FIRST_TOKEN = Target("median_us", 400.0, "<= 400 us")
"""A hundredth of the time to the first token of LLaVA-OneVision-7B on an H200 with 32 frames, by its operations."""
_TARGETS = {"plan_reuse": A_HUNDREDTH, "select_representatives": OF_THE_FIRST_TOKEN}
_NATIVE = {
    "plan_reuse": plan_reuse, "pack_places": pack_places, "take_places": take_places, "return_places": return_places,
    "spread_places": spread_places, "reuse_attention": reuse_attention,
    "select_representatives": select_representatives,
}  # fmt: skip


@dataclass(frozen=True)
class ReuseInputs:
    """Arguments of each operator by its name, on the CPU, each on what the native ones before it gave."""

    arguments: dict[str, tuple[tuple[Any, ...], dict[str, Any]]]
    expected: dict[str, Any]
    share: float
    """Of the places, what is computed."""


def reuse_inputs(frames: int, shape: Shape, dtype: torch.dtype) -> ReuseInputs:
    """One video whose patches change, ``CHANGING`` of them from frame to frame."""
    side, width = math.isqrt(shape.tokens), shape.channels // shape.heads
    grid = {"grid": [side, side], "patch": [_PATCH, _PATCH], "prefix": 0, "tau": EarlyTomConfig.tau_reuse, "budget": 0}
    pixels = _still(frames, side).to(dtype)
    arguments: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {"plan_reuse": ((pixels,), grid)}
    plan = torch.ops.earlytom.plan_reuse(pixels, **grid)
    source, total = plan[0], int(plan[2].sum())
    arguments["pack_places"] = (source,), {"total": total}
    index, rows, offsets = torch.ops.earlytom.pack_places(source, total)
    hidden = torch.randn(frames, shape.tokens, shape.channels).to(dtype)
    arguments["take_places"] = (hidden, index), {}
    packed = torch.ops.earlytom.take_places(hidden, index)
    # Views of [1, T, H * d] projections, which is how an encoder has them.
    heads = [torch.randn(1, total, shape.heads, width).to(dtype).transpose(1, 2) for _ in range(3)]
    arguments["reuse_attention"] = (*heads, rows, offsets), {"scale": width**-0.5}
    arguments["return_places"] = (hidden, packed + torch.randn(packed.shape).to(dtype), index, rows), {}
    arguments["spread_places"] = (heads[0], rows), {}
    features = torch.randn(frames, shape.pooled, shape.features).to(dtype)
    budget = {"budget": EarlyTomConfig(retain_ratio=RETAIN_RATIO).token_budget(frames, shape.pooled)}
    arguments["select_representatives"] = (features, torch.tensor([frames])), budget
    expected = {
        name: getattr(torch.ops.earlytom, name)(*given, **options) for name, (given, options) in arguments.items()
    }
    return ReuseInputs(arguments, expected, total / (frames * shape.tokens))


def _still(frames: int, side: int) -> Tensor:
    """float32 [frames, 3, H, W] of ``side`` patches a side, with noise that all patches have."""
    picture, shown = torch.randn(3, side, _PATCH, side, _PATCH), []
    for frame in range(frames):
        if frame:
            changes = torch.rand(side, 1, side, 1) < CHANGING
            picture = torch.where(changes, torch.randn_like(picture), picture)
        shown.append((picture + 0.01 * torch.randn_like(picture)).flatten(3).flatten(1, 2))
    return F.pad(torch.stack(shown), (0, _BESIDE, 0, _BESIDE))


def reuse_cases(frames: int, shape: Shape, dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Each operator against its native body on the same device, and attention against that of all patches."""
    made = reuse_inputs(frames, shape, dtype)
    for name, (given, options) in made.arguments.items():
        inputs = tree_map_only(Tensor, lambda x: x.to(device), given)
        bodies = {"earlytom": getattr(torch.ops.earlytom, name), "native": _NATIVE[name]._init_fn}
        arms: dict[str, Callable[..., Any]] = {arm: functools.partial(body, **options) for arm, body in bodies.items()}
        expected = tuple(tree_leaves(made.expected[name]))
        facts: dict[str, Any] = {"bytes": _moved(name, given, expected)}
        if name == "reuse_attention":
            arms["sdpa"] = functools.partial(_attention_of_all, *_heads_of_all(frames, shape, dtype, device))
            limit = SHARE_OF_SDPA * made.share
            facts["target"] = Target("times_sdpa", limit, f"<= {limit:.2f} x sdpa")
            facts["bytes"] = 0
            facts["flops"] = 4 * given[0].numel() * shape.tokens
        if name in _TARGETS:
            facts["target"] = _TARGETS[name]
        yield Case(name, inputs, arms, expected, provider_of(name, device, *inputs, **options), **facts)


def _moved(name: str, given: tuple[Any, ...], expected: tuple[Tensor, ...]) -> int:
    """Bytes that have to be read and written once; 0 where that says nothing."""
    if name == "pack_places":
        return 0
    if name == "take_places":
        return 2 * sum(x.nbytes for x in expected)
    return sum(x.nbytes for x in (*given, *expected))


def _heads_of_all(frames: int, shape: Shape, dtype: torch.dtype, device: str) -> list[Tensor]:
    sizes = (frames, shape.tokens, shape.heads, shape.channels // shape.heads)
    return [torch.randn(sizes).to(device, dtype).transpose(1, 2) for _ in range(3)]


def _attention_of_all(query: Tensor, key: Tensor, value: Tensor, *packed: Tensor) -> Tensor:
    """One forward for every patch of every frame, whatever was packed."""
    return F.scaled_dot_product_attention(query, key, value)
