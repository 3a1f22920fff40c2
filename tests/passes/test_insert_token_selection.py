"""The options of token selection reach its operator, and the operator what it selects from."""

import pytest
import torch

from earlytom_compile.methods import registry
from earlytom_compile.methods.base import Kept, Method

OPERATORS = {"paper": torch.ops.earlytom.select_tokens, "released": torch.ops.earlytom.select_tokens_released}


@pytest.mark.parametrize("static_selection", ["device", "host", "auto"])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_says_where_static_frames_are_selected(rewritten, variant, static_selection):
    state = rewritten(variant=variant, static_selection=static_selection)
    (select,) = (node for node in state.graph_module.graph.nodes if node.target is OPERATORS[variant].default)
    assert select.kwargs == {"static_selection": static_selection}


@pytest.mark.parametrize("static_selection", ["device", "host", "auto"])
def test_representatives_come_from_features_and_counts_alone(rewritten, static_selection):
    options = {"variant": "plus", "static_selection": static_selection, "retain_ratio": 0.3}
    state = rewritten(**options)
    operator = torch.ops.earlytom.select_representatives.default
    (select,) = (node for node in state.graph_module.graph.nodes if node.target is operator)
    budget = state.config.token_budget(8, state.boundary.tokens)
    assert select.args == (state.boundary.features, state.video.counts[-1], budget) and not select.kwargs
    assert state.selected.budget == budget and state.selected.kept_counts is None


def nodes_of(state, name):
    return [node for node in state.graph_module.graph.nodes if str(node.target) == f"earlytom.{name}.default"]


METHOD = {"variant": None, "method": "visionzip", "merge_layers": None, "tau_seg": None, "retain_ratio": 0.3}


def test_another_method_reads_what_it_asks_for_and_nothing_merges(rewritten):
    state = rewritten(**METHOD)
    (keep,) = nodes_of(state, "keep_by_method")
    budget = state.config.token_budget(8, state.boundary.tokens)
    features, importance, keys, counts, given, method = keep.args
    assert (features, counts, given, method) == (state.boundary.features, state.video.counts[-1], budget, "visionzip")
    assert [importance.op, keys.op] == ["call_method"] * 2  # carried from patches to tokens
    assert state.inserted == {"attention_received": 1, "keep_by_method": 1, "keep_positions": 1, "take_positions": 1}
    assert state.selected.budget == budget and state.selected.kept_counts is None
    assert state.video.counts == (counts,) and not state.video.plans and state.video.dynamic is None


def first_tokens(video, budget):
    places = torch.tensor([[place // 4, place % 4] for place in range(budget)])
    return Kept(video.features.flatten(0, 1)[:budget], places)


@pytest.mark.parametrize("asks", [{}, {"importance": True}, {"keys": True}])
def test_what_no_method_asks_for_is_not_computed(rewritten, monkeypatch, asks):
    mine = Method(name="mine", paper="none", keep=first_tokens, **asks)
    monkeypatch.setitem(registry._registered, "mine", mine)
    state = rewritten(**METHOD | {"method": "mine"})
    (keep,) = nodes_of(state, "keep_by_method")
    assert [keep.args[1] is not None, keep.args[2] is not None] == ["importance" in asks, "keys" in asks]
    assert len(nodes_of(state, "attention_received")) == ("importance" in asks)
    means = [node for node in state.graph_module.graph.nodes if node.target is torch.mean]
    assert len(means) == ("keys" in asks)


@pytest.mark.parametrize("variant", ["paper", "released", "plus"])
def test_without_another_method_its_operator_is_in_no_graph(rewritten, variant):
    state = rewritten(variant=variant)
    assert not nodes_of(state, "keep_by_method") and state.video.keys is None
