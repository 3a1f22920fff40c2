"""A real call under the profiler: every product of the model lies in the range of its stage, in every arm."""

import inspect
import json
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_models import tiny_llava_onevision
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from without_inductor import leave_graphs_as_they_are

from earlytom_compile.benchmarks import profiling
from earlytom_compile.benchmarks.arms import make_arms
from earlytom_compile.benchmarks.breakdown import LLM, OVERHEAD, STAGES, TOKENS, VISION, stage_range
from earlytom_compile.benchmarks.profiling import profile_arms
from earlytom_compile.benchmarks.workload import make_inputs

VISION_LAYERS, TEXT_LAYERS, ROWS = 1, 1, 2
PRODUCTS = {"aten::linear", "aten::addmm", "aten::mm", "aten::matmul"}
ROTARY_IS_A_PRODUCT = " @ " in inspect.getsource(Qwen2RotaryEmbedding.forward)  # in transformers 5.17
NEEDS_GPU = pytest.mark.gpu(only=True)
# What Inductor makes of the model takes a minute to make, for each arm.
CASES = [
    pytest.param(("cpu", "staged", leave_graphs_as_they_are), id="cpu-pieces"),
    pytest.param(("cpu", "eager", leave_graphs_as_they_are), id="cpu-eager", marks=pytest.mark.long),
    pytest.param(("cpu", "staged", None), id="cpu-staged", marks=pytest.mark.long),
    pytest.param(("cuda", "eager", leave_graphs_as_they_are), id="cuda-eager", marks=NEEDS_GPU),
    pytest.param(("cuda", "staged", None), id="cuda-staged", marks=NEEDS_GPU),
]


@dataclass
class Profiled:
    model: Any
    breakdowns: dict
    events: list  # complete ones of the trace
    compiled: int  # graphs, while profiling


@pytest.fixture(scope="module", params=CASES)
def profiled(request):
    device, lowering, leave = request.param
    with pytest.MonkeyPatch.context() as patch:
        if leave is not None:
            leave(patch)
        return profile(device, lowering)


def profile(device, lowering):
    torch._dynamo.reset()
    model = tiny_llava_onevision(vision_layers=VISION_LAYERS, text_layers=TEXT_LAYERS).to(device)
    inputs = make_inputs(model, frames=8, batch=ROWS, redundancy=0.7)
    arms = list(
        make_arms(
            model, inputs, (0.25,), {"lowering": lowering, "variant": "paper", "merge_layers": (0,), "tau_seg": 0.3}
        )
    )[:4]
    with torch.inference_mode():
        for _ in range(2):
            for arm in arms:
                arm.first_token()
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    breakdowns, trace = profile_arms(model, arms)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"] - compiled
    trace = json.loads(json.dumps(trace))
    return Profiled(model, breakdowns, [event for event in trace["traceEvents"] if event.get("ph") == "X"], compiled)


ARMS = ["transformers", "inductor", "earlytom 0.25", "earlytom 0.25 (backend)"]


def ranges(events, name):
    """[(begin, end), ...] of the ranges of this name."""
    found = [e for e in events if e["name"] == name and e["cat"] == "user_annotation"]
    return sorted((e["ts"], e["ts"] + e["dur"]) for e in found)


@pytest.mark.parametrize("arm", ARMS)
def test_parts_are_not_negative_and_add_up_to_the_wall_time(profiled, arm):
    breakdown = profiled.breakdowns[arm]
    assert list(breakdown.parts) == [VISION, TOKENS, LLM, OVERHEAD]
    assert all(breakdown.stages[stage] > 0 for stage in STAGES) and breakdown.overhead >= 0
    assert sum(breakdown.parts.values()) == pytest.approx(breakdown.wall)


@pytest.mark.parametrize("arm", ARMS)
def test_stages_of_a_call_follow_each_other_without_gaps(profiled, arm):
    events = profiled.events
    ((begin, end),) = ranges(events, arm)
    stages = sorted((*span, stage) for stage in STAGES for span in ranges(events, stage_range(arm, stage)))
    assert all(first[1] == pytest.approx(second[0]) for first, second in pairwise(stages))
    assert begin <= stages[0][0] and stages[-1][1] == pytest.approx(end)
    # generate() encodes the videos of a batch one after the other
    passes = ROWS if arm == "earlytom 0.25" else 1
    assert [stage for _, _, stage in stages] == [VISION, TOKENS] * passes + [LLM]


