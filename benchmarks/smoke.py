"""Every Triton provider against its operator's native body, at the sizes of LLaVA-OneVision-7B with 32 frames.

    python -m earlytom_compile.benchmarks.smoke --json smoke.json --markdown smoke.md

    operator               dtype      provider   error     allowed
    frame_similarity       bfloat16   triton     4e-07     1e-05     right
    plan_merge, released   bfloat16   triton     0e+00     2e-07     right
    ...

The native body computes on the CPU, from the same inputs. The error is the largest difference over the largest value.
On a CPU both sides are native: what runs then is this program, not the providers.
"""

import argparse
import json
import math
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from earlytom_compile import EarlyTomConfig
from earlytom_compile.benchmarks import markdown
from earlytom_compile.benchmarks.environment import environment
from earlytom_compile.benchmarks.operators import SMALL, Shape, error, queries_and_keys, scenes
from earlytom_compile.benchmarks.reuse_operators import reuse_inputs
from earlytom_compile.kernels import all_ops  # noqa: F401  (registers torch.ops.earlytom)
from earlytom_compile.kernels.providers import provider_of

ops = torch.ops.earlytom
RETAIN_RATIO = 0.1
_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Check:
    """An operator on inputs that lie on the CPU."""

    name: str
    op: str
    inputs: tuple[Any, ...]
    options: dict[str, Any]
    allowed: float  # difference over the largest value


@dataclass(frozen=True)
class Row:
    """What came out of a check."""

    name: str
    dtype: str
    provider: str
    error: float | None  # None where it broke
    allowed: float
    first_call_s: float  # Triton compiles in it
    failure: str = ""

    @property
    def right(self) -> bool:
        return self.error is not None and self.error <= self.allowed


