"""Every operator against what Inductor makes of plain PyTorch, and against the naive way, interleaved in one run.

    python -m earlytom_compile.benchmarks.kernels --frames 8 32 64 128 --json kernels.json

    op                 arm                median us   rate       of ceiling
    frame_similarity   earlytom, triton   ...         ... GB/s   ... %        >= 70 % at 32 frames
                       inductor           ...         ... GB/s   ... %
                       naive              ...         ... GB/s   ... %

    inductor   torch.compile of the formula in plain PyTorch (formulas.py)
    naive      what one would write first
    native     of the operators that reuse patches: their native body on the same device
    sdpa       one forward of scaled_dot_product_attention on the same queries and keys; for reuse_attention, on all
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
import dataclasses
import functools
import itertools
import json
import math
import statistics
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils._pytree import tree_leaves, tree_map

import earlytom_compile
from earlytom_compile.benchmarks import markdown
from earlytom_compile.benchmarks.ceilings import Clock, ceilings
from earlytom_compile.benchmarks.environment import environment
from earlytom_compile.benchmarks.measure import timed
from earlytom_compile.benchmarks.operators import OF_A_PREFILL, RETAIN_RATIO, SMALL, Case, Shape, cases, error
from earlytom_compile.benchmarks.replay import record, replay
from earlytom_compile.benchmarks.reuse_operators import reuse_cases
from earlytom_compile.benchmarks.workload import make_inputs, random_model
from earlytom_compile.shapes import config_of, shape_of

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Of the other arms too, whose sums and products are in the dtype: some 100 of its epsilons (10 for bfloat16)."""


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


def measure(case: Case, clock: Clock, ceiling: dict[str, float], repeats: int) -> Iterator[dict[str, Any]]:
    """A row for each arm, ready for JSON; an arm that breaks has one that says so."""
    errors, failures = {}, {}
    for name, arm in case.arms.items():
        try:
            result = arm(*case.inputs)
            errors[name] = None if name == "sdpa" else error(result, case.expected)
        except Exception as broken:  # on a machine that is lent, the others must not miss their turn
            traceback.print_exc()
            failures[name] = f"{type(broken).__name__}: {broken}".partition("\n")[0]
    case = dataclasses.replace(case, arms={name: arm for name, arm in case.arms.items() if name not in failures})
    seconds = take_turns(clock, case, repeats)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    work, kind = (case.flops, "matmul") if case.flops else (case.bytes, "copy")
    for name, values in seconds.items():
        row = {
            "op": case.op,
            "arm": name,
            "provider": case.provider if name == "earlytom" else None,
            **{"median_us": 1e6 * medians[name], "min_us": 1e6 * min(values), "max_us": 1e6 * max(values)},
            "per_second": work / medians[name] if work else None,
            "share_of_ceiling": work / medians[name] / ceiling[kind] if work else None,
            "ceiling": kind if work else None,
            "times_earlytom": medians[name] / medians["earlytom"] if "earlytom" in medians else None,
            "times_sdpa": medians[name] / medians["sdpa"] if "sdpa" in medians else None,
            "error": errors.get(name),
            "note": case.notes.get(name) or None,
        }
        if case.target and name == "earlytom":
            row |= {"target": case.target.text, "met": case.target.met_by(row) if clock.on_gpu else None}
        yield row
    for name, failure in failures.items():
        yield {"op": case.op, "arm": name, "failure": failure}


def measure_prefill(name: str, device: str, dtype: torch.dtype, repeats: int, lowering: str) -> dict[str, Any]:
    """All operators of a prefill against the time to its first token, in turn, ready for JSON."""
    frames = shape_of(name).frames
    model: Any = random_model(config_of(name), device=device, dtype=dtype)
    inputs = make_inputs(model, frames=frames)
    earlytom_compile.compile(model, retain_ratio=RETAIN_RATIO, variant="paper", lowering=lowering, strict=True)

    def first_token() -> object:
        return model.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=0)

    for _ in range(2):
        first_token()  # compiles
    calls = record(first_token)
    replay(calls)
    clock = Clock(device)
    seconds = [(timed(first_token, model.device)[0], clock.seconds(lambda: replay(calls))) for _ in range(repeats)]
    first, alone = (statistics.median(values) for values in zip(*seconds, strict=True))
    row = {
        "shape": name,
        "retain_ratio": RETAIN_RATIO,
        "lowering": lowering,
        "frames": earlytom_compile.report(model).to_dict()["videos"][0]["frames"],
        "calls": dict(Counter(call.name for call in calls)),
        "first_token_ms": 1e3 * first,
        "operators_ms": 1e3 * alone,
        "share": alone / first,
        "rounds_ms": [[1e3 * value for value in pair] for pair in seconds],
    }
    return {**row, "target": OF_A_PREFILL.text, "met": OF_A_PREFILL.met_by(row) if device == "cuda" else None}