@pytest.mark.parametrize("arm", ARMS)
def test_every_product_lies_in_the_stage_of_its_weight(profiled, arm):
    events = profiled.events
    products = [e for e in events if e["cat"] == "cpu_op" and (e["name"] in PRODUCTS or "earlytom::" in e["name"])]
    outermost, end = [], 0.0
    for event in sorted(products, key=lambda e: (e["ts"], -e["dur"])):
        if event["ts"] >= end:
            outermost.append(event)
            end = event["ts"] + event["dur"]
    found = {}
    for stage in STAGES:
        spans = ranges(events, stage_range(arm, stage))
        inside = [e for e in outermost if any(begin <= e["ts"] < end for begin, end in spans)]
        found[stage] = sum(e["name"] in PRODUCTS for e in inside)
    # The product of positions and frequencies has no weight: it counts with what happens to be there.
    if ROTARY_IS_A_PRODUCT:
        found[LLM if found[LLM] > 7 * TEXT_LAYERS + 1 else TOKENS] -= 1
    passes = ROWS if arm == "earlytom 0.25" else 1
    assert found == {VISION: passes * 6 * VISION_LAYERS, TOKENS: passes * 2, LLM: 7 * TEXT_LAYERS + 1}


@pytest.mark.parametrize("arm", ARMS)
def test_every_stage_has_a_peak_and_the_calls_is_the_highest(profiled, arm):
    model, breakdown = profiled.model, profiled.breakdowns[arm]
    cache = TEXT_LAYERS * 2 * ROWS * model.config.text_config.hidden_size * 4  # bytes of one position, at most
    assert list(breakdown.stage_memory) == list(STAGES) and min(breakdown.stage_memory.values()) > cache
    assert breakdown.memory == max(breakdown.stage_memory.values())


def test_memory_is_what_a_call_allocates_at_its_peak():
    model = tiny_llava_onevision(vision_layers=1, text_layers=1)
    kept = torch.ones(1 << 20)

    def first_token():
        (kept[: 1 << 18] + 1).sum()
        return torch.zeros(1 << 16)

    breakdowns, _ = profile_arms(model, [profiling.Arm("a", first_token), profiling.Arm("b", first_token)])
    for breakdown in breakdowns.values():
        assert 1 << 20 <= breakdown.memory < (1 << 20) + 1024


def test_an_arm_without_memory_has_no_breakdown():
    def fails():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    arms = [profiling.Arm("big", fails), profiling.Arm("small", lambda: torch.ones(8) + 1)]
    breakdowns, _ = profile_arms(tiny_llava_onevision(vision_layers=1, text_layers=1), arms)
    assert list(breakdowns) == ["small"]


def test_profiling_compiles_nothing_and_leaves_nothing_behind(profiled):
    from torch._inductor.select_algorithm import extern_kernels

    assert profiled.compiled == 0
    assert not any(module._forward_pre_hooks for module in profiled.model.modules())
    kernels = [*vars(extern_kernels).values(), torch._C._nn.linear]
    assert kernels and not any("watched" in getattr(kernel, "__qualname__", "") for kernel in kernels)


def test_ranges_are_nvtx_ranges_too_where_there_is_a_gpu(monkeypatch):
    said = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", said.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: said.append("pop"))
    weight = torch.ones(2, 2)

    def first_token():
        torch._C._nn.linear(torch.ones(1, 2), torch.ones(2, 2))
        torch._C._nn.linear(torch.ones(1, 2), weight)
        torch._C._nn.linear(torch.ones(1, 2), weight)

    arm = profiling.Arm("a", first_token)
    with profiling._marked(arm, {weight.data_ptr(): TOKENS}, on_gpu=True):
        arm.first_token()
    assert said == [f"a: {VISION}", "pop", f"a: {TOKENS}", "pop"]
