"""Encoders and video paths are found by structure, and only by structure."""

from itertools import product

import pytest
from effort import cases
from hand_made import VIDEO, VideoModel, capture
from tiny_models import tiny_llava_onevision, video_inputs

from earlytom_compile.passes.find_video_boundary import find_video_boundary
from earlytom_compile.passes.find_vision_encoder import GraphView, find_vision_encoder
from earlytom_compile.passes.patterns import op_name, shape_of
from earlytom_compile.passes.reasons import NotApplicable


def viewed(model, **example):
    """What the finders look at, of one call."""
    return GraphView(capture(model, *model.example(**example)))


def encoders_of(model, **example):
    return find_vision_encoder(viewed(model, **example)).encoders


def boundary_of(model, **example):
    view = viewed(model, **example)
    return find_video_boundary(view, find_vision_encoder(view).encoders)


@pytest.mark.parametrize(
    "layers, gated_mlp", cases((1, False), (5, True), among=list(product([1, 2, 5], [False, True])))
)
def test_finds_the_chain_and_not_the_language_model(layers, gated_mlp):
    (encoder,) = encoders_of(VideoModel(layers=layers, gated_mlp=gated_mlp))
    assert len(encoder.blocks) == layers
    for block, following in zip(encoder.blocks, encoder.blocks[1:], strict=False):
        assert block.output is following.input
    assert op_name(encoder.blocks[0].attention) == "scaled_dot_product_attention"
    assert "layers" in encoder.name


@pytest.mark.parametrize("switch", [{"attention": "causal"}, {"post_norm": True}])
def test_other_blocks_are_not_encoders(switch):
    assert encoders_of(VideoModel(layers=2, **switch)) == []


def test_layers_of_another_shape_end_the_chain():
    model = VideoModel(layers=4)
    model.layers[2].heads = 4
    lengths = [len(encoder.blocks) for encoder in encoders_of(model)]
    assert lengths == [2]  # the third begins where a block ends, so it starts no chain of its own


@pytest.mark.long  # test_backend.py compresses it
def test_real_model():
    model = tiny_llava_onevision(vision_layers=4, text_layers=2)
    view = GraphView(capture_llava(model, video_inputs(model, 6)))
    (encoder,) = find_vision_encoder(view).encoders
    assert encoder.name == "model.vision_tower.encoder.layers" and len(encoder.blocks) == 4
    boundary = find_video_boundary(view, [encoder])
    assert (boundary.videos, boundary.frames, boundary.tokens, boundary.rows_of(6)) == (1, 6, 9, 55)
    assert boundary.placeholders.token == model.config.video_token_id


@pytest.mark.long  # test_backend.py compresses a video beside an image
def test_images_are_told_from_videos():
    model = tiny_llava_onevision(vision_layers=2, text_layers=1)
    inputs = video_inputs(model, 5, images_per_row=(1,))
    inputs["image_sizes"] = inputs["image_sizes"].tolist()
    view = GraphView(capture_llava(model, inputs))
    encoders = find_vision_encoder(view).encoders
    assert len(encoders) == 2
    boundary = find_video_boundary(view, encoders)
    assert boundary.frames == 5 and boundary.placeholders.token == model.config.video_token_id


@pytest.mark.parametrize(
    "pool, newline, frames, videos",
    cases(
        ("avg", False, 1, 1), ("bilinear", True, 1, 3), ("avg", True, 4, 1), ("bilinear", False, 8, 3),
        among=list(product(["avg", "bilinear"], [False, True], [1, 4, 8], [1, 3])),
    ),
)  # fmt: skip
def test_boundary(pool, newline, frames, videos):
    model = VideoModel(layers=2, pool=pool, newline=newline)
    boundary = boundary_of(model, frames=frames, videos=videos)
    assert (boundary.videos, boundary.frames, boundary.tokens) == (videos, frames, 4)
    assert shape_of(boundary.features) == (videos * frames, 4, 12)
    assert shape_of(boundary.flat) == (videos, frames * 4, 12)
    assert (boundary.separator is not None) == newline
    assert boundary.placeholders.token == VIDEO


def test_features_only():
    boundary = boundary_of(VideoModel(layers=2, newline=True, tail="features"))
    assert boundary.placeholders is None and boundary.rows is None and boundary.separator is not None


def test_without_pooling_every_patch_is_a_token():
    boundary = boundary_of(VideoModel(layers=2, pool="none"))
    assert boundary.tokens == 16 and shape_of(boundary.flat) == (1, 8 * 16, 12)


@pytest.mark.parametrize("after", [0, 2])
def test_what_only_the_caller_gets_is_no_other_way(after):
    view = viewed(VideoModel(layers=4, beside="returned", after=after))
    (encoder,) = find_vision_encoder(view).encoders
    assert len(encoder.blocks) == 4
    assert find_video_boundary(view, [encoder]).encoder.blocks == encoder.blocks[: 4 - after]


@pytest.mark.parametrize("after", [0, 1])
def test_a_second_way_into_the_language_model_is_not_understood(after):
    with pytest.raises(NotApplicable, match="flow into Tensor.mean"):
        boundary_of(VideoModel(layers=3, beside="used", after=after))


def test_features_that_go_elsewhere_have_a_reason():
    with pytest.raises(NotApplicable, match="flow into mean"):
        boundary_of(VideoModel(layers=2, tail="mean"))


def capture_llava(model, inputs):
    import torch

    from earlytom_compile.families.registry import make_traceable

    graphs = []

    def backend(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module.forward

    make_traceable()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(**inputs)
    graphs[0].graph.eliminate_dead_code()
    return graphs[0]
