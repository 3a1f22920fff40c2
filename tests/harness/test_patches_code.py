"""Turns of a conversation -> inputs of models of Qwen: what their processors make of the same, and what the model
answers then."""

import itertools

import numpy as np
import pytest
import torch
from clip import write_clip
from tiny_qwen_checkpoint import require_family, write_qwen_checkpoint

Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")
pytest.importorskip("torchvision", reason="Qwen's processors need torchvision")

from earlytom_compile.integrations.lmms_eval.arguments import read_arguments  # noqa: E402
from earlytom_compile.integrations.lmms_eval.loading import load_speaker  # noqa: E402
from earlytom_compile.integrations.lmms_eval.patches_code import PatchSpeaker  # noqa: E402
from earlytom_compile.integrations.lmms_eval.prompts import Film, Picture, Turn  # noqa: E402
from earlytom_compile.integrations.video import read_video  # noqa: E402

FRAMES = 6
SHAPES = ("cpu-tiny-qwen2.5", "cpu-tiny-qwen3", "cpu-tiny-qwen3.5")


@pytest.fixture(scope="module", params=SHAPES)
def speaker(request, tmp_path_factory):
    require_family(request.param)
    folder = write_qwen_checkpoint(tmp_path_factory.mktemp("qwen"), request.param)
    given = {"pretrained": str(folder), "device": "cpu", "max_frames_num": FRAMES}
    speaker = load_speaker(read_arguments(given))
    assert type(speaker) is PatchSpeaker
    return speaker


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_clip(path)
    return str(path)


