"""The stand-in processor gives what transformers' own gives: same tokens, same pixels, bit for bit.

Where torchvision imports, as in the environment of `make test`, the two are run side by side, and every command
goes through transformers' own. Where it does not, as in those of `make test-matrix`, transformers' class cannot be
built, and the stand-in is held against (1) the method of that class that counts placeholders, called on a
stub, and (2) numbers recorded from that class: ``recorded_processor.json`` says with which versions.
"""

import base64
import importlib.util
import inspect
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.processing_utils import ImagesKwargs, TextKwargs, VideosKwargs

from earlytom_compile import EarlyTomConfigError
from earlytom_compile.cli import loading
from earlytom_compile.cli.loading import load_model
from earlytom_compile.integrations.call_options import KINDS, option_names, options_by_kind
from earlytom_compile.integrations.preprocess import (
    PixelSettings,
    VideoTextProcessor,
    conversation,
    frames_of,
    load_processor,
)
from earlytom_compile.integrations.video import read_video, sample_indices
from earlytom_compile.toyworld.world import sample_video, write_mp4

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
    pixels = PixelSettings({"height": 2, "width": 2})
    ours = VideoTextProcessor(processor.tokenizer, pixels, side * side, "<video>", None)

    inputs = ours(text="a <video> b", videos=noise_video(frames, 2, 2))
    assert inputs["input_ids"].tolist() == processor.tokenizer([f"a {theirs} b"])["input_ids"]


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
        ("<video>", [noise_video(2, 8, 8).astype(np.float32)], "must be uint8"),
        ("<video>", [noise_video(2, 8, 8)[0, 0]], "must be uint8 frames"),
        ("<video>", 7, "videos: a int; must be uint8 frames"),
        ("<video>", [noise_video(1, 8, 8)[0], noise_video(1, 9, 8)[0]], "all frames of a video must have one size"),
        (None, noise_video(1, 8, 8), "no text came"),
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


# --- The calls that transformers' documentation shows ---------------------------------------------


def turn(*parts, role="user"):
    return {"role": role, "content": [p if isinstance(p, dict) else {"type": "text", "text": p} for p in parts]}


def a_video(source, key="path"):
    return {"type": "video", key: source}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three pictures of different sizes, in files."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, (width, height) in enumerate(((60, 40), (48, 48), (90, 100))):
        Image.fromarray(noise_video(1, height, width, number)[0]).save(folder / f"{number}.png")
    return [folder / f"{number}.png" for number in range(3)]


