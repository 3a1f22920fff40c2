"""The commands with checkpoints of Qwen: transformers' own processors, pictures of any size, temporal patches."""

import json
import re

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny_qwen_checkpoint import require_family, write_qwen_checkpoint

from earlytom_compile.cli import compare as comparing
from earlytom_compile.cli import loading
from earlytom_compile.cli.eval_model import look_at_checkpoint
from earlytom_compile.cli.explain import _QUESTION
from earlytom_compile.cli.loading import ask_again, frames_in, grid_in, load_checkpoint, prepare_inputs
from earlytom_compile.flops import count
from earlytom_compile.integrations.observe import observe
from earlytom_compile.integrations.preprocess import frame_resizer
from earlytom_compile.integrations.video import read_video
from earlytom_compile.picture.frames import first_pictures
from earlytom_compile.shapes import ModelShape

QUIET = Console(quiet=True)
EAGER = ("--lowering", "eager")
SHAPES = {"2.5": "cpu-tiny-qwen2.5", "3": "cpu-tiny-qwen3", "3.5": "cpu-tiny-qwen3.5"}
ALL = pytest.mark.parametrize("checkpoint", SHAPES, indirect=True)
WITH_STAMPS = pytest.mark.parametrize("checkpoint", ["3"], indirect=True)
pytestmark = pytest.mark.usefixtures("sharing")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    pytest.importorskip("torchvision")
    made = {}

    def of(name):
        require_family(SHAPES[name])
        if name not in made:
            made[name] = write_qwen_checkpoint(tmp_path_factory.mktemp("qwen") / name, SHAPES[name])
        return made[name]

    return of


@pytest.fixture
def checkpoint(request, folders):
    return folders(request.param)


def prepared(loaded, clip, question="what happens ?", frames=8):
    return prepare_inputs(loaded, clip, question, frames=frames, progress_on=QUIET)


def own_inputs(loaded, clip, question, frames):
    """What transformers makes of the same pictures, all of them in memory at their full size."""
    film = read_video(clip, frames)
    turn = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}
    prompt = loaded.processor.apply_chat_template([turn], add_generation_prompt=True)
    told = {"total_num_frames": film.total, "fps": film.rate, "frames_indices": list(film.indices)}
    return loaded.processor(
        text=prompt, videos=film.pixels, do_sample_frames=False, video_metadata=[told], return_tensors="pt"
    )


