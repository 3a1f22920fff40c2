"""The options of token selection reach its operator, and the operator what it selects from."""

import pytest
import torch
from hand_made import VideoModel
from test_rewrites import rewrite

OPERATORS = {"paper": torch.ops.earlytom.select_tokens, "released": torch.ops.earlytom.select_tokens_released}


@pytest.mark.parametrize("static_selection", ["device", "host", "auto"])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_says_where_static_frames_are_selected(variant, static_selection):
    model = VideoModel().eval()
    state = rewrite(model, model.example(frames=8), variant=variant, static_selection=static_selection)
    (select,) = (node for node in state.graph_module.graph.nodes if node.target is OPERATORS[variant].default)
    assert select.kwargs == {"static_selection": static_selection}


@pytest.mark.parametrize("static_selection", ["device", "host", "auto"])
def test_representatives_come_from_features_and_counts_alone(static_selection):
    model = VideoModel().eval()
    options = {"variant": "plus", "static_selection": static_selection, "retain_ratio": 0.3}
    state = rewrite(model, model.example(frames=8), **options)
    operator = torch.ops.earlytom.select_representatives.default
    (select,) = (node for node in state.graph_module.graph.nodes if node.target is operator)
    budget = state.config.token_budget(8, state.boundary.tokens)
    assert select.args == (state.boundary.features, state.video.counts[-1], budget) and not select.kwargs
    assert state.selected.budget == budget and state.selected.kept_counts is None
