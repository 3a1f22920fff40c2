"""Every operator against what Inductor makes of plain PyTorch, and against the naive way, interleaved in one run.

    python benchmarks/kernels.py --frames 8 32 64 128 --json kernels.json

    op                 arm                median us   rate       of ceiling
    frame_similarity   earlytom, triton   ...         ... GB/s   ... %        >= 70 % at 32 frames
                       inductor           ...         ... GB/s   ... %
                       naive              ...         ... GB/s   ... %

    inductor   torch.compile of the formula in plain PyTorch, float32 where the operator is; where decisions follow
               one another, unrolled over the frames of one video (the native body takes them on the host, which
               Dynamo cannot trace)
    naive      loops over frames, decisions on the host; attention maps in the model's dtype, all of them kept
    sdpa       one forward of scaled_dot_product_attention on the same queries and keys
    host       select_tokens with static_selection="host"; without a GPU the same as on the device
    auto       with static_selection="auto", likewise

GB/s counts what has to be read and written once, TFLOP/s the products that have to be computed, whatever an arm
really does; the ceilings are a large copy and a large matrix product on the same machine. What decides on a few
numbers and moves next to nothing is latency bound, and has no rate. On a GPU, events time a
call that was queued behind other work, its inputs out of the cache; what waits for the host shows that too. On a
CPU shapes are small and the operators native. The error is the largest difference from the native operator on the
CPU over its largest value, red above the tolerance of the dtype. Targets are for an H200.

The last line sets all operators of one prefill against the time to the first token of that prefill, in turn, on a
model with random weights: their calls are noted in the model and called again by themselves, the host's waits for
frame counts included.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import itertools
import json
import math
import platform
import shlex
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import earlytom_compile
from earlytom_compile import EarlyTomConfig
from earlytom_compile.benchmarks.ceilings import Clock, ceilings
from earlytom_compile.benchmarks.measure import timed
from earlytom_compile.benchmarks.replay import record, replay
from earlytom_compile.benchmarks.workload import make_inputs, random_model
from earlytom_compile.kernels import all_ops  # noqa: F401  (registers torch.ops.earlytom)
from earlytom_compile.kernels.providers import provider_of
from earlytom_compile.shapes import config_of, shape_of

ops = torch.ops.earlytom
RETAIN_RATIO = 0.1
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


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
class Case:
    """An operator on inputs of one shape, and other ways to the same result."""

    op: str
    inputs: tuple[Any, ...]  # tensors, and lists of them
    arms: dict[str, Callable[..., Any]]  # each takes the inputs
    expected: tuple[Tensor, ...]  # may end before the results do
    provider: str
    bytes: int = 0
    flops: int = 0
    target: str = ""
    notes: dict[str, str] = dataclasses.field(default_factory=dict)  # of arms


# What the operators compute, as plain PyTorch that Inductor can fuse.


def plain_similarity(hidden: Tensor, band: int) -> Tensor:
    frames, tokens, _ = hidden.shape
    unit = F.normalize(hidden.float(), dim=-1).flatten(1)
    earlier = torch.arange(frames, device=hidden.device)[:, None] - 1 - torch.arange(band, device=hidden.device)
    similarity = (unit @ unit.t() / tokens).gather(1, earlier.clamp_min(0))
    return torch.where(earlier >= 0, similarity, 0.0)


def plain_merge(tensors: Sequence[Tensor], source: Tensor, weight: Tensor, n: int) -> list[Tensor]:
    def blended(x: Tensor) -> Tensor:
        weights = weight[:n].reshape(n, 2, *[1] * (x.dim() - 1))
        return (x[source[:n, 0]].float() * weights[:, 0] + x[source[:n, 1]].float() * weights[:, 1]).to(x.dtype)

    return [blended(x) for x in tensors]


def plain_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    return torch.softmax(query.float() @ key.float().transpose(-1, -2) * scale, dim=-1).mean((1, 2))


def plain_heads(near: Tensor, tau_seg: float, alpha: float) -> Tensor:
    """int64 [T]: the first frame of each frame's segment, from similarities to the frame before [T]."""
    smoothed, head = torch.ones_like(near[0]), torch.zeros_like(near[0], dtype=torch.int64)
    heads = [head]
    for frame in range(1, len(near)):
        smoothed = alpha * near[frame] + (1 - alpha) * smoothed
        cut = smoothed < tau_seg
        smoothed, head = torch.where(cut, 1.0, smoothed), torch.where(cut, frame, head)
        heads.append(head)
    return torch.stack(heads)