def checks(frames: int, shape: Shape, dtype: torch.dtype) -> Iterator[Check]:
    """Every operator that has a Triton provider, each on what the native ones before it gave."""
    config = EarlyTomConfig(retain_ratio=RETAIN_RATIO)
    hidden, counts = scenes(frames, shape.tokens, shape.channels).to(dtype), torch.tensor([frames])
    band = {"band": config.similarity_band(frames)}
    # A tensor core adds 16 products to a sum, and goes on with it: channels / 16 + 16 additions, each of which may cut
    # off an epsilon. So are the squares of both lengths, whose roots divide; the mean over tokens adds 4 roundings.
    rounding = (2 * (shape.channels / 16 + 16) + 4) * _EPS
    yield Check("frame_similarity", "frame_similarity", (hidden,), band, rounding)

    similarity = ops.frame_similarity(hidden, **band)
    for variant, window in (("paper", config.window()), ("released", 8)):
        segmentation = {"variant": variant, "tau_seg": config.tau_seg, "alpha": config.alpha, "max_window": window}
        planning = {**segmentation, "tau_merge": math.nan, "min_frames": config.min_frames(frames)}
        # Decisions are the same; a weight is a quotient of a sum: two roundings.
        yield Check(f"plan_merge, {variant}", "plan_merge", (similarity, counts), planning, 2 * _EPS)
        yield Check(f"dynamic_frames, {variant}", "dynamic_frames", (similarity, counts), segmentation, 0)
        if variant == "paper":
            source, weight, merged_counts = ops.plan_merge(similarity, counts, **planning)
            n = int(merged_counts.sum())
            dynamic = ops.dynamic_frames(similarity, counts, **segmentation)[:n]

    # Two products and a sum in float32, then one rounding to the dtype.
    carried = [hidden, torch.rand(frames, shape.tokens)]
    yield Check("merge_frames", "merge_frames", (carried, source, weight), {"n": n}, torch.finfo(dtype).eps + 3 * _EPS)

    query, key = queries_and_keys(frames, shape, dtype)
    scale = (shape.channels // shape.heads) ** -0.5
    allowed = _of_attention(query, key, scale)
    yield Check("attention_received", "attention_received", (query, key), {"scale": scale}, allowed)

    features, importance = torch.randn(n, shape.pooled, shape.features).to(dtype), torch.rand(n, shape.pooled)
    operands = (features, importance, dynamic, merged_counts)
    budget = {"budget": config.token_budget(frames, shape.pooled)}
    for place in ("device", "host"):
        options = {**budget, "static_selection": place}
        yield Check(f"select_tokens, {place}", "select_tokens", operands, options, 0)
    released = {"frames": frames, "retain_ratio": RETAIN_RATIO}
    yield Check("select_tokens_released", "select_tokens_released", operands, released, 0)
    yield from _of_reuse(frames, shape, dtype)


def _of_reuse(frames: int, shape: Shape, dtype: torch.dtype) -> Iterator[Check]:
    """The plan, once with a budget too, and what moves rows: the same to the last bit; attention as rounding allows."""
    made = reuse_inputs(frames, shape, dtype)
    for name, (operands, options) in made.arguments.items():
        allowed = 0.0
        if name == "reuse_attention":
            allowed = _of_output(operands, options, dtype, made.expected[name])
        yield Check(name, name, operands, options, allowed)
    operands, options = made.arguments["plan_reuse"]
    budget = round(0.3 * frames * shape.tokens)
    yield Check("plan_reuse, budget", "plan_reuse", operands, {**options, "budget": max(budget, shape.tokens)}, 0)


def _of_output(operands: tuple[Any, ...], options: dict[str, Any], dtype: torch.dtype, expected: Tensor) -> float:
    """What rounding can change of an attention's output, in its largest value.

    The native body on the CPU and the provider both round each exponential to the dtype before it multiplies a value,
    and the result once more; scores err as :func:`_of_attention` says.
    """
    query, key, value, *places = operands
    scores = _of_attention(query[..., :256, :], key[..., :1024, :], options["scale"])
    sizes = ops.reuse_attention(query, key, value.abs(), *places, **options).float().max()
    rounding = 2 * (2 * scores + 2 * torch.finfo(dtype).eps)
    return float(rounding * sizes / expected.float().abs().max()) + torch.finfo(dtype).eps


def _of_attention(query: Tensor, key: Tensor, scale: float) -> float:
    """What rounding can change of an exponential, relative to it: twice the error of a score.

    A score is a float32 sum of ``width`` products, each addition of which may lose an epsilon of the sum of their
    sizes. Products of 16-bit inputs are exact.
    """
    sizes = (query[:1].float().abs() @ key[:1].float().abs().transpose(-1, -2)).amax() * scale
    return float(2 * query.shape[-1] * _EPS * sizes)


def run(check: Check, dtype: torch.dtype, device: str) -> Row:
    """Compute both sides; what raises is a wrong row."""
    inputs = tree_map_only(Tensor, lambda x: x.to(device), check.inputs)
    provider = provider_of(check.op, device, *inputs, **check.options)
    operator, start = getattr(ops, check.op), time.perf_counter()
    known = (check.name, str(dtype).removeprefix("torch."), provider)
    try:
        actual = tree_leaves(operator(*inputs, **check.options))
        actual = [x.cpu() for x in actual]
        seconds = time.perf_counter() - start
        expected = tree_leaves(operator(*check.inputs, **check.options))
        return Row(*known, error(actual, tuple(expected)), check.allowed, seconds)
    except Exception as broken:  # one provider that does not compile must not hide the others
        traceback.print_exc()
        return Row(*known, None, check.allowed, time.perf_counter() - start, f"{type(broken).__name__}: {broken}")


def to_markdown(rows: Sequence[Row], about: dict[str, Any], shape: Shape, frames: int) -> str:
    """The table, and what broke."""
    cells = [
        (row.name, row.dtype, row.provider, "" if row.error is None else f"{row.error:.1e}", f"{row.allowed:.1e}",
         "right" if row.right else "WRONG", f"{row.first_call_s:.2f}")
        for row in rows
    ]  # fmt: skip
    lines = markdown.heading(about)
    headings = ("operator", "dtype", "provider", "error", "allowed", "", "first call s")
    lines += markdown.table(f"operators at {frames} frames, {shape}, against their native bodies", headings, cells)
    return "\n".join([*lines, *(f"- {row.name}, {row.dtype}: {row.failure}" for row in rows if row.failure)]) + "\n"


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> int:
    """Check everything, write after each check; 1 when one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="small inputs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args(argv)
    frames, shape = (12, SMALL) if arguments.tiny else (32, Shape())
    about, rows = environment(torch.device(arguments.device)), []
    for dtype in (torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        for check in checks(frames, shape, dtype):
            rows.append(run(check, dtype, arguments.device))
            print(rows[-1], flush=True)
            if arguments.json:
                content = {**about, "frames": frames, "shape": asdict(shape)}
                content["rows"] = [{**asdict(row), "right": row.right} for row in rows]
                arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            if arguments.markdown:
                arguments.markdown.write_text(to_markdown(rows, about, shape, frames), encoding="utf-8")
    return int(not all(row.right for row in rows))


if __name__ == "__main__":
    sys.exit(main())
