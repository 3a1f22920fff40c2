"""Operators noted in a call are those it called, and a replay calls them again and nothing else."""

import math

import torch
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

from earlytom_compile.benchmarks.replay import record, replay

ops = torch.ops.earlytom
OPTIONS = {"variant": "paper", "tau_seg": 0.0, "alpha": 0.9, "max_window": 0, "tau_merge": math.nan, "min_frames": 1}


def merge_layer(hidden):
    """[T, S, D]; the input is gone afterwards, as memory is that others use again."""
    source, weight, counts = ops.plan_merge(ops.frame_similarity(hidden, 5), torch.tensor([len(hidden)]), **OPTIONS)
    (merged,) = ops.merge_frames([2 * hidden], source, weight, int(counts.sum()))
    hidden.zero_()
    return merged


def test_notes_every_call_in_order_with_the_values_of_that_moment():
    hidden = torch.randn(1, 3, 4).repeat(6, 1, 1)
    calls = record(lambda: merge_layer(hidden))
    assert [call.name for call in calls] == ["frame_similarity", "plan_merge", "merge_frames"]
    assert not hidden.any() and calls[0].args[0].any()
    merged = calls[2].operator(*calls[2].args)[0]
    assert len(merged) < 6
    assert_close(merged, 2 * calls[0].args[0][: len(merged)])  # a still video


def test_a_replay_makes_the_same_calls():
    calls = record(lambda: merge_layer(torch.randn(6, 3, 4)))
    again = record(lambda: replay(calls))
    assert [call.name for call in again] == [call.name for call in calls]
    for one, other in zip(calls, again, strict=True):
        assert_close(one.args, other.args, atol=0, rtol=0)
        assert one.kwargs.keys() == other.kwargs.keys()


def test_compiled_code_runs_as_it_does_otherwise():
    counter = CompileCounter()
    similarity = torch.compile(lambda x: ops.frame_similarity(x + 1, 2) * 2, backend=counter)
    calls = record(lambda: similarity(torch.randn(3, 2, 4)))
    assert counter.frame_count == 1 and [call.name for call in calls] == ["frame_similarity"]
