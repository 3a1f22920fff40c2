"""The options of token selection reach its operator."""

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