def plain_dynamic(similarity: Tensor, counts: Tensor, *, tau_seg: float, alpha: float, **_: Any) -> Tensor:
    """One video, paper: bool [T]."""
    heads = plain_heads(similarity[:, 0], tau_seg, alpha)
    is_head = heads == torch.arange(len(heads), device=heads.device)
    return is_head | torch.cat([is_head[1:], is_head[:1]])  # frame 0 is a head, as the frame behind the last would be


def plain_plan(
    similarity: Tensor, counts: Tensor, *, tau_seg: float, alpha: float, min_frames: int, **_: Any
) -> tuple[Tensor, ...]:
    """One video, paper, without a window, threshold "segment"."""
    frames = len(similarity)
    place = torch.arange(frames, device=similarity.device)
    near = F.pad(similarity[:, 0], (0, 2))
    alike, following = near[1 : frames + 1], near[2 : frames + 2]
    heads = plain_heads(near[:frames], tau_seg, alpha)
    is_tail = torch.cat([heads[1:] == place[1:], torch.ones_like(heads[:1], dtype=torch.bool)])
    tails = torch.where(is_tail, place, frames).flip(0).cummin(0).values.flip(0)
    threshold = similarity[tails].gather(1, (tails - heads - 1).clamp_min(0)[:, None])[:, 0]
    good = (place > heads) & (place + 1 < tails) & (alike >= threshold) & (alike >= following)
    taken = [good[0]]
    for frame in range(1, frames):
        taken.append(good[frame] & ~taken[-1])
    merges = torch.stack(taken)
    order = torch.argsort(torch.where(merges, alike, -math.inf), descending=True, stable=True)
    merges = merges & (torch.empty_like(order).scatter_(0, order, place) < max(0, frames - min_frames))
    one, two = alike.clamp_min(0), following.clamp_min(0)
    share = torch.where(one + two == 0, 0.5, one / (one + two))
    pair = torch.stack([share, 1 - share], 1)
    alone = torch.tensor([1.0, 0.0], device=pair.device)
    stays = ~torch.cat([torch.zeros_like(merges[:1]), merges[:-1]])
    row = torch.where(stays, stays.cumsum(0) - 1, frames)
    source = place.new_zeros(frames + 1, 2).index_copy(0, row, torch.stack([place, place + merges], 1))
    weight = pair.new_zeros(frames + 1, 2).index_copy(0, row, torch.where(merges[:, None], pair, alone))
    return source[:frames], weight[:frames], stays.sum()[None]


