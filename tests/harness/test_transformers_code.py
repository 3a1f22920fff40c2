"""Turns of a conversation -> inputs of a model of transformers: what its processor makes of the same."""

import numpy as np
import pytest
import torch
from clip import write_clip

Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")

from earlytom_compile import EarlyTomConfigError  # noqa: E402
from earlytom_compile.cli.loading import load_checkpoint  # noqa: E402
from earlytom_compile.integrations.lmms_eval.arguments import read_arguments  # noqa: E402
from earlytom_compile.integrations.lmms_eval.loading import load_speaker  # noqa: E402
from earlytom_compile.integrations.lmms_eval.prompts import Film, Picture, Turn  # noqa: E402
from earlytom_compile.integrations.lmms_eval.transformers_code import TransformersSpeaker  # noqa: E402
from earlytom_compile.integrations.video import read_video  # noqa: E402

FRAMES = 5


@pytest.fixture(scope="module")
def speaker(checkpoint):
    given = {"pretrained": str(checkpoint), "device": "cpu", "max_frames_num": FRAMES}
    speaker = load_speaker(read_arguments(given))
    assert type(speaker) is TransformersSpeaker
    return speaker


@pytest.fixture(scope="module")
def processor(checkpoint):
    return load_checkpoint(str(checkpoint), device="cpu").processor


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_clip(path)
    return str(path)


def drawn(seed, size=(70, 40)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def film(seed, frames):
    return Film([drawn(100 * seed + number) for number in range(frames)])


def frames_of(film):
    return np.stack([np.array(each) for each in film.source])


def test_a_video_file_as_earlytom_run_reads_it(speaker, processor, clip):
    sample = speaker.prepare([Turn("user", (Film(clip), "what happens ?"))])
    turn = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what happens ?"}]}]
    prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
    expected = processor(text=prompt, videos=read_video(clip, FRAMES).pixels, return_tensors="pt")
    assert torch.equal(sample.ids, expected["input_ids"][0]) and sample.frames == (FRAMES,)
    assert torch.equal(sample.videos[0], expected["pixel_values_videos"][0])


def test_several_videos_and_pictures_in_order(speaker, processor):
    one, other, picture = film(1, 3), film(2, 3), drawn(3, (90, 48))
    sample = speaker.prepare([Turn("user", (Picture(picture), one, other, "which ?"))])
    content = [{"type": "image"}, {"type": "video"}, {"type": "video"}, {"type": "text", "text": "which ?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    videos = [frames_of(one), frames_of(other)]
    expected = processor(text=prompt, videos=videos, images=[picture], return_tensors="pt")
    inputs = speaker.inputs([sample])
    assert set(inputs) == set(expected)
    for name, value in expected.items():
        assert torch.equal(inputs[name], value.to(inputs[name].dtype)), name


def test_what_stands_between_texts_stays_there(speaker):
    sample = speaker.prepare([Turn("user", ("first ", film(1, 2), " then ", film(2, 3), " ?"))])
    text = speaker.tokenizer.decode(sample.ids)
    run = "<video>" * (2 * speaker.tokens_per_frame + 1)
    assert f"first {run} then <video>" in text and sample.frames == (2, 3)


def test_tokens_of_a_frame_leave_the_newline_out(speaker):
    assert speaker.tokens_per_frame == (48 // 8 // 2) ** 2


def test_prompts_of_different_length_are_padded_on_the_left(speaker):
    long = speaker.prepare([Turn("user", (film(1, 3), "what happens in the video ?"))])
    short = speaker.prepare([Turn("user", (film(2, 2), "who ?"))])
    inputs = speaker.inputs([long, short])
    missing = len(long.ids) - len(short.ids)
    assert missing > 0 and inputs["attention_mask"].tolist() == [
        [1] * len(long.ids),
        [0] * missing + [1] * len(short.ids),
    ]
    assert torch.equal(inputs["input_ids"][1, missing:], short.ids)
    assert [len(video) for video in inputs["pixel_values_videos"]] == [3, 2]


def test_pictures_with_different_crops_in_a_batch_are_those_of_the_processor(speaker, processor):
    wide, square = drawn(1, (96, 48)), drawn(2, (48, 48))
    samples = [speaker.prepare([Turn("user", (Picture(each), "who ?"))]) for each in (wide, square)]
    crops = [sample.others["pixel_values"].shape[1] for sample in samples]
    assert crops[0] != crops[1], "the test must have pictures that differ"
    inputs = speaker.inputs(samples)
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "who ?"}]}
    prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
    expected = processor(text=[prompt] * 2, images=[[wide], [square]], padding=True, return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    assert torch.equal(inputs["image_sizes"], expected["image_sizes"])


def test_words_alone(speaker):
    sample = speaker.prepare([Turn("user", ("who ?",))])
    assert sample.kind == (False, False) and set(speaker.inputs([sample])) == {"input_ids", "attention_mask"}


def test_a_video_is_read_once(speaker, clip, monkeypatch):
    from earlytom_compile.integrations.lmms_eval import transformers_code

    speaker.prepare([Turn("user", (Film(clip), "what ?"))])
    monkeypatch.setattr(transformers_code, "read_video", None)
    assert speaker.prepare([Turn("user", (Film(clip), "who ?"))]).frames == (FRAMES,)


@pytest.mark.parametrize("text", ["what is <video> ?", "what is <image> ?"])
def test_a_question_with_a_placeholder_of_nothing_is_refused(speaker, text):
    with pytest.raises(EarlyTomConfigError, match="in a question stands for what is shown"):
        speaker.prepare([Turn("user", (film(1, 2), text))])
