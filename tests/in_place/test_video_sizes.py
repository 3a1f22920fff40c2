"""Videos of many sizes: so many are compiled, the others compressed as they are, and what is kept is bounded."""

import warnings

import pytest
import torch

from earlytom_compile import EarlyTomConfig, EarlyTomFallbackWarning
from earlytom_compile.families.base import Family, Video
from earlytom_compile.integrations import video_encoder
from earlytom_compile.integrations.vision_path import traced_arguments
from earlytom_compile.reporting import GraphRecord


class Path:
    """In the place of a vision path: what it was made with."""

    def __init__(self, family, config, any_length, kinds, cause):
        self.lowering, self.cause, self.graphs = config.lowering, cause, []


@pytest.fixture
def encoder(monkeypatch):
    monkeypatch.setattr(video_encoder, "VisionPath", Path)
    return video_encoder.VideoEncoder(torch.nn.Linear(2, 2), EarlyTomConfig(), Family(), GraphRecord("", False))


def path(encoder, size, frames=4):
    video = Video(torch.zeros(frames, size, 3), {"height": size}, {"cos": torch.zeros(size, 2)}, f"{size} patches")
    return encoder._path(video, frames > 1, ())


def test_the_first_sizes_are_compiled_and_others_are_not(encoder):
    most = video_encoder.MOST_COMPILED_SIZES
    with warnings.catch_warnings():
        warnings.simplefilter("error", EarlyTomFallbackWarning)
        first = [path(encoder, size) for size in range(1, most + 1)]
        assert [path(encoder, size) for size in range(1, most + 1)] == first
    with pytest.warns(EarlyTomFallbackWarning, match=f"more than {most} sizes came.*Bring videos to a few sizes"):
        further = path(encoder, most + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EarlyTomFallbackWarning)  # said once
        assert path(encoder, most + 2).lowering == "eager" and path(encoder, most + 1) is further
    assert {each.lowering for each in first} == {"staged"} and further.lowering == "eager"
    assert encoder._record.reasons == [
        f"videos of more than {most} sizes came: those of further sizes are compressed and not compiled"
    ]
    assert further.cause.startswith(f"videos of 2 and more frames, {most + 1} patches")


def test_a_single_frame_of_a_compiled_size_is_compiled_too(encoder):
    for size in range(1, video_encoder.MOST_COMPILED_SIZES + 1):
        path(encoder, size)
    assert path(encoder, 3, frames=1).lowering == "staged" and path(encoder, 3, frames=1) is not path(encoder, 3)


def test_what_was_used_last_is_kept(encoder, monkeypatch):
    monkeypatch.setattr(video_encoder, "MOST_SIZES", 3)
    one, two, three = (path(encoder, size) for size in (1, 2, 3))
    assert path(encoder, 1) is one
    path(encoder, 4)  # in the place of the second
    assert path(encoder, 1) is one and path(encoder, 3) is three and path(encoder, 2) is not two
    assert path(encoder, 2).lowering == "staged", "a size that was compiled once may be again"
    assert len(encoder._paths) == 3


def test_options_of_a_preset_stay_as_they_are():
    config = EarlyTomConfig.from_options({"preset": "videomme", "retain_ratio": 0.1})
    twin = config.not_compiled()
    assert twin.lowering == "eager" and config.lowering == "staged"
    assert twin.resolve_merge_layers(12) == config.resolve_merge_layers(12)


def test_tables_are_handed_on_as_they_are():
    table = torch.zeros(5, 2)
    pixels, arguments = traced_arguments(Video(torch.zeros(6, 5, 3), {"height": 5}, {"cos": table}), any_length=True)
    assert arguments["height"] == 5 and arguments["cos"] is table and table._dynamo_static_indices == {0, 1}
    assert pixels.shape == (1, 6, 5, 3)