def drawn(seed, size=(140, 80)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def film(seed, pictures, size=(140, 80)):
    return Film([drawn(100 * seed + number, size) for number in range(pictures)])


def own(speaker, content, videos=(), metadata=(), images=()):
    """What the checkpoint's processor makes of one turn, sizes included."""
    processor = speaker._processor
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    told = {"videos_kwargs": {"do_sample_frames": False, "video_metadata": list(metadata)}} if videos else {}
    made = processor(text=prompt, images=list(images) or None, videos=list(videos) or None, return_tensors="pt", **told)
    return {name: value for name, value in made.items() if name != "video_metadata"}


def told(count, rate=2.0):
    return {"total_num_frames": count, "fps": rate, "frames_indices": list(range(count))}


def require_equal(inputs, expected):
    assert set(inputs) == set(expected)
    for name, value in expected.items():
        assert torch.equal(inputs[name], torch.as_tensor(value).to(inputs[name].dtype)), name


def answered(speaker, inputs):
    """Six tokens of each row, and the logits of the first."""
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    given = speaker.model.generate(**inputs, **arguments, output_logits=True, return_dict_in_generate=True)
    return speaker.new_tokens(given.sequences, inputs).tolist(), given.logits[0]


def require_alone(speaker, samples):
    """The batch has the answers that each has alone."""
    tokens, logits = answered(speaker, speaker.inputs(samples))
    alone = [answered(speaker, speaker.inputs([sample])) for sample in samples]
    assert tokens == [rows[0] for rows, _ in alone]
    expected = torch.cat([scores for _, scores in alone])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for row, other in itertools.combinations(expected, 2):
        assert (row - other).abs().max() > 1e-2, "the test must have answers that differ"


def text(words):
    return {"type": "text", "text": words}


def test_a_video_file_is_what_the_processor_makes_of_all_its_pixels(speaker, clip):
    sample = speaker.prepare([Turn("user", (Film(clip), "what happens ?"))])
    read = read_video(clip, FRAMES)
    metadata = {"total_num_frames": read.total, "fps": read.rate, "frames_indices": list(read.indices)}
    expected = own(speaker, [{"type": "video"}, text("what happens ?")], [read.pixels], [metadata])
    require_equal(speaker.inputs([sample]), expected)
    frames, height, width = expected["video_grid_thw"][0].tolist()
    assert sample.frames == (frames,) == (FRAMES // 2,) and sample.kind == (True, False)
    assert speaker.video_tokens(sample) == frames * height * width // 4
    assert speaker.positions(sample) == expected["input_ids"].shape[1]


def test_videos_of_several_sizes_and_a_picture_stand_where_they_were_said(speaker):
    one, other, picture = film(1, 4), film(2, 5, (60, 100)), drawn(3, (90, 48))
    sample = speaker.prepare([Turn("user", ("first ", one, " then ", Picture(picture), other, " which ?"))])
    content = [
        text("first "),
        {"type": "video"},
        text(" then "),
        {"type": "image"},
        {"type": "video"},
        text(" which ?"),
    ]
    videos = [np.stack([np.array(each) for each in shown.source]) for shown in (one, other)]
    expected = own(speaker, content, videos, [told(4), told(5)], [picture])
    require_equal(speaker.inputs([sample]), expected)
    assert sample.frames == (2, 3) and sample.kind == (True, True)
    grids = expected["video_grid_thw"]
    assert grids[0, 1:].tolist() != grids[1, 1:].tolist(), "the test must have videos of two sizes"
    assert speaker.video_tokens(sample) == int(grids.prod(-1).sum()) // 4


def test_pictures_alone_and_words_alone(speaker):
    picture = drawn(3, (90, 48))
    shown = speaker.prepare([Turn("user", (Picture(picture), "who ?"))])
    require_equal(speaker.inputs([shown]), own(speaker, [{"type": "image"}, text("who ?")], images=[picture]))
    bare = speaker.prepare([Turn("user", ("who ?",))])
    require_equal(speaker.inputs([bare]), own(speaker, [text("who ?")]))
    assert (shown.kind, bare.kind) == ((False, True), (False, False))


def test_pictures_of_a_video_are_as_large_as_the_first(speaker):
    first, second = drawn(1), drawn(2, (60, 100))
    mixed = speaker.prepare([Turn("user", (Film([first, second]), "who ?"))])
    alike = speaker.prepare([Turn("user", (Film([first, second.resize(first.size)]), "who ?"))])
    require_equal(speaker.inputs([mixed]), speaker.inputs([alike]))


def test_a_batch_has_the_answers_of_each_alone(speaker, clip):
    """Of different lengths, sizes and numbers of videos."""
    samples = [
        speaker.prepare([Turn("user", (Film(clip), "what happens in the video ?"))]),
        speaker.prepare([Turn("user", (film(1, 2, (60, 100)), "who ?"))]),
        speaker.prepare([Turn("user", (film(2, 4), film(3, 2), "which ?"))]),
    ]
    inputs = speaker.inputs(samples)
    longest = max(len(sample.ids) for sample in samples)
    for row, sample in enumerate(samples):
        missing = longest - len(sample.ids)
        assert inputs["attention_mask"][row].tolist() == [0] * missing + [1] * len(sample.ids)
        assert torch.equal(inputs["input_ids"][row, missing:], sample.ids)
        assert torch.equal(inputs["mm_token_type_ids"][row, missing:], sample.kinds)
        assert not inputs["mm_token_type_ids"][row, :missing].any()
    require_alone(speaker, samples)


def test_a_batch_with_pictures_beside_videos_has_the_answers_of_each_alone(speaker):
    samples = [
        speaker.prepare([Turn("user", (film(1, 4), Picture(drawn(5, (90, 48))), "which of these is it ?"))]),
        speaker.prepare([Turn("user", (Picture(drawn(6, (48, 60))), film(2, 3, (60, 100)), "who ?"))]),
    ]
    assert {sample.kind for sample in samples} == {(True, True)}
    require_alone(speaker, samples)


def test_a_video_is_read_once(speaker, clip, monkeypatch):
    from earlytom_compile.integrations.lmms_eval import patches_code

    speaker.prepare([Turn("user", (Film(clip), "what ?"))])
    monkeypatch.setattr(patches_code, "read_video", None)
    assert speaker.prepare([Turn("user", (Film(clip), "who ?"))]).frames == (FRAMES // 2,)
