"""The time to the first token of one model, as much of it as there is time for: what counts most comes first.

    python -m earlytom_compile.benchmarks.prefill --shape llava-onevision-7b --json prefill.json

    1  transformers, earlytom 0.1 in both spellings
    2  the same with Inductor's full model
    3  the same with CUDA graphs of EarlyTom (mode="reduce-overhead")
    4  the same with those of Inductor

`earlytom bench` compiles every arm before it times any. Here each step times all arms there are so far, in turn, and
writes times, breakdown and floor, so that whoever stops the program has a whole comparison, only a shorter one. The
first call's seconds are those of the step in which an arm appeared, with compiler caches as they were found.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from earlytom_compile.benchmarks.arms import Arm, make_arms
from earlytom_compile.benchmarks.ceilings import Clock, ceilings
from earlytom_compile.benchmarks.environment import environment
from earlytom_compile.benchmarks.floor import floor, work_of
from earlytom_compile.benchmarks.measure import Result, compile_seconds, measure, timed
from earlytom_compile.benchmarks.profiling import profile_arms
from earlytom_compile.benchmarks.results import Workload, tables, to_dict, to_markdown
from earlytom_compile.benchmarks.workload import Inputs, make_inputs, random_model
from earlytom_compile.shapes import config_of, shape_of

RETAIN_RATIO = 0.1
PROMPT_LENGTH = 32
_GRAPHS = "reduce-overhead"
Rates = dict[str, float]


def steps(model: Any, inputs: Inputs, options: dict[str, Any]) -> Iterator[list[Arm]]:
    """The arms that each step adds."""

    def arms(mode: str | None) -> dict[str, Arm]:
        made = make_arms(model, inputs, (RETAIN_RATIO,), {**options, **({"mode": mode} if mode else {})})
        named = [replace(arm, name=f"{arm.name}, {mode}") if mode else arm for arm in made]
        return {arm.name.partition(",")[0]: arm for arm in named}

    plain, ours = arms(None), f"earlytom {RETAIN_RATIO:g}"
    yield [plain["transformers"], plain[ours], plain[f"{ours} (backend)"]]
    yield [plain["inductor"]]
    graphed = arms(_GRAPHS)
    yield [graphed[ours], graphed[f"{ours} (backend)"]]
    yield [graphed["inductor"]]


def first_calls(arms: Sequence[Arm]) -> tuple[list[Arm], list[Result]]:
    """Those of ``arms`` that can be called, and of all of them what the first call took or why there was none."""
    able, results = [], []
    for arm in arms:
        _say(f"{arm.name}: first call")
        result, before = Result(arm.name, arm.retain_ratio), compile_seconds()
        try:
            with torch.inference_mode():
                result.cold, _ = timed(arm.first_token, arm.model.device)
            result.compilation = compile_seconds() - before
            able.append(arm)
        except Exception as error:  # one arm that breaks is a result, and the others are not to miss their turn
            traceback.print_exc()
            result.failure = f"{type(error).__name__}: {error}".partition("\n")[0]
        results.append(result)
    return able, results


def in_turn(model: Any, arms: Sequence[Arm], first: Sequence[Result], rates: Rates, repeats: int) -> list[Result]:
    """Every arm timed in turn, and its floor."""
    results = measure(model, arms, repeats=repeats, decode_tokens=0, progress=_say)
    known = {result.name: result for result in first}
    for arm, result in zip(arms, results, strict=True):
        result.cold, result.compilation = known[arm.name].cold, known[arm.name].compilation
        if not result.failure:
            schedules, merges = result.frames or [[arm.frames]], result.merge_layers or None
            work = work_of(model, schedules=schedules, prompt=result.cache_tokens, merge_layers=merges)
            result.floor = floor(work, rates)
    return results


def profile(model: Any, arms: Sequence[Arm], results: Sequence[Result]) -> None:
    """Where the time goes, into ``results``; without it, times are results all the same."""
    able = [arm for arm, result in zip(arms, results, strict=True) if not result.failure]
    try:
        breakdowns, _ = profile_arms(model, able, _say)
    except Exception:  # the next step is not to miss its turn
        traceback.print_exc()
        return
    for result in results:
        result.breakdown = breakdowns.get(result.name)


def _say(text: str) -> None:
    print(text, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure step by step, print the tables and write the files after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llava-onevision-7b", help="(%(default)s)")
    parser.add_argument("--frames", type=int, help="default: the shape's")
    parser.add_argument("--repeats", type=int, default=10, help="timed calls of each arm in a step (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--lowering", default="staged", help="of EarlyTom's arms (%(default)s)")
    parser.add_argument("--arms", type=lambda text: tuple(text.split(",")), default=("",), help="beginnings of names")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args(argv)
    start = time.perf_counter()
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    frames = arguments.frames or shape_of(arguments.shape).frames
    model: Any = random_model(config_of(arguments.shape), device=arguments.device, dtype=dtype)
    inputs = make_inputs(model, frames=frames, prompt_length=PROMPT_LENGTH)
    rates = ceilings(Clock(arguments.device), dtype, arguments.device)
    about = {**environment(model.device), "shape": arguments.shape}
    arms: list[Arm] = []
    first: list[Result] = []

    def write(results: list[Result]) -> Workload:
        failed = [result for result in first if result.failure]
        workload = Workload(frames, 1, PROMPT_LENGTH, results + failed, str(dtype).removeprefix("torch."), rates)
        about["seconds"] = round(time.perf_counter() - start, 1)
        if arguments.json:
            arguments.json.write_text(json.dumps(to_dict([workload], about), indent=1) + "\n", encoding="utf-8")
        if arguments.markdown:
            arguments.markdown.write_text(to_markdown([workload], about), encoding="utf-8")
        return workload

    # Every arm compiles the same functions for itself, and Dynamo counts them together.
    with torch._dynamo.config.patch(recompile_limit=256):
        for more in steps(model, inputs, {"lowering": arguments.lowering}):
            able, called = first_calls([arm for arm in more if arm.name.startswith(arguments.arms)])
            arms, first = arms + able, first + called
            if not able:
                continue
            results = in_turn(model, arms, first, rates, arguments.repeats)
            write(results)
            profile(model, arms, results)
            Console(width=150).print(*tables(write(results)))
    return int(any(result.failure for result in first))


if __name__ == "__main__":
    sys.exit(main())
