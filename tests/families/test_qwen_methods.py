"""What other papers' methods are given of a Qwen model's video, and what they leave of it. Their rules themselves are
tested with other models."""

import pytest
import torch
from generating import share_vision_paths
from oracle_qwen import encoded_whole
from qwen_calls import WIDE, model_of, supported, twin_of
from tiny_qwen import PLAIN_KINDS, Clip, qwen_inputs
from torch.testing import assert_close

import earlytom_compile
from earlytom_compile.methods.base import FrameTokens
from earlytom_compile.methods.registry import method_named

METHODS = ("dycoke", "fastvid", "holitom", "prunevid", "visionzip")
RATIO = 0.2


@pytest.fixture(scope="module", params=supported(PLAIN_KINDS, long=("qwen3_5",)))
def kind(request, one_trace):
    with pytest.MonkeyPatch.context() as patch:
        share_vision_paths(one_trace, patch)
        yield request.param
    earlytom_compile.restore(model_of(request.param))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "visionzip" else pytest.mark.long) for name in METHODS]
)
def test_they_see_tokens_row_by_row_and_leave_features_of_all_layers(kind, name):
    """Tokens are judged and merged by the last layer's features; what DeepStack adds is that of the place."""
    model, method, clip = model_of(kind), method_named(name), Clip(9, *WIDE, scenes=2)
    inputs = qwen_inputs(model, [[3, clip, 4]])
    pixels, grids = inputs["pixel_values_videos"], inputs["video_grid_thw"]
    earlytom_compile.compile(model, method=name, retain_ratio=RATIO, lowering="eager")
    (rows,) = earlytom_compile.encode_videos(model, pixels, video_grid_thw=grids)
    seen = encoded_whole(twin_of(kind), pixels, grids[0], method.scored_layer)
    tokens, places = method.keep(FrameTokens(*seen[:3]), round(RATIO * 9 * clip.tokens))
    frame, token = places.unbind(1)
    expected = torch.cat([tokens, *(states[frame, token] for states in seen[3])], dim=1)
    assert_close(rows, expected, atol=1e-4, rtol=1e-4)