@ALL
@pytest.mark.parametrize("frames", [8, 7, 2])
def test_inputs_are_the_processors_own(checkpoint, clip, frames):
    loaded = load_checkpoint(str(checkpoint), device="cpu")
    inputs, own = prepared(loaded, clip, frames=frames), own_inputs(loaded, clip, "what happens ?", frames)
    assert set(inputs) == {name for name in own if name != "video_metadata"}
    for name, value in inputs.items():
        assert torch.equal(value, torch.as_tensor(own[name])), name
    count, height, width = inputs["video_grid_thw"][0].tolist()
    assert frames_in(inputs) == count == -(-frames // 2) and grid_in(inputs) == (height, width)
    assert width > height  # the clip is 320 x 240
    placeholders = inputs["input_ids"] == loaded.model.config.video_token_id
    assert placeholders.sum() == count * height * width // 4
    assert torch.equal(inputs["mm_token_type_ids"] == 2, placeholders)


@pytest.mark.parametrize("checkpoint", ["2.5"], indirect=True)
def test_seconds_of_a_temporal_patch_follow_from_the_file(checkpoint, clip):
    loaded, film = load_checkpoint(str(checkpoint), device="cpu"), read_video(clip, 8)
    inputs = prepared(loaded, clip)
    assert (film.rate, film.total) == (12, 96)  # 8 seconds, of which 8 pictures are taken
    assert inputs["second_per_grid_ts"].tolist() == [2.0]


@WITH_STAMPS
def test_time_stamps_are_those_of_the_pictures(checkpoint, clip):
    loaded, film = load_checkpoint(str(checkpoint), device="cpu"), read_video(clip, 8)
    said = loaded.processor.decode(prepared(loaded, clip)["input_ids"][0])
    seconds = [float(stamp) for stamp in re.findall(r"<(\d+\.\d) seconds>", said)]
    pairs = np.array(film.indices).reshape(4, 2) / film.rate
    assert seconds == pytest.approx(pairs.mean(axis=1), abs=0.051)


@ALL
def test_another_question_has_the_inputs_it_would_have_alone(checkpoint, clip):
    loaded = load_checkpoint(str(checkpoint), device="cpu")
    first, question = prepared(loaded, clip), "and who is it, where and why ?"
    again, alone = ask_again(loaded, first, question), prepared(loaded, clip, question)
    assert again.keys() == alone.keys()
    assert all(torch.equal(again[name], alone[name]) for name in alone)
    assert again["pixel_values_videos"] is first["pixel_values_videos"]  # not a second time


@ALL
def test_run_answers_as_the_model_does_with_what_is_kept(earlytom, checkpoint, clip, tmp_path):
    file, asked = tmp_path / "run.json", ("what happens ?", "who is it ?")
    status, out, err = earlytom(
        "run", "--model", checkpoint, "--video", clip, "--prompt", asked[0], "--prompt", asked[1], "--frames", 8,
        "--retain-ratio", 0.25, "--max-new-tokens", 4, "--json", file, *EAGER,
    )  # fmt: skip
    answers = json.loads(file.read_text())["answers"]
    inputs = prepared(load_checkpoint(str(checkpoint), device="cpu"), clip)
    tokens = 4 * np.prod(grid_in(inputs)) // 4
    assert status == 0 and "NOT compressed" not in err
    for answer in answers:
        assert answer["compressed"] and answer["video_tokens"] == [tokens, round(0.25 * tokens)]
        assert answer["frames"][0] == 4
        before, after = answer["prompt_tokens"]
        assert before - after == tokens - round(0.25 * tokens)
    assert answers[0]["prompt_tokens"][0] == inputs["input_ids"].shape[1]


@ALL
def test_run_with_all_tokens_says_what_the_model_says(earlytom, checkpoint, clip, tmp_path):
    file = tmp_path / "run.json"
    status, *_ = earlytom(
        "run", "--model", checkpoint, "--video", clip, "--prompt", "what happens ?", "--frames", 8,
        "--retain-ratio", 1, "--max-new-tokens", 4, "--json", file, "--quiet", *EAGER,
    )  # fmt: skip
    (answer,) = json.loads(file.read_text())["answers"]
    loaded = load_checkpoint(str(checkpoint), device="cpu")
    inputs = own_inputs(loaded, clip, "what happens ?", 8)
    inputs.pop("video_metadata", None)
    own = loaded.model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert status == 0 and answer["answer"] == loaded.processor.decode(own, skip_special_tokens=True).strip()


@pytest.mark.parametrize("checkpoint", ["2.5"], indirect=True)
def test_a_picture_has_the_grid_of_the_tokens_and_the_first_of_two_pictures(earlytom, checkpoint, clip, tmp_path):
    html = tmp_path / "a.html"
    status, *_ = earlytom(
        "run", "--model", checkpoint, "--video", clip, "--prompt", "what happens ?", "--frames", 8,
        "--max-new-tokens", 2, *EAGER, "--html", html,
    )  # fmt: skip
    page = html.read_text(encoding="utf-8")
    assert status == 0 and "temporal patch, which the encoder makes of 2 pictures" in page
    assert page.count('<image id="v0f') == 4 and "of 12 tokens" in page

    loaded = load_checkpoint(str(checkpoint), device="cpu")
    inputs = prepared(loaded, clip)
    grid = inputs["video_grid_thw"]
    (seen,) = observe(loaded.model, inputs["pixel_values_videos"], {"video_grid_thw": grid}, retain_ratio=0.5)
    assert seen.frames == 4 and seen.grid == (3, 4) and seen.importance.shape[1:] == (3, 4)
    assert len(seen.kept) == 24 and {place[1] for place in seen.kept} <= set(range(3))
    assert max(place[2] for place in seen.kept) <= 3
    # What the processor made of a picture is the picture again.
    pictures = first_pictures(loaded.processor, inputs["pixel_values_videos"], tuple(grid[0].tolist()))
    small = read_video(clip, 8, resize=frame_resizer(loaded.processor)).pixels
    assert np.array_equal(pictures, small[::2])


@pytest.mark.parametrize("checkpoint", ["2.5", "3.5"], indirect=True)
def test_explain_counts_what_the_model_does(earlytom, checkpoint, clip):
    asked = ("--video", clip, "--frames", 8, "--retain-ratio", 0.25)
    status, out, _ = earlytom("explain", "--model", checkpoint, *asked, *EAGER)
    assert status == 0 and "4 temporal patches of it" in out and "4.0x less" in out
    loaded = load_checkpoint(str(checkpoint), device="cpu")
    inputs = prepared(loaded, clip, _QUESTION)
    shape = ModelShape.from_config(loaded.model.config).of_grid(*grid_in(inputs))
    work = count(shape, protocol="exact", frames_schedule=(4,), llm_tokens=inputs["input_ids"].shape[1]).total
    assert re.search(rf"work of a prompt +│ {work / 1e6:.1f} MFLOPs", out)


@pytest.mark.parametrize("checkpoint", [pytest.param("2.5", marks=pytest.mark.long), "3"], indirect=True)
def test_compare_scores_the_answers_of_the_full_model(earlytom, checkpoint, clip, tmp_path):
    file, questions = tmp_path / "compare.json", tmp_path / "questions.csv"
    questions.write_text("video,question\nclip.mp4,what happens ?\nclip.mp4,who is it ?\n")
    status, out, err = earlytom(
        "compare", "--model", checkpoint, "--videos", clip.parent, "--questions", questions, "--frames", 8,
        "--retain-ratios", "1,0.25", "--variants", "paper", "--max-new-tokens", 3, "--json", file,
    )  # fmt: skip
    content = json.loads(file.read_text())
    assert status == 0 and "left alone" not in out
    for row in content["rows"]:
        every, some = row["settings"].values()
        assert every["agrees"] and every["lost"] == pytest.approx(0, abs=1e-3)
        assert row["full"]["video_tokens"] == every["video_tokens"] == 4 * some["video_tokens"]


def test_log_probabilities_are_those_of_a_longer_prompt(folders, clip):
    loaded = load_checkpoint(str(folders("3")), device="cpu")
    inputs = prepared(loaded, clip)
    answer = [20, 30, 40]
    found = comparing.log_probabilities(loaded.model, inputs, answer)
    ids = torch.cat((inputs["input_ids"], torch.tensor([answer])), dim=1)
    longer = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    longer["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 3))
    with torch.no_grad():
        logits = loaded.model(**longer).logits[0, -4:-1].log_softmax(-1)
    assert found == pytest.approx(logits[range(3), answer].tolist(), abs=1e-4)


def test_a_placeholder_in_a_question_is_refused(earlytom, folders, clip):
    status, _, errors = earlytom("run", "--model", folders("3"), "--video", clip, "--prompt", "a <|video_pad|> ?")
    assert status == 2 and "<|video_pad|> stands for the video itself" in errors


def test_a_checkpoint_is_looked_at_for_lmms_eval_before_weights_are_read(folders, monkeypatch):
    monkeypatch.setattr(loading, "_read_weights", lambda *arguments: pytest.fail("weights were read"))
    subject = look_at_checkpoint(str(folders("3")), device="cpu", dtype="auto", options={})
    assert (subject.kind, subject.half_billion) == ("EarlyTom", False)
    assert subject.shape is None  # work depends on the size of each video