def test_a_conversation_with_a_file_gives_all_inputs(processor, clip):
    talk = [turn(a_video(str(clip)), "What happens?")]
    inputs = processor.apply_chat_template(
        talk, num_frames=8, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    prompt = processor.apply_chat_template(talk, add_generation_prompt=True)
    expected = processor(text=prompt, videos=read_video(clip, 8).pixels, return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values_videos"}
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    in_kwargs = processor.apply_chat_template(
        talk, tokenize=True, return_dict=True, add_generation_prompt=True, processor_kwargs={"num_frames": 8}
    )
    assert all(torch.equal(in_kwargs[name], expected[name]) for name in expected)
    ids = processor.apply_chat_template(talk, num_frames=8, add_generation_prompt=True, tokenize=True)
    assert torch.equal(ids, expected["input_ids"])
    text = processor.batch_decode(ids, skip_special_tokens=True)
    assert text == [processor.decode(ids[0], skip_special_tokens=True)]
    assert text == processor.post_process_image_text_to_text(ids)


def test_frames_in_every_form_are_one_video(processor, tmp_path):
    video = noise_video(3, 20, 30)
    expected = processor(text="<video>", videos=video)
    files = [str(tmp_path / f"{number}.png") for number in range(3)]
    for file, frame in zip(files, video, strict=True):
        Image.fromarray(frame).save(file)
    pillow = [Image.fromarray(frame) for frame in video]
    for form in (list(video), [video], torch.from_numpy(video), list(torch.from_numpy(video)), pillow, [pillow],
                 video[None], [[video]], [files]):  # fmt: skip
        inputs = processor(text="<video>", videos=form)
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    talk = [turn(a_video(files, "video"), "What?")]
    inputs = processor.apply_chat_template(talk, tokenize=True, return_dict=True)
    assert torch.equal(inputs["pixel_values_videos"], expected["pixel_values_videos"])


def test_frames_are_chosen_from_an_array_as_from_a_file(processor):
    video = noise_video(9, 8, 8)
    inputs = processor(text="<video>", videos=video, num_frames=3)
    assert torch.equal(inputs["pixel_values_videos"][0], processor.pixels.apply(video[[0, 4, 8]]))
    whole = processor(text="<video>", videos=video, num_frames=3, do_sample_frames=False)
    assert whole["pixel_values_videos"].shape[1] == 9


def test_a_batch_of_conversations(processor, clip):
    talks = [[turn(a_video(str(clip)), "What happens?")], [turn("And now, without a video?")]]
    inputs = processor.apply_chat_template(
        talks, num_frames=4, add_generation_prompt=True, tokenize=True, return_dict=True, padding=True,
        padding_side="left",
    )  # fmt: skip
    assert len(inputs["input_ids"]) == 2 and inputs["pixel_values_videos"].shape[:2] == (1, 4)
    assert inputs["attention_mask"][:, -1].all() and not inputs["attention_mask"][1, 0]


def test_videos_of_different_lengths_come_as_a_list(processor):
    videos = [noise_video(2, 20, 30), noise_video(3, 30, 20)]
    inputs = processor(text=["<video> a", "<video> b"], videos=videos, padding=True).to("cpu", torch.float16)
    assert [len(video) for video in inputs["pixel_values_videos"]] == [2, 3]
    assert all(video.dtype == torch.float16 for video in inputs["pixel_values_videos"])
    placeholder = processor.tokenizer.convert_tokens_to_ids("<video>")
    each = [frames * processor.tokens_per_frame + 1 for frames in (2, 3)]
    assert (inputs["input_ids"] == placeholder).sum(1).tolist() == each


def test_text_alone(processor):
    inputs = processor(text="what happens ?")
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert processor.apply_chat_template([turn("Hello")], tokenize=True, return_dict=True)["input_ids"].shape[0] == 1


def image_calls(pictures):
    """(images, text): as in the documentation, one picture, several in a prompt, several prompts."""
    opened = [Image.open(path) for path in pictures]
    return {
        "one": (opened[0], "<image> what?"),
        "path": (str(pictures[0]), "<image> what?"),
        "list": ([opened[0], opened[1]], ["<image> a", "<image> b"]),
        "array": (np.asarray(opened[0]), "<image> what?"),
        "several in a prompt": ([opened[:2], opened[2:]], ["<image> and <image>", "<image>"]),
        "three sizes": (opened, ["<image> <image>", "<image>"]),
    }


@pytest.mark.skipif(not HAVE_TORCHVISION, reason="transformers' processor needs torchvision")
@pytest.mark.parametrize("case", ["one", "path", "list", "array", "several in a prompt", "three sizes"])
def test_images_side_by_side_with_transformers_processor(checkpoint, processor, pictures, case):
    images, text = image_calls(pictures)[case]
    theirs = load_processor(str(checkpoint))
    expected = theirs(images=images, text=text, return_tensors="pt", padding=True)
    inputs = processor(images=images, text=text, return_tensors="pt", padding=True)
    assert set(inputs) == set(expected)
    for name in set(expected) - {"pixel_values"}:
        assert torch.equal(torch.as_tensor(inputs[name]), torch.as_tensor(expected[name])), name
    # Pillow's filters and torchvision's differ by a level or two of 255.
    torch.testing.assert_close(inputs["pixel_values"], expected["pixel_values"], atol=6 / 127.5, rtol=0)


@pytest.mark.parametrize("case", ["one", "path", "list", "array", "several in a prompt", "three sizes"])
def test_the_model_takes_as_many_placeholders_as_it_has_image_features(checkpoint, processor, pictures, case):
    images, text = image_calls(pictures)[case]
    inputs = processor(images=images, text=text, padding=True)
    model = load_model(str(checkpoint), device="cpu")
    with torch.no_grad():
        assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape  # it counts them itself


def test_images_and_a_video_in_a_conversation(processor, pictures, clip):
    talk = [
        turn({"type": "image", "path": str(pictures[0])}, a_video(str(clip)), "What?"),
        turn("That.", role="assistant"),
        turn({"type": "image", "image": Image.open(pictures[1])}, "And here?"),
    ]
    inputs = processor.apply_chat_template(talk, num_frames=2, tokenize=True, return_dict=True)
    assert inputs["batch_num_images"].tolist() == [2] and inputs["pixel_values_videos"].shape[:2] == (1, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"videos": "clip.mp4", "fps": 2}, "fps: only transformers' own processor does that.*num_frames says how many"),
        ({"videos": noise_video(2, 8, 8), "device": "cuda"}, "device: only transformers' own processor does that"),
        ({"videos": noise_video(2, 8, 8), "size": 48}, "size=48.* need torchvision"),
        ({"text": "x", "return_mm_token_type_ids": True}, "return_mm_token_type_ids: only transformers' own"),
        ({"text": "x", "audio": [0.0]}, "audio: this processor takes text"),
        ({"videos": "nowhere.mp4", "num_frames": 2.5}, "num_frames=2.5: must be a whole number, at least 1"),
        ({"videos": noise_video(9, 8, 8), "num_frames": 0}, "num_frames=0: must be a whole number, at least 1"),
        ({"videos": "nowhere.mp4"}, "no video file at"),
        ({"text": "<image>"}, "has 1 <image> but 0 image"),
        ({"text": "x", "return_tensors": "np"}, 'must be "pt"'),
        ({"text": "x", "text_kwargs": {"return_tensors": "np"}}, 'must be "pt"'),
    ],
)
def test_what_the_stand_in_cannot_do_is_named(processor, call, message):
    with pytest.raises(EarlyTomConfigError, match=message):
        processor(**{"text": "<video>", **call})


