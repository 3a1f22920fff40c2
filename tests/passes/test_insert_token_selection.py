"""The options of token selection reach its operator, and the operator what it selects from."""

import pytest
import torch

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
