"""The stand-in processor gives what transformers' own gives: same tokens, same pixels, bit for bit.

Where torchvision imports, as in the environment of `make test`, the two are run side by side, and every command
goes through transformers' own. Where it does not, as in those of `make test-matrix`, transformers' class cannot be
built, and the stand-in is held against (1) the method of that class that counts placeholders, called on a
stub, and (2) numbers recorded from that class: ``recorded_processor.json`` says with which versions.
"""

import base64
import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from earlytom_compile import EarlyTomConfigError
from earlytom_compile.integrations.preprocess import (
    PixelSettings,
    VideoTextProcessor,
    conversation,
    load_processor,
)

RECORDED = json.loads((Path(__file__).parent / "recorded_processor.json").read_text())
HAVE_TORCHVISION = importlib.util.find_spec("torchvision") is not None


def noise_video(frames, height, width, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (frames, height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def processor(checkpoint):
    return VideoTextProcessor.from_pretrained(str(checkpoint))


def test_the_numbers_recorded_from_transformers_processor(processor):
    prompt = processor.apply_chat_template(conversation(RECORDED["question"]), add_generation_prompt=True)
    inputs = processor(text=prompt, videos=noise_video(*RECORDED["video"]), return_tensors="pt")

    assert prompt == RECORDED["prompt"]
    assert inputs["input_ids"].tolist() == RECORDED["input_ids"]
    pixels = inputs["pixel_values_videos"]
    assert list(pixels.shape) == RECORDED["shape"] and pixels.dtype == torch.float32
    levels = torch.frombuffer(bytearray(base64.b64decode(RECORDED["levels"])), dtype=torch.uint8)
    # The checkpoint's mean and standard deviation are 0.5, so level n is (n - 127.5) / 127.5.
    assert torch.equal(pixels.flatten(), (levels.float() - 127.5) / 127.5)


@pytest.mark.parametrize("patches", [1, 9, 36, 196, 729])
@pytest.mark.parametrize("frames", [1, 3, 32])
def test_placeholders_are_counted_as_transformers_counts_them(processor, patches, frames):
    theirs = LlavaOnevisionProcessor.replace_video_token(
        SimpleNamespace(num_image_tokens=patches, video_token="<video>"),
        {"pixel_values_videos": [torch.zeros(frames, 3, 2, 2)]},
        0,
    )
    side = -(-int(patches**0.5) // 2)
    ours = VideoTextProcessor(processor.tokenizer, PixelSettings({}), side * side, "<video>", None)

    assert ours._expand(["a <video> b"], [noise_video(frames, 2, 2)]) == [f"a {theirs} b"]


@pytest.mark.skipif(not HAVE_TORCHVISION, reason="transformers' processor needs torchvision")
@pytest.mark.parametrize("height, width", [(60, 80), (48, 48), (500, 301), (10, 7)])
def test_side_by_side_with_transformers_processor(checkpoint, processor, height, width):
    theirs = load_processor(str(checkpoint))
    assert isinstance(theirs, LlavaOnevisionProcessor)
    texts = ["<video> then <video> and", "<video>"]
    videos = [noise_video(3, height, width, seed) for seed in range(3)]

    expected = theirs(text=texts, videos=videos, return_tensors="pt", padding=True)
    inputs = processor(text=texts, videos=videos, return_tensors="pt", padding=True)

    assert set(inputs) == set(expected)
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)


def test_settings_are_found_wherever_a_checkpoint_keeps_them(checkpoint, processor, tmp_path):
    expected = processor(text="<video>", videos=noise_video(2, 30, 40), return_tensors="pt")
    for layout in (_nested, _image_settings_only):
        folder = tmp_path / layout.__name__
        shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        layout(folder)
        other = VideoTextProcessor.from_pretrained(str(folder))

        inputs = other(text="<video>", videos=noise_video(2, 30, 40), return_tensors="pt")
        assert torch.equal(inputs["pixel_values_videos"], expected["pixel_values_videos"])
        assert torch.equal(inputs["input_ids"], expected["input_ids"])
        assert other.chat_template == processor.chat_template


def _nested(folder):
    """As transformers 5 saves a processor: everything in one file."""
    settings = json.loads((folder / "video_preprocessor_config.json").read_text())
    processor = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({**processor, "video_processor": settings}))
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        (folder / name).unlink()


def _image_settings_only(folder):
    """As the first LLaVA-OneVision checkpoints: one file for images and videos, the template as JSON."""
    (folder / "video_preprocessor_config.json").unlink()
    (folder / "processor_config.json").unlink()
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))


def test_channels_first_frames_are_the_same_video(processor):
    video = noise_video(2, 20, 30)
    first = torch.from_numpy(video).permute(0, 3, 1, 2)

    assert torch.equal(processor.pixels.apply(video), processor.pixels.apply(first))


def test_rows_and_videos_in_reading_order(processor):
    videos = [noise_video(2, 20, 30, seed) for seed in range(3)]
    inputs = processor(text=["<video> a <video>", "b <video>"], videos=videos, return_tensors="pt", padding=True)

    each = 2 * processor.tokens_per_frame + 1
    placeholder = processor.tokenizer.convert_tokens_to_ids("<video>")
    assert (inputs["input_ids"] == placeholder).sum(1).tolist() == [2 * each, each]
    assert inputs["pixel_values_videos"].shape[:2] == (3, 2)


@pytest.mark.parametrize(
    "text, videos, message",
    [
        ("no placeholder", [noise_video(2, 8, 8)], "has 0 <video> but 1 video"),
        ("<video> <video>", [noise_video(2, 8, 8)], "has 2 <video> but 1 video"),
        ("<video> <video>", [noise_video(2, 8, 8), noise_video(3, 8, 8)], r"videos of \[2, 3\] frames"),
        ("<video>", [noise_video(2, 8, 8).astype(np.float32)], "must be uint8"),
        ("<video>", [noise_video(2, 8, 8)[0]], "must be uint8 frames"),
    ],
)
def test_what_does_not_fit_is_named(processor, text, videos, message):
    with pytest.raises(EarlyTomConfigError, match=message):
        processor(text=text, videos=videos, return_tensors="pt")


@pytest.mark.parametrize("settings", [{"size": {"shortest_edge": 48}}, {"resample": 1}, {"do_center_crop": True}])
def test_settings_that_take_torchvision_are_refused(settings):
    with pytest.raises(EarlyTomConfigError, match="torchvision"):
        PixelSettings.from_settings(settings)


def test_without_torchvision_the_stand_in_is_loaded(checkpoint, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert isinstance(load_processor(str(checkpoint)), VideoTextProcessor)


def test_a_broken_torchvision_is_named(checkpoint, tmp_path, monkeypatch):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "torchvision", raising=False)

    with pytest.raises(EarlyTomConfigError, match="nms does not exist.*Uninstall torchvision"):
        load_processor(str(checkpoint))