def plain_select(features: Tensor, importance: Tensor, dynamic: Tensor, counts: Tensor, budget: int) -> Tensor:
    """One video: [budget, D]."""
    frames, tokens = importance.shape
    base, left = divmod(budget, frames)
    order = torch.argsort((~dynamic).int(), stable=True)
    frame, place = torch.arange(frames, device=order.device), torch.arange(tokens, device=order.device)
    quota = (base + (torch.empty_like(order).scatter_(0, order, frame) < left).long())[:, None]
    by_importance = torch.argsort(importance, dim=1, descending=True, stable=True)
    rank = torch.empty_like(by_importance).scatter_(1, by_importance, place.expand(frames, tokens))
    runs = quota.clamp_min(1)
    small, larger = tokens // runs, tokens % runs
    border = larger * (small + 1)
    run = torch.where(place < border, place // (small + 1), larger + (place - border) // small)
    best = torch.full_like(rank, tokens).scatter_reduce_(1, run, rank, "amin").gather(1, run)
    keep = torch.where(dynamic[:, None], rank < quota, (rank == best) & (quota > 0)).flatten()
    slot = torch.where(keep, keep.cumsum(0) - 1, budget)
    kept = slot.new_empty(budget + 1).scatter_(0, slot, torch.arange(frames * tokens, device=slot.device))[:budget]
    return features.flatten(0, 1)[kept]


# What one would write first.


def naive_similarity(hidden: Tensor, band: int) -> Tensor:
    out = torch.zeros(hidden.shape[0], band, device=hidden.device)
    for t in range(1, hidden.shape[0]):
        low = max(0, t - band)
        cosine = F.cosine_similarity(hidden[t].float(), hidden[low:t].float(), dim=-1)
        out[t, : t - low] = cosine.mean(-1).flip(0)
    return out


def naive_merge(tensors: Sequence[Tensor], source: Tensor, weight: Tensor, n: int) -> list[Tensor]:
    rows = list(zip(source[:n].tolist(), weight[:n].tolist(), strict=True))
    return [torch.stack([x[a] if a == b else (wa * x[a].float() + wb * x[b].float()).to(x.dtype)
                         for (a, b), (wa, wb) in rows]) for x in tensors]  # fmt: skip


def naive_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    return torch.softmax(query @ key.transpose(-1, -2) * scale, dim=-1, dtype=torch.float32).mean((1, 2))


def naive_plan(similarity: Tensor, counts: Tensor, **options: Any) -> tuple[Tensor, ...]:
    plan = ops.plan_merge(similarity.cpu(), counts.cpu(), **options)
    return tuple(part.to(similarity.device) for part in plan)


def naive_dynamic(similarity: Tensor, counts: Tensor, **options: Any) -> Tensor:
    return ops.dynamic_frames(similarity.cpu(), counts.cpu(), **options).to(similarity.device)


def naive_select(features: Tensor, importance: Tensor, dynamic: Tensor, counts: Tensor, budget: int) -> Tensor:
    flags = dynamic.tolist()
    base, left = divmod(budget, len(flags))
    favoured = sorted(range(len(flags)), key=lambda t: not flags[t])[:left]
    kept = []
    for t, flag in enumerate(flags):
        quota = base + (t in favoured)
        if flag:
            places = importance[t].topk(quota).indices.sort().values
        else:
            runs = importance[t].tensor_split(quota) if quota else ()
            starts = itertools.accumulate((len(run) for run in runs), initial=0)
            best = [run.argmax() + start for run, start in zip(runs, starts, strict=False)]
            places = torch.stack(best) if best else importance.new_empty(0, dtype=torch.int64)
        kept.append(features[t, places])
    return torch.cat(kept)


# The cases of one frame count.


def scenes(frames: int, *shape: int) -> Tensor:
    """Scenes of 8 frames that barely move, so that frames merge."""
    return torch.randn((frames + 7) // 8, *shape).repeat_interleave(8, 0)[:frames] + 0.1 * torch.randn(frames, *shape)


def cases(frames: int, shape: Shape, dtype: torch.dtype, device: str, inductor: bool) -> Iterator[Case]:
    """Built one after the other: not all inputs of 128 frames need to be on the device at once."""
    config = EarlyTomConfig(retain_ratio=RETAIN_RATIO)
    segmentation = {"variant": "paper", "tau_seg": config.tau_seg, "alpha": config.alpha, "max_window": config.window()}
    planning = {**segmentation, "tau_merge": math.nan, "min_frames": config.min_frames(frames)}
    torch.compiler.reset()  # the arms of other frame counts count as recompilations

    def case(op: str, inputs: tuple[Any, ...], options: dict[str, Any], plain: Any, naive: Any, **facts: Any) -> Case:
        arms: dict[str, Callable[..., Any]] = {"earlytom": functools.partial(getattr(ops, op), **options)}
        if inductor and plain:
            arms["inductor"] = functools.partial(torch.compile(plain, dynamic=False), **options)
        arms["naive"] = functools.partial(naive, **options)
        inputs = tree_map(lambda x: x.to(device), inputs)
        return Case(op, inputs, arms, provider=provider_of(op, device, *inputs, **options), **facts)

    hidden = scenes(frames, shape.tokens, shape.channels).to(dtype)
    band = {"band": config.similarity_band(frames)}
    similarity = ops.frame_similarity(hidden, **band)
    yield case("frame_similarity", (hidden,), band, plain_similarity, naive_similarity,
               expected=(similarity,), bytes=hidden.nbytes, target=">= 70 % at 32 frames")  # fmt: skip

    counts = torch.tensor([frames])
    source, weight, merged_counts = plan = ops.plan_merge(similarity, counts, **planning)
    n = int(merged_counts.sum())
    carried = [hidden, torch.rand(frames, shape.tokens)]  # importance rides along
    merged, scores = ops.merge_frames(carried, source, weight, n)
    moved = int((weight != 0).sum()) * sum(x[0].nbytes for x in carried) + merged.nbytes + scores.nbytes
    yield case("merge_frames", (carried, source, weight), {"n": n}, plain_merge, naive_merge,
               expected=(merged, scores), bytes=moved, target=">= 70 % at 32 frames")  # fmt: skip

    query, key, scale = *queries_and_keys(frames, shape, dtype), (shape.channels // shape.heads) ** -0.5
    few = ops.attention_received(query[:4], key[:4], scale)  # rows of frames are independent
    attention = case("attention_received", (query, key), {"scale": scale}, plain_attention, naive_attention,
                     expected=(few,), flops=4 * query.numel() * shape.tokens, target="<= 1.2 x sdpa")  # fmt: skip
    attention.arms["sdpa"] = lambda query, key: F.scaled_dot_product_attention(query, key, key, scale=scale)
    yield attention
    del attention

    planner = case("plan_merge", (similarity, counts), planning, plain_plan, naive_plan, expected=plan)
    yield planner
    similarity = ops.frame_similarity(merged, **band)
    dynamic = ops.dynamic_frames(similarity, merged_counts, **segmentation)
    yield case("dynamic_frames", (similarity, merged_counts), segmentation, plain_dynamic, naive_dynamic,
               expected=(dynamic,))  # fmt: skip
    features = torch.randn(n, shape.pooled, shape.features).to(dtype)
    importance = torch.rand(n, shape.pooled)
    budget = {"budget": config.token_budget(frames, shape.pooled)}
    tokens = ops.select_tokens(features, importance, dynamic, merged_counts, **budget)[0]
    selector = case("select_tokens", (features, importance, dynamic, merged_counts), budget, plain_select, naive_select,
                    expected=(tokens,), bytes=2 * tokens.nbytes + importance.nbytes)  # fmt: skip
    for place in ("host", "auto"):
        selector.arms[place] = functools.partial(ops.select_tokens, **budget, static_selection=place)
        selector.notes[place] = "" if device == "cuda" else "= device: no GPU"
    yield selector
    yield one_after_the_other(planner, selector, target="<= 60 us")


def queries_and_keys(frames: int, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[F, H, S, d], as views of [F, S, H * d] projections, which is how an encoder has them."""
    sizes = (frames, shape.tokens, shape.heads, shape.channels // shape.heads)
    return torch.randn(sizes).to(dtype).transpose(1, 2), torch.randn(sizes).to(dtype).transpose(1, 2)


def one_after_the_other(first: Case, second: Case, target: str) -> Case:
    def both(arm: str) -> Callable[..., Any]:
        one, other, border = first.arms[arm], second.arms[arm], len(first.inputs)
        return lambda *inputs: (*one(*inputs[:border]), other(*inputs[border:]))

    arms = {arm: both(arm) for arm in first.arms}
    return Case(f"{first.op} + {second.op}", first.inputs + second.inputs, arms, first.expected, second.provider,
                target=target)  # fmt: skip


# Measuring.


def take_turns(clock: Clock, case: Case, repeats: int) -> dict[str, list[float]]:
    """Seconds of each arm; every call gets the next set of inputs, which together are twice the cache."""
    size = sum(x.nbytes for x in tree_leaves(case.inputs))
    copies = min(32, max(1, math.ceil(2 * clock.cache / size)))
    sets = itertools.cycle([case.inputs, *(tree_map(torch.clone, case.inputs) for _ in range(copies))])
    seconds: dict[str, list[float]] = {name: [] for name in case.arms}
    for _ in range(repeats):
        for name, arm in case.arms.items():
            inputs = next(sets)
            seconds[name].append(clock.seconds(functools.partial(arm, *inputs)))
    return seconds


def error(result: Any, expected: tuple[Tensor, ...]) -> float:
    """Largest difference over largest value; NaN and missing values count as infinite."""
    worst = 0.0
    for actual, right in zip((result,) if isinstance(result, Tensor) else result, expected, strict=False):
        actual, right = actual.double().cpu().flatten()[: right.numel()], right.double().flatten()
        if actual.shape != right.shape or actual.isnan().any():
            return math.inf
        worst = max(worst, float((actual - right).abs().max() / right.abs().max().clamp_min(1e-30)))
    return worst


def measure(case: Case, clock: Clock, ceiling: dict[str, float], repeats: int) -> Iterator[dict[str, Any]]:
    """A row for each arm, ready for JSON."""
    results = {name: arm(*case.inputs) for name, arm in case.arms.items()}
    errors = {name: error(result, case.expected) for name, result in results.items() if name != "sdpa"}
    del results
    seconds = take_turns(clock, case, repeats)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    work, kind = (case.flops, "matmul") if case.flops else (case.bytes, "copy")
    for name, values in seconds.items():
        yield {
            "op": case.op,
            "arm": name,
            "provider": case.provider if name == "earlytom" else None,
            **{"median_us": 1e6 * medians[name], "min_us": 1e6 * min(values), "max_us": 1e6 * max(values)},
            "per_second": work / medians[name] if work else None,
            "share_of_ceiling": work / medians[name] / ceiling[kind] if work else None,
            "ceiling": kind if work else None,
            "times_earlytom": medians[name] / medians["earlytom"],
            "times_sdpa": medians[name] / medians["sdpa"] if "sdpa" in medians else None,
            "error": errors.get(name),
            "target": case.target if name == "earlytom" else None,
            "note": case.notes.get(name) or None,
        }


# One prefill.


def measure_prefill(name: str, device: str, dtype: torch.dtype, repeats: int, lowering: str) -> dict[str, Any]:
    """All operators of a prefill against the time to its first token, in turn, ready for JSON."""
    frames = shape_of(name).frames
    model: Any = random_model(config_of(name), device=device, dtype=dtype)
    inputs = make_inputs(model, frames=frames)
    earlytom_compile.compile(model, retain_ratio=RETAIN_RATIO, lowering=lowering, strict=True)

    def first_token() -> object:
        return model.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=0)

    for _ in range(2):
        first_token()  # compiles
    calls = record(first_token)
    replay(calls)
    clock = Clock(device)
    seconds = [(timed(first_token, model.device)[0], clock.seconds(lambda: replay(calls))) for _ in range(repeats)]
    first, alone = (statistics.median(values) for values in zip(*seconds, strict=True))
    return {
        "shape": name,
        "retain_ratio": RETAIN_RATIO,
        "lowering": lowering,
        "frames": earlytom_compile.report(model).to_dict()["videos"][0]["frames"],
        "calls": dict(Counter(call.name for call in calls)),
        "first_token_ms": 1e3 * first,
        "operators_ms": 1e3 * alone,
        "share": alone / first,
        "rounds_ms": [[1e3 * value for value in pair] for pair in seconds],
        "target": "<= 2 %",
    }


# Reporting.


def closing_line(prefill: dict[str, Any]) -> str:
    frames = " -> ".join(map(str, prefill["frames"]))
    return (
        f"all operators of one prefill take {prefill['operators_ms']:.2f} ms = {prefill['share']:.1%} of the time to "
        f"first token, {prefill['first_token_ms']:.1f} ms ({prefill['shape']}, {frames} frames, r = "
        f"{prefill['retain_ratio']:g}, lowering {prefill['lowering']}; target {prefill['target']})"
    )


def table(rows: list[dict[str, Any]], title: str, tolerance: float) -> Table:
    out = Table(title=title)
    for column in ("op", "arm"):
        out.add_column(column, no_wrap=True)
    for column in ("median us", "min us", "max us", "rate", "of ceiling", "x earlytom", "error"):
        out.add_column(column, justify="right", no_wrap=True)
    out.add_column("target", no_wrap=True)
    for row in rows:
        provider, share, rate, sdpa = (row[key] for key in ("provider", "share_of_ceiling", "per_second", "times_sdpa"))
        unit, size = ("TFLOP/s", 1e12) if row["ceiling"] == "matmul" else ("GB/s", 1e9)
        wrong = "" if row["error"] is None else f"{row['error']:.0e}"
        out.add_row(
            row["op"] if provider else "",
            f"{row['arm']}, {provider}" if provider else row["arm"],
            *(f"{row[key]:.1f}" for key in ("median_us", "min_us", "max_us")),
            f"{rate / size:.3g} {unit}" if rate else "latency bound",
            f"{share:.0%}" if share else "",
            f"{row['times_earlytom']:.2f}",
            f"[red]{wrong}[/red]" if (row["error"] or 0) > tolerance else wrong,
            (row["target"] or row["note"] or "") + (f", is {sdpa:.2f}" if sdpa and provider else ""),
        )
    return out


def machine(device: str) -> dict[str, Any]:
    """Where and when, and with which versions."""
    versions = {}
    for package in ("torch", "triton", "earlytom-compile"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"versions": versions, "cuda": torch.version.cuda, "device": name, "threads": torch.get_num_threads(),
            "date": now, "command": shlex.join(sys.argv)}  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--frames", type=int, nargs="+", help="default 8 32 64 128 on a GPU, 8 16 on a CPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--repeats", type=int, help="default 50 on a GPU, 5 on a CPU, 10 and 3 if quick")
    parser.add_argument("--quick", action="store_true", help="one frame count, few repeats, nothing compiled on a CPU")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    every, once = ([8, 32, 64, 128], [32]) if on_gpu else ([8, 16], [8])
    arguments.frames = arguments.frames or (once if arguments.quick else every)
    default = {(True, False): 50, (True, True): 10, (False, False): 5, (False, True): 3}
    arguments.repeats = arguments.repeats or default[on_gpu, arguments.quick]
    arguments.dtype = arguments.dtype or ("bfloat16" if on_gpu else "float32")
    return arguments


@torch.inference_mode()
def main() -> int:
    """Measure, print a table for each frame count, write JSON; 1 when an arm computes something else."""
    arguments = parse()
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    shape = Shape() if device == "cuda" else SMALL
    torch.manual_seed(0)
    console = Console()
    console.width = max(console.width, 160)  # also where no terminal says how wide it is
    clock = Clock(device)
    ceiling = ceilings(clock, dtype, device)
    copy, matmul = ceiling["copy"] / 1e9, ceiling["matmul"] / 1e12
    console.print(f"copy {copy:.0f} GB/s, {arguments.dtype} matmul {matmul:.3g} TFLOP/s")
    rows: list[dict[str, Any]] = []
    for frames in arguments.frames:
        here = []
        for case in cases(frames, shape, dtype, device, inductor=device == "cuda" or not arguments.quick):
            here += [{"frames": frames, **row} for row in measure(case, clock, ceiling, arguments.repeats)]
        console.print(table(here, f"{frames} frames, {arguments.dtype}, {shape}", TOLERANCE[dtype]))
        rows += here
    lowering = "eager" if arguments.quick and device == "cpu" else "staged"
    name = "llava-onevision-7b" if device == "cuda" else "cpu-small"
    prefill = measure_prefill(name, device, dtype, arguments.repeats, lowering)
    console.print(closing_line(prefill), soft_wrap=True)
    if arguments.json:
        content = {**machine(device), "shape": dataclasses.asdict(shape), "dtype": arguments.dtype, "ceilings": ceiling}
        arguments.json.write_text(json.dumps({**content, "rows": rows, "prefill": prefill}, indent=2) + "\n")
    return int(any((row["error"] or 0) > TOLERANCE[dtype] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
