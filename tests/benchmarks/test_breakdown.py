"""A trace with known durations gives exactly the known breakdown, and every breakdown adds up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from earlytom_compile.benchmarks.breakdown import (
    LLM,
    NOT_SEPARABLE,
    OVERHEAD,
    STAGES,
    TOKENS,
    VISION,
    break_down,
    stage_range,
)

CALL = "earlytom 0.1"
THREAD, OTHER = 1, 2


def event(cat, name, begin, end, tid=THREAD, **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": end - begin, "tid": tid, "args": args}


def call(begin, end, stages):
    """The range of a call and those of its stages: [(stage, begin), ...]."""
    whole = event("user_annotation", CALL, begin, end)
    return [whole, *(event("user_annotation", stage_range(CALL, stage), at, at) for stage, at in stages)]


def launched(number, at, begin, end, tid=THREAD, cat="kernel"):
    """A kernel and the call of the runtime that launched it."""
    launch = event("cuda_runtime", "cudaLaunchKernel", at, at + 1, tid, correlation=number)
    return [launch, event(cat, f"kernel_{number}", begin, end, 7, correlation=number)]


def allocated(at, size, total, device=0):
    """``size`` bytes more (or fewer), after which there are ``total``."""
    args = {"Total Allocated": total, "Bytes": size, "Device Type": device}
    return {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "ts": at, "args": args}


def micro(**seconds):
    return pytest.approx({name: 1e-6 * value for name, value in seconds.items()})


def parts(breakdown):
    short = {VISION: "vision", TOKENS: "tokens", LLM: "llm", OVERHEAD: "overhead"}
    return {short[name]: seconds for name, seconds in breakdown.parts.items()}


def test_kernels_belong_to_the_stage_that_launched_them_however_late_they_run():
    events = call(100, 1100, [(VISION, 100), (TOKENS, 120), (LLM, 140)])
    events += launched(1, 105, 200, 500) + launched(2, 125, 500, 600) + launched(3, 145, 650, 1000)
    events += launched(4, 150, 1000, 1020, cat="gpu_memcpy")
    breakdown = break_down(events, CALL, on_gpu=True)
    assert parts(breakdown) == micro(vision=300, tokens=100, llm=370, overhead=230)
    assert breakdown.wall == pytest.approx(1000e-6)


def test_what_our_operators_launch_is_token_processing_wherever_they_run():
    events = call(0, 100, [(VISION, 0), (TOKENS, 60), (LLM, 70)])
    events += [event("cpu_op", "earlytom::merge_frames", 20, 30)]
    events += launched(1, 5, 10, 30) + launched(2, 25, 30, 45) + launched(3, 31, 45, 60)
    events += launched(4, 25, 60, 62, tid=OTHER)  # another thread launches nothing for an operator of this one
    events += launched(5, 65, 65, 70) + launched(6, 75, 75, 80)
    assert parts(break_down(events, CALL, on_gpu=True)) == micro(vision=37, tokens=20, llm=5, overhead=38)


def test_two_streams_at_once_count_once_for_the_one_that_began_first():
    events = call(0, 100, [(VISION, 0), (TOKENS, 20), (LLM, 40)])
    events += launched(1, 1, 10, 40) + launched(2, 21, 30, 60) + launched(3, 41, 50, 55) + launched(4, 42, 60, 90)
    assert parts(break_down(events, CALL, on_gpu=True)) == micro(vision=30, tokens=20, llm=30, overhead=20)


def test_a_kernel_whose_launch_was_not_recorded_belongs_with_the_one_before():
    events = call(0, 100, [(VISION, 0), (TOKENS, 10), (LLM, 20)])
    events += launched(1, 1, 30, 40) + launched(2, 11, 50, 60)
    events += [event("kernel", "lost", 40, 50, 7, correlation=98), event("kernel", "later", 60, 65, 7, correlation=99)]
    assert parts(break_down(events, CALL, on_gpu=True)) == micro(vision=20, tokens=15, llm=0, overhead=65)


def test_other_calls_in_the_trace_do_not_matter():
    events = call(0, 100, [(VISION, 0), (TOKENS, 30), (LLM, 60)]) + launched(1, 10, 20, 50)
    alone = break_down(events, CALL, on_gpu=True)
    events += [event("user_annotation", "inductor", 200, 300), *launched(2, 210, 220, 290)]
    events += [event("gpu_user_annotation", CALL, 20, 50), {"ph": "M", "name": "process_name"}]
    assert break_down(events, CALL, on_gpu=True) == alone
    with pytest.raises(ValueError, match="no range 'other'"):
        break_down(events, "other", on_gpu=True)


def test_a_device_that_recorded_nothing_leaves_only_the_wall_time():
    breakdown = break_down(call(0, 100, [(VISION, 0), (TOKENS, 30), (LLM, 60)]), CALL, on_gpu=True)
    assert (breakdown.stages, breakdown.overhead) == (None, None)
    assert breakdown.parts == {NOT_SEPARABLE: breakdown.wall} and breakdown.wall == pytest.approx(100e-6)


@pytest.mark.parametrize("seen", [[], [TOKENS], [LLM], [VISION, LLM]])
def test_stages_that_never_showed_where_they_begin_are_not_guessed(seen):
    events = call(0, 100, [(stage, 10) for stage in seen]) + [event("cpu_op", "aten::mm", 20, 60)]
    breakdown = break_down(events, CALL, on_gpu=False)
    assert breakdown.stages is None and breakdown.parts == pytest.approx({NOT_SEPARABLE: 40e-6, OVERHEAD: 60e-6})


def test_on_a_cpu_operators_and_compiled_graphs_are_work_and_the_rest_is_overhead():
    events = call(0, 1000, [(VISION, 0), (TOKENS, 300), (LLM, 500)])
    events += [
        event("cpu_op", "Torch-Compiled Region: 0/0", 10, 800),
        event("cpu_op", "## Call CompiledFxGraph fabc", 100, 600),  # vision, then the projector, then the LLM
        event("cpu_op", "aten::addmm", 110, 200),
        event("cpu_op", "earlytom::frame_similarity", 250, 270),
        event("cpu_op", "aten::mm", 255, 265),
        event("cpu_op", "aten::argmax", 900, 950),
    ]
    expected = micro(vision=180, tokens=220, llm=150, overhead=450)
    assert parts(break_down(events, CALL, on_gpu=False)) == expected


LENGTH = 40
moments = st.integers(0, LENGTH)
spans = st.tuples(moments, moments).map(sorted).filter(lambda span: span[0] < span[1])
operators = st.tuples(st.sampled_from(["aten::mm", "earlytom::merge_frames"]), spans)
beginnings = st.lists(st.tuples(st.sampled_from(STAGES), moments), max_size=5, unique_by=lambda begun: begun[1])


def stage_at(tick, stages, ours):
    if any(begin <= tick < end for begin, end in ours):
        return TOKENS
    begun = [(at, stage) for stage, at in stages if at <= tick]
    return max(begun)[1] if begun else VISION


@given(beginnings, st.lists(operators, max_size=8))
def test_on_a_cpu_every_tick_is_counted_as_if_by_hand(stages, ops):
    stages = [*stages, (TOKENS, LENGTH), (LLM, LENGTH)]
    events = call(0, LENGTH, stages) + [event("cpu_op", name, *span) for name, span in ops]
    ours = [span for name, span in ops if name.startswith("earlytom")]
    expected = dict.fromkeys(STAGES, 0)
    for tick in range(LENGTH):
        if any(begin <= tick < end for _, (begin, end) in ops):
            expected[stage_at(tick, stages, ours)] += 1
    breakdown = break_down(events, CALL, on_gpu=False)
    assert breakdown.stages == pytest.approx({stage: 1e-6 * ticks for stage, ticks in expected.items()}, abs=1e-12)
    assert sum(breakdown.parts.values()) == pytest.approx(breakdown.wall)


@given(beginnings, st.lists(st.tuples(moments, spans), max_size=8))
def test_on_a_gpu_every_tick_is_counted_as_if_by_hand(stages, kernels):
    stages = [*stages, (TOKENS, LENGTH), (LLM, LENGTH)]
    kernels = sorted((span, at) for at, span in kernels)
    events = call(0, LENGTH, stages)
    for number, (span, at) in enumerate(kernels):
        events += launched(number, at, *span)
    expected = dict.fromkeys(STAGES, 0)
    running = None
    for tick in range(LENGTH if kernels else 0):
        # The one that is already counted stays until it ends; then the one that began first.
        if running is None or running[0][1] <= tick:
            running = next((kernel for kernel in kernels if kernel[0][0] <= tick < kernel[0][1]), None)
        if running:
            expected[stage_at(running[1], stages, [])] += 1
    breakdown = break_down(events, CALL, on_gpu=True)
    if kernels:
        # Of two that began at once either may be counted: then only their sum is known.
        begins = [span[0] for span, _ in kernels]
        assert sum(breakdown.stages.values()) == pytest.approx(1e-6 * sum(expected.values()))
        if len(set(begins)) == len(begins):
            assert breakdown.stages == pytest.approx({k: 1e-6 * v for k, v in expected.items()}, abs=1e-12)
        assert min(breakdown.parts.values()) >= 0 and sum(breakdown.parts.values()) == pytest.approx(breakdown.wall)
    else:
        assert breakdown.stages is None


@pytest.mark.parametrize("device, other", [(0, 1), (1, 0)])
def test_peaks_of_memory_begin_with_what_earlier_stages_left(device, other):
    events = call(100, 1000, [(VISION, 100), (TOKENS, 400), (LLM, 700)])
    events += [allocated(50, 700, 5000, device)]  # weights: before the call
    events += [allocated(150, 300, 5300, device), allocated(200, -200, 5100, device)]
    events += [allocated(500, -60, 5040, device), allocated(510, 10, 5050, device)]
    events += [allocated(800, 100, 5150, device), allocated(1100, 999, 6149, device)]  # the last one after the call
    events += [allocated(300, 9999, 9999, other)]
    breakdown = break_down(events, CALL, on_gpu=device == 1)
    assert breakdown.memory == 300 and breakdown.stage_memory == {VISION: 300, TOKENS: 100, LLM: 150}


def test_without_stages_the_peak_is_that_of_the_call():
    events = [*call(0, 100, [(VISION, 0)]), allocated(10, 8, 8), allocated(20, -8, 0)]
    breakdown = break_down(events, CALL, on_gpu=False)
    assert breakdown.memory == 8 and breakdown.stage_memory is None
    assert break_down(call(0, 100, []), CALL, on_gpu=False).memory is None