HEADINGS = ("op", "arm", "median us", "min us", "max us", "rate", "of ceiling", "x earlytom", "error", "target")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row as text."""
    if "failure" in row:
        return row["op"], row["arm"], "failed", *[""] * (len(HEADINGS) - 4), row["failure"]
    share, rate, sdpa, times = (row[key] for key in ("share_of_ceiling", "per_second", "times_sdpa", "times_earlytom"))
    unit, size = ("TFLOP/s", 1e12) if row["ceiling"] == "matmul" else ("GB/s", 1e9)
    beside = f", is {sdpa:.2f}" if sdpa and row["provider"] else ""
    return (
        row["op"],
        f"{row['arm']}, {row['provider']}" if row["provider"] else row["arm"],
        *(f"{row[key]:.1f}" for key in ("median_us", "min_us", "max_us")),
        f"{rate / size:.3g} {unit}" if rate else "latency bound",
        f"{share:.0%}" if share else "",
        "" if times is None else f"{times:.2f}",
        "" if row["error"] is None else f"{row['error']:.0e}",
        (row.get("target") or row["note"] or "") + beside + _verdict(row),
    )


def _verdict(row: dict[str, Any]) -> str:
    """Whether the target is met, where that can be said."""
    return "" if row.get("met") is None else ": met" if row["met"] else ": MISSED"


def table(rows: Sequence[dict[str, Any]], title: str, tolerance: float) -> Table:
    """For people at a terminal; red where an arm computes something else."""
    out = Table(title=title)
    for heading in HEADINGS:
        out.add_column(heading, justify="left" if heading in ("op", "arm", "target") else "right", no_wrap=True)
    for before, row in zip([None, *rows], rows, strict=False):
        op, *others = cells(row)
        same = before is not None and before["op"] == row["op"]
        out.add_row("" if same else op, *others, style="red" if is_wrong(row, tolerance) else None)
    return out


def is_wrong(row: dict[str, Any], tolerance: float) -> bool:
    """Whether an arm broke or computes something else than the operator."""
    return "failure" in row or (row["error"] or 0) > tolerance


def closing_line(prefill: dict[str, Any]) -> str:
    """All operators of one prefill in a sentence."""
    frames = " -> ".join(map(str, prefill["frames"]))
    return (
        f"all operators of one prefill take {prefill['operators_ms']:.2f} ms = {prefill['share']:.1%} of the time to "
        f"first token, {prefill['first_token_ms']:.1f} ms ({prefill['shape']}, {frames} frames, r = "
        f"{prefill['retain_ratio']:g}, lowering {prefill['lowering']}; target {prefill['target']}{_verdict(prefill)})"
    )


def to_markdown(content: dict[str, Any]) -> str:
    """For documents: a table for each frame count."""
    about = {name: value for name, value in content.items() if name not in ("rows", "prefill", "shape", "ceilings")}
    rates = content["ceilings"]
    lines = markdown.heading(about)
    lines += [f"copy {rates['copy'] / 1e9:.0f} GB/s, matmul {rates['matmul'] / 1e12:.3g} TFLOP/s", ""]
    for frames, rows in itertools.groupby(content["rows"], lambda row: row["frames"]):
        lines += markdown.table(f"{frames} frames", HEADINGS, map(cells, rows))
    return "\n".join([*lines, closing_line(content["prefill"]) if content["prefill"] else ""]) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--frames", type=int, nargs="+", help="default 32 8 64 128 on a GPU, 8 16 on a CPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--repeats", type=int, help="default 50 on a GPU, 5 on a CPU, 10 and 3 if quick")
    parser.add_argument("--quick", action="store_true", help="one frame count, few repeats, nothing compiled on a CPU")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    every, once = ([32, 8, 64, 128], [32]) if on_gpu else ([8, 16], [8])
    arguments.frames = arguments.frames or (once if arguments.quick else every)
    default = {(True, False): 50, (True, True): 10, (False, False): 5, (False, True): 3}
    arguments.repeats = arguments.repeats or default[on_gpu, arguments.quick]
    arguments.dtype = arguments.dtype or ("bfloat16" if on_gpu else "float32")
    return arguments


def write(arguments: argparse.Namespace, content: dict[str, Any]) -> None:
    """What was asked for, as far as it is measured."""
    if arguments.json:
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if arguments.markdown:
        arguments.markdown.write_text(to_markdown(content), encoding="utf-8")


@torch.inference_mode()
def main() -> int:
    """Measure, print and write after each frame count; 1 when an arm computes something else."""
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
    about = {**environment(torch.device(device)), "dtype": arguments.dtype}
    facts = {"shape": dataclasses.asdict(shape), "ceilings": ceiling}
    rows: list[dict[str, Any]] = []
    prefill: dict[str, Any] = {}
    for frames in arguments.frames:
        here = []
        every = cases(frames, shape, dtype, device, inductor=device == "cuda" or not arguments.quick)
        for case in itertools.chain(every, reuse_cases(frames, shape, dtype, device)):
            here += [{"frames": frames, **row} for row in measure(case, clock, ceiling, arguments.repeats)]
        console.print(table(here, f"{frames} frames, {arguments.dtype}, {shape}", TOLERANCE[dtype]))
        rows += here
        write(arguments, {**about, **facts, "rows": rows, "prefill": prefill})
        if not prefill:  # once, as soon as the operators themselves are known
            lowering = "eager" if arguments.quick and device == "cpu" else "staged"
            name = "llava-onevision-7b" if device == "cuda" else "cpu-tiny" if arguments.quick else "cpu-small"
            prefill = measure_prefill(name, device, dtype, arguments.repeats, lowering)
            write(arguments, {**about, **facts, "rows": rows, "prefill": prefill})
    console.print(closing_line(prefill), soft_wrap=True)
    return int(any(is_wrong(row, TOLERANCE[dtype]) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
