"""How long the first answer of a process takes, with all tokens and with fewer: compilation is most of it.

    python -m earlytom_compile.benchmarks.cold_start --rounds 2

Each answer comes from a process of its own, whose compiler caches are empty (cold) or what the same arm has left in
them (warm). Both models run the same code as in ``earlytom run --compare``: of the full one Inductor compiles the
vision tower, and the language model's pass over the prompt where it is long enough. The model is the demo's unless a
``--shape`` names a size with random weights.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from typing import Any

ARMS = ("full", "paper", "plus")
_FRAMES = 8


def main(arguments: list[str] | None = None) -> int:
    """Run every arm in turn, print seconds and how many times those of the full model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=2, help="cold and warm processes of each arm (%(default)s)")
    parser.add_argument("--shape", default="", metavar="NAME", help="random weights in this shape")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)  # the process that answers
    given = parser.parse_args(arguments)
    if given.arm:
        print(json.dumps(first_answer(given.arm, given.shape)))
        return 0
    seconds: dict[tuple[str, str], list[float]] = {}
    for number in range(given.rounds):
        for arm in ARMS:
            with tempfile.TemporaryDirectory(prefix="earlytom-cold-") as caches:
                for state in ("cold", "warm"):
                    answer = _process(arm, given.shape, caches)
                    seconds.setdefault((arm, state), []).append(answer["seconds"])
                    print(f"{number + 1} of {given.rounds}: {arm}, {state}: {answer['seconds']:.1f} s", flush=True)
    for state in ("cold", "warm"):
        full = statistics.median(seconds["full", state])
        for arm in ARMS:
            median = statistics.median(seconds[arm, state])
            print(f"{state} {arm:6} {median:6.1f} s  {median / full:.2f} of the full model's")
    return 0


def _process(arm: str, shape: str, caches: str) -> dict[str, Any]:
    command = [sys.executable, "-m", __spec__.name, "--arm", arm, "--shape", shape]  # type: ignore[union-attr]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": caches}
    result = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def first_answer(arm: str, shape: str) -> dict[str, Any]:
    """Seconds from a model and its inputs to the answer, in this process, which has compiled nothing yet."""
    import torch

    import earlytom_compile
    from earlytom_compile.benchmarks.workload import make_inputs, random_model
    from earlytom_compile.cli.comparison import full_model, timed_answer
    from earlytom_compile.integrations.prefill import CompiledPrefill
    from earlytom_compile.shapes import config_of
    from earlytom_compile.toyworld.model import WEIGHTS

    if shape:
        model = random_model(config_of(shape), device="cpu", dtype=torch.float32)
    else:
        from transformers import LlavaOnevisionForConditionalGeneration

        model = LlavaOnevisionForConditionalGeneration.from_pretrained(str(WEIGHTS)).float().eval()
    inputs = make_inputs(model, frames=_FRAMES)
    with ExitStack() as stack:
        if arm == "full":
            model = full_model(model, compiled=True)
            prefill = CompiledPrefill(model.model.language_model, "staged")
            stack.enter_context(prefill.active(inputs["attention_mask"]))
        else:
            model = earlytom_compile.compile(model, retain_ratio=0.1, variant=arm)
        tokens, seconds = timed_answer(model, inputs, 4)
    return {"arm": arm, "seconds": seconds, "tokens": tokens}


if __name__ == "__main__":
    sys.exit(main())
