"""Frames made small as they are decoded are what the processor makes of large ones, bit for bit; few stay in memory."""

import gc
import importlib.util
import io
import tracemalloc
from itertools import count

import av
import numpy as np
import pytest
import torch
from effort import examples
from films import turn, write_film
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tiny_checkpoint import TinySize, write_checkpoint

from earlytom_compile import EarlyTomConfigError
from earlytom_compile.cli.loading import Loaded, prepare_inputs
from earlytom_compile.integrations.preprocess import (
    PixelSettings,
    VideoTextProcessor,
    conversation,
    frame_resizer,
    load_processor,
)
from earlytom_compile.integrations.video import read_video

HAVE_TORCHVISION = importlib.util.find_spec("torchvision") is not None
needs_torchvision = pytest.mark.skipif(not HAVE_TORCHVISION, reason="transformers' processor needs torchvision")
sides = st.integers(1, 150)


def noise(height, width, frames=2):
    return np.random.RandomState(0).randint(0, 256, (frames, height, width, 3), dtype=np.uint8)


@examples(40)
@given(height=sides, width=sides, to=st.tuples(sides, sides), resample=st.sampled_from([2, 3]), resize=st.booleans())
def test_our_processor_gives_the_same_for_resized_frames(height, width, to, resample, resize):
    settings = PixelSettings({"height": to[0], "width": to[1]}, resample=resample, do_resize=resize)
    frames = noise(height, width)
    small = np.stack([frame_resizer(VideoTextProcessor(None, settings, 1, "<video>", None))(frame) for frame in frames])

    assert small.dtype == np.uint8 and small.shape[1:3] == (to if resize else (height, width))
    assert torch.equal(settings.apply(small), settings.apply(frames))


@needs_torchvision
@examples(40)
@given(
    height=st.integers(20, 150),
    width=st.integers(20, 150),
    size=st.sampled_from(
        [{"height": 30, "width": 40}, {"shortest_edge": 32}, {"shortest_edge": 32, "longest_edge": 50}]
    ),
    crop=st.sampled_from([None, {"height": 24, "width": 24}]),
    resample=st.sampled_from([2, 3]),
)
def test_transformers_processor_gives_the_same_for_resized_frames(height, width, size, crop, resample):
    from transformers import LlavaOnevisionVideoProcessor

    processor = LlavaOnevisionVideoProcessor(
        size=size, crop_size=crop, do_center_crop=crop is not None, resample=resample
    )
    frames = noise(height, width)
    small = np.stack([frame_resizer(processor)(frame) for frame in frames])

    assert small.dtype == np.uint8
    expected, given_small = (processor(videos=[each], return_tensors="pt") for each in (frames, small))
    assert torch.equal(given_small["pixel_values_videos"], expected["pixel_values_videos"])


class NoModel:
    device, dtype = torch.device("cpu"), torch.float32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    size = TinySize(image=48, patch=8, vision_layers=1, vision_width=32, text_layers=1, text_width=32)
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), size)


@pytest.fixture(params=["transformers' own", "ours"])
def processor(request, checkpoint):
    if request.param == "ours":
        return VideoTextProcessor.from_pretrained(str(checkpoint))
    if not HAVE_TORCHVISION:
        pytest.skip("transformers' processor needs torchvision")
    return load_processor(str(checkpoint))


def prepared(processor, path, **options):
    console = Console(file=io.StringIO())
    return prepare_inputs(Loaded(NoModel(), processor), path, "what ?", progress_on=console, **options)


def test_inputs_are_those_of_the_frames_at_full_size(tmp_path, processor):
    path = turn(write_film(tmp_path / "x.mp4", 20), (0, 1, -1, 0))
    prompt = processor.apply_chat_template(conversation("what ?"), add_generation_prompt=True)
    expected = processor(text=prompt, videos=read_video(path, 5).pixels, return_tensors="pt")

    inputs = prepared(processor, path, frames=5)
    assert all(torch.equal(inputs[name], expected[name]) for name in inputs)


def test_a_short_video_is_an_error_only_for_a_number_that_was_given(tmp_path, processor):
    path = write_film(tmp_path / "x.mp4", 6)
    for options, frames in (({}, 6), ({"default_frames": 4}, 4)):
        assert prepared(processor, path, frames=None, **options)["pixel_values_videos"].shape[1] == frames
    with pytest.raises(EarlyTomConfigError, match="has 6 frame.* fewer than the 7 asked for"):
        prepared(processor, path, frames=7)


def test_large_frames_are_let_go_one_by_one(tmp_path):
    path = turn(write_film(tmp_path / "x.mp4", 80, options={"preset": "ultrafast"}), (0, 1, -1, 0))
    alive, calls = [], count()

    def resize(frame):
        if next(calls) % 13 == 12:  # a look at everything in memory takes long
            alive.append(sum(isinstance(each, av.VideoFrame) for each in gc.get_objects()))
        return frame[:8, :8]

    gc.collect()
    gc.disable()
    try:
        read_video(path, 40, resize=resize)
    finally:
        gc.enable()
    assert len(alive) == 3 and max(alive) <= 8


def test_a_video_is_in_memory_once(tmp_path):
    path = write_film(tmp_path / "x.mp4", 40, size=(320, 240), options={"preset": "ultrafast"})
    tracemalloc.start()
    try:
        size = read_video(path, 40).pixels.nbytes
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.3 * size
