"""What rides along with merged frames, and where the graph may be cut around a merge."""

import torch

from earlytom_compile.passes.split_stages import split_stages

ops = torch.ops.earlytom


def calls(graph_module, operator):
    return [node for node in graph_module.graph.nodes if node.target is operator.default]


def test_importance_rides_in_the_last_merge_only(rewritten):
    graph_module = rewritten(merge_layers=(0, 1, 2)).graph_module
    merges = calls(graph_module, ops.merge_frames)
    assert [len(merge.args[0]) for merge in merges] == [1, 1, 2]
    (importance,) = calls(graph_module, ops.attention_received)
    assert merges[-1].args[0][1] is importance and list(importance.users) == [merges[-1]]


def test_plus_merges_as_paper_and_nothing_rides_along(rewritten):
    graph_module = rewritten(merge_layers=(0, 1, 2), variant="plus").graph_module
    assert [len(merge.args[0]) for merge in calls(graph_module, ops.merge_frames)] == [1, 1, 1]
    assert {plan.kwargs["variant"] for plan in calls(graph_module, ops.plan_merge)} == {"paper"}


def test_without_a_merge_importance_is_read_as_it_is(rewritten):
    graph_module = rewritten(2).graph_module
    assert not calls(graph_module, ops.merge_frames) and calls(graph_module, ops.attention_received)


def test_pieces_of_the_graph_read_merged_tensors_and_never_the_list_of_them(rewritten):
    state = rewritten()
    _, pieces = split_stages(state.graph_module, state.boundary.encoder.blocks)
    merging = [piece for piece in pieces if calls(piece.graph_module, ops.merge_frames)]
    assert len(merging) == 2 and not any(piece.computes for piece in merging)
    assert all(isinstance(value, (torch.Tensor, torch.SymInt, int)) for piece in pieces for value in piece.inputs)
