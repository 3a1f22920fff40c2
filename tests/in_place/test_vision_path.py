"""What Dynamo is told about the arguments of a vision path, and which videos share one."""

import torch

from earlytom_compile.families.base import Video
from earlytom_compile.integrations.vision_path import describe, kind_of, traced_arguments


def test_tensors_among_the_arguments_have_the_frames_of_the_pixels():
    video = Video(torch.zeros(6, 3, 8, 4), {"grid": torch.zeros(6, 2, dtype=torch.int64), "layer": -2})
    pixels, arguments = traced_arguments(video, any_length=True)
    assert pixels.shape == (1, 6, 3, 8, 4) and arguments["grid"].shape == (1, 6, 2) and arguments["layer"] == -2
    assert pixels._dynamo_static_indices == {0, 2, 3, 4} and arguments["grid"]._dynamo_static_indices == {0, 2}
    assert 1 in arguments["grid"]._dynamo_weak_dynamic_indices
    pixels, _ = traced_arguments(video, any_length=False)
    assert pixels._dynamo_static_indices == {0, 1, 2, 3, 4}


def test_videos_share_a_path_if_nothing_but_their_length_differs():
    def kind(frames=6, size=8, grid=2, layer=-2, any_length=True):
        return kind_of(
            Video(torch.zeros(frames, size), {"grid": torch.zeros(frames, grid), "layer": layer}), any_length
        )

    assert kind() == kind(frames=9) != kind(size=4)
    assert kind() != kind(grid=3) and kind() != kind(layer=-1)
    assert kind(any_length=False) != kind(frames=9, any_length=False)
    assert describe(Video(torch.zeros(1, 3, 8, 4)), False) == "videos of 1 frame, 8x4, float32 on cpu"
    assert describe(Video(torch.zeros(6, 5)), True) == "videos of 2 and more frames, 5, float32 on cpu"