def test_a_file_with_few_frames_gives_what_it_has(processor, tmp_path):
    video = sample_video("test", 0)
    write_mp4(video, tmp_path / "clip.mp4")
    every = read_video(tmp_path / "clip.mp4", default=10**6).pixels
    whole = processor(text="<video>", videos=tmp_path / "clip.mp4")["pixel_values_videos"][0]
    assert torch.equal(whole, processor.pixels.apply(every[list(sample_indices(len(every), min(32, len(every))))]))


# --- What a checkpoint says, and what it lacks ----------------------------------------------------


@pytest.fixture
def copied(checkpoint, tmp_path):
    """A copy without weights, to be changed."""
    return shutil.copytree(checkpoint, tmp_path / "copied", ignore=shutil.ignore_patterns("*.safetensors"))


def test_a_file_gives_as_many_frames_as_the_checkpoint_says(checkpoint, copied, processor, clip):
    settings = copied / "video_preprocessor_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "num_frames": 5}))
    made_for_five = VideoTextProcessor.from_pretrained(str(copied))
    talk = [turn(a_video(str(clip)), "What happens?")]
    for each, folder, frames in ((processor, checkpoint, 32), (made_for_five, copied, 5)):
        assert frames_of(str(folder)) == frames
        for videos in (clip, str(clip), [str(clip)]):
            assert each(text="<video>", videos=videos)["pixel_values_videos"].shape[:2] == (1, frames)
        inputs = each.apply_chat_template(talk, tokenize=True, return_dict=True)
        assert inputs["pixel_values_videos"].shape[:2] == (1, frames)
    assert made_for_five(text="<video>", videos=clip, num_frames=3)["pixel_values_videos"].shape[1] == 3
    assert made_for_five(text="<video>", videos=noise_video(7, 8, 8))["pixel_values_videos"].shape[1] == 7


def without(*names):
    def change(folder):
        for name in names:
            (folder / name).unlink()

    return change


@pytest.mark.skipif(not HAVE_TORCHVISION, reason="transformers' processor needs torchvision")
@pytest.mark.parametrize(
    "change, message",
    [
        (without("tokenizer.json"), "tokenizer.json is missing there"),
        (without("preprocessor_config.json"), "preprocessor_config.json is missing there"),
        (
            without("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"),
            "tokenizer.json and preprocessor_config.json are missing there",
        ),
    ],
)
def test_files_that_are_missing_are_named(copied, change, message):
    change(copied)
    with pytest.raises(EarlyTomConfigError, match=f"the processor of '{copied}' cannot be loaded: {message}"):
        load_processor(str(copied))


def test_files_that_the_stand_in_misses_are_named(copied):
    without("tokenizer.json")(copied)
    with pytest.raises(EarlyTomConfigError, match="tokenizer.json is missing there"):
        VideoTextProcessor.from_pretrained(str(copied))


def test_what_transformers_says_is_kept_in_one_line(checkpoint, monkeypatch):
    def broken(name):
        raise ValueError("Couldn't instantiate the backend tokenizer from one of: \n(1) a file, \n(2) an instance.")

    monkeypatch.setattr(loading, "load_processor", broken)
    with pytest.raises(EarlyTomConfigError, match=r"cannot be loaded: Couldn't .* one of: \(1\) a file, \(2\) an inst"):
        loading.open_checkpoint(str(checkpoint), device="cpu")


def test_settings_that_cannot_be_read_are_named(copied):
    (copied / "processor_config.json").write_text("{")
    with pytest.raises(EarlyTomConfigError, match=f"processor_config.json of '{copied}' cannot be read: Expecting"):
        frames_of(str(copied))


@pytest.mark.skipif(not HAVE_TORCHVISION, reason="transformers' processor needs torchvision")
def test_transformers_processor_counts_without_its_own_settings(copied, processor):
    without("processor_config.json")(copied)
    call = {"text": "<video> what?", "videos": noise_video(2, 48, 48), "return_tensors": "pt"}
    assert torch.equal(load_processor(str(copied))(**call)["input_ids"], processor(**call)["input_ids"])


# --- Options of a call ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"foo": 3}, r"unknown option 'foo'\. Valid options: .*num_frames.*padding"),
        ({"paddin": True}, "unknown option 'paddin'; did you mean 'padding'"),
        ({"nun_frames": 8}, "unknown option 'nun_frames'; did you mean 'num_frames'"),
        ({"text_kwargs": {"num_frames": 8}}, "unknown option 'num_frames'"),
        ({"images_kwargs": {"foo": 3}}, "unknown option 'foo'"),
        ({"videos_kwargs": {"do_normalise": False}}, "did you mean 'do_normalize'"),
        ({"common_kwargs": {"foo": 3}}, "unknown option 'foo'"),
    ],
)
def test_an_option_that_nobody_knows_is_named(processor, options, message):
    call = {"text": "<video> what?", "videos": noise_video(2, 8, 8), "return_tensors": "pt"}
    with pytest.raises(EarlyTomConfigError, match=message):
        processor(**call, **options)
    talk = [turn(a_video(noise_video(2, 8, 8), "video"), "What?")]
    with pytest.raises(EarlyTomConfigError, match=message):
        processor.apply_chat_template(talk, tokenize=True, processor_kwargs=options)


def test_no_name_of_transformers_is_missing(processor):
    own = LlavaOnevisionImageProcessorPil.valid_kwargs
    typed = ((TextKwargs,), (ImagesKwargs, own), (VideosKwargs,))
    for (kind, names), theirs in zip(option_names(processor.tokenizer).items(), typed, strict=True):
        assert {name for each in theirs for name in each.__annotations__} <= names, kind


def test_every_option_of_the_tokenizer_and_of_transformers_is_taken(processor):
    call = {"text": ["<video> what?", "and who?"], "videos": noise_video(2, 8, 8), "return_tensors": "pt"}
    parameters = inspect.signature(processor.tokenizer.__call__).parameters.values()
    usual = {each.name: each.default for each in parameters if each.default is not each.empty} | {"padding": True}
    usual = {name: value for name, value in usual.items() if name not in ("text", "return_tensors")}
    assert {"stride", "tokenizer_kwargs", "return_length"} <= usual.keys()
    expected = processor(**call, padding=True)
    for options in (usual, {"text_kwargs": usual}, {"common_kwargs": {"return_tensors": "pt", **usual}}):
        inputs = processor(**call, **options)
        assert set(inputs) == set(expected)
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert processor(**call, padding=True, return_length=True)["length"].shape == (2,)
    for kind, names in option_names(processor.tokenizer).items():
        for name in names:  # alone, and by its kind
            place = KINDS.index(kind)
            assert options_by_kind({name: 3}, processor.tokenizer)[place] == {name: 3}
            assert options_by_kind({kind: {name: 3}}, processor.tokenizer)[place] == {name: 3}
    assert options_by_kind({"audio": None, "audio_kwargs": {}}, processor.tokenizer) == [{}, {}, {}]


@pytest.mark.skipif(not HAVE_TORCHVISION, reason="transformers' processor needs torchvision")
@pytest.mark.parametrize(
    "options",
    [
        {"do_normalize": False},
        {"size": {"height": 24, "width": 36}, "resample": 2},
        {"image_mean": [0.1, 0.2, 0.3], "rescale_factor": 1 / 128},
        {"do_resize": True, "do_convert_rgb": True, "data_format": "channels_first", "device": "cpu"},
    ],
)
def test_options_for_pixels_do_what_they_do_in_transformers(checkpoint, processor, pictures, options):
    theirs = load_processor(str(checkpoint))
    call = {"text": "<video>", "videos": [noise_video(2, 60, 80)], "return_tensors": "pt"}
    for given in (options, {"videos_kwargs": options}):
        inputs, expected = processor(**call, **given), theirs(**call, **given)
        assert torch.equal(inputs["pixel_values_videos"], expected["pixel_values_videos"])
    if "do_normalize" in options:  # as for the images of the same call
        call = {"text": "<image>", "images": Image.open(pictures[1]), "return_tensors": "pt"}
        expected = theirs(**call, **options)["pixel_values"]
        torch.testing.assert_close(processor(**call, **options)["pixel_values"], expected, atol=6 / 255, rtol=0)


def test_what_a_call_does_not_know_is_a_variable_of_the_template(processor):
    template = "{{ mood }} {{ messages[0].content[0].text }}"
    talk, options = [turn("Hello")], {"chat_template": template, "mood": "Merry"}
    assert processor.apply_chat_template(talk, **options) == "Merry Hello"
    inputs = processor.apply_chat_template(talk, tokenize=True, return_dict=True, return_length=True, **options)
    assert inputs["input_ids"].tolist() == processor(text="Merry Hello")["input_ids"].tolist() and "length" in inputs
