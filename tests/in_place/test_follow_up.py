"""Videos that are encoded once and asked about many times, and videos of different lengths in one call."""

import importlib.util
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from generating import OPTIONS, compiled, new_tokens
from hypothesis import given
from hypothesis import strategies as st
from oracle import compressed_forward
from rich.console import Console
from tiny_models import tokens_per_frame, video_inputs

import earlytom_compile
from earlytom_compile import EarlyTomConfigError, EarlyTomFallbackWarning, report
from earlytom_compile.prompt import PromptCut, locate_runs, sizes_in_prompt


def with_one_placeholder(model, inputs):
    """The same prompts with a single ``<video>`` for each video, as a tokenizer writes them; no pixels."""
    token, pad = model.config.video_token_id, 0
    rows = []
    for row, mask in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].bool(), strict=True):
        kept = [i for n, i in enumerate(row) if mask[n] and not (i == token and n and row[n - 1] == token)]
        rows.append(kept)
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[pad] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


# --- Encoded once ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [{}, {"videos_per_row": (2, 0, 1), "before": (1, 6, 3)}])
@pytest.mark.parametrize("write", ["one placeholder", "all placeholders"])
def test_encoded_videos_answer_as_their_pixels_do(model, layout, write):
    inputs = video_inputs(model, 12, **layout)
    expected = new_tokens(compiled(model), inputs)
    encoded = earlytom_compile.encode_videos(model, inputs.pop("pixel_values_videos"))
    prompt = with_one_placeholder(model, inputs) if write == "one placeholder" else inputs
    assert torch.equal(new_tokens(model, {**prompt, "pixel_values_videos": encoded}), expected)


def test_a_follow_up_does_not_encode_again(model, monkeypatch):
    """The whole conversation, and rows that are there already; as without, but for the vision encoder's work."""
    first = video_inputs(model, 12)
    pixels = first.pop("pixel_values_videos")
    compiled(model)
    encoded = earlytom_compile.encode_videos(model, pixels)
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(type(model._earlytom.encoder), "encode", lambda *_: calls.append(1))
    prompt = with_one_placeholder(model, first)
    answer = new_tokens(model, {**prompt, "pixel_values_videos": encoded})
    second = torch.cat((prompt["input_ids"], answer, torch.tensor([[5, 6, 7]])), dim=1)
    follow_up = {"input_ids": second, "attention_mask": torch.ones_like(second)}
    again = new_tokens(model, {**follow_up, "pixel_values_videos": encoded})
    assert not calls
    monkeypatch.undo()
    full = torch.cat((first["input_ids"], answer, torch.tensor([[5, 6, 7]])), dim=1)
    whole = {"input_ids": full, "attention_mask": torch.ones_like(full), "pixel_values_videos": pixels}
    assert torch.equal(new_tokens(model, whole), again)
    assert report(model).to_dict()["last_call"] == "compressed"


def test_many_questions_about_one_video_in_one_batch(model):
    inputs = video_inputs(model, 12, videos_per_row=(1, 1), before=(2, 5))
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"][:1].expand(2, -1, -1, -1, -1)
    expected = new_tokens(compiled(model), inputs)
    encoded = earlytom_compile.encode_videos(model, inputs.pop("pixel_values_videos")[:1])
    prompts = with_one_placeholder(model, inputs)
    assert torch.equal(new_tokens(model, {**prompts, "pixel_values_videos": encoded * 2}), expected)


@torch.no_grad()
def test_forward_takes_encoded_videos(model):
    inputs = video_inputs(model, 12)
    expected = compressed_forward(model, inputs, **OPTIONS).logits
    encoded = earlytom_compile.encode_videos(compiled(model), inputs.pop("pixel_values_videos"))
    logits = model(**with_one_placeholder(model, inputs), pixel_values_videos=encoded).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("limit", ["max_length", "max_new_tokens"])
def test_limits_count_the_callers_prompt_also_where_it_grows(model, limit):
    inputs = video_inputs(model, 12)
    encoded = earlytom_compile.encode_videos(compiled(model), inputs.pop("pixel_values_videos"))
    prompt = with_one_placeholder(model, inputs)
    length = prompt["input_ids"].shape[1]
    value = {"max_length": length + 4, "max_new_tokens": 4}[limit]
    output = model.generate(**prompt, pixel_values_videos=encoded, **{limit: value}, do_sample=False, pad_token_id=0)
    assert output.shape[1] == length + 4 and torch.equal(output[:, :length], prompt["input_ids"])


def test_encoded_videos_that_do_not_fit(model):
    inputs = video_inputs(model, 12)
    encoded = earlytom_compile.encode_videos(compiled(model), inputs.pop("pixel_values_videos"))

    def generate(videos, **changed):
        model.generate(**{**inputs, **changed}, pixel_values_videos=videos, max_new_tokens=1)

    with pytest.raises(EarlyTomConfigError, match="in 1 places, but 2 encoded video"):
        generate(encoded * 2)
    with pytest.raises(EarlyTomConfigError, match=r"must be \[rows, 48\]"):
        generate([encoded[0][:, :3]])
    with pytest.raises(EarlyTomConfigError, match="encoded videos cannot be used: the prompt is not given as"):
        generate(encoded, inputs_embeds=torch.zeros(1, 4, 48))
    with pytest.raises(EarlyTomConfigError, match="encoded already"):
        earlytom_compile.encode_videos(model, encoded)


@st.composite
def prompts(draw):
    """(rows of ids, videos in reading order, length of the runs, rows of each video)."""
    text = st.lists(st.integers(0, 8), min_size=1, max_size=4)
    rows, before = [], []
    for _ in range(draw(st.integers(1, 3))):
        row = draw(text)
        for _ in range(draw(st.integers(0, 3))):
            before.append(draw(st.integers(1, 6)))
            row = row + [9] * before[-1] + draw(text)
        rows.append(row)
    width = max(map(len, rows))
    after = draw(st.lists(st.integers(1, 9), min_size=len(before), max_size=len(before)))
    return torch.tensor([[0] * (width - len(row)) + row for row in rows]), before, after


@given(prompts())
def test_each_video_gets_as_many_placeholders_as_it_has_rows(prompt):
    ids, before, after = prompt
    assert sizes_in_prompt(ids, 9, len(before)) == before
    plan = PromptCut.plan(ids, locate_runs(ids, 9, before), after)
    remaining, rows = list(after), []
    for row in ids.tolist():  # written once more, without positions
        new, last = [], None
        for token in row:
            if token != 9:
                new.append(token)
            elif last != 9:
                new += [9] * remaining.pop(0)
            last = token
        rows.append(new)
    width = max(map(len, rows))
    assert plan.take(ids, -1).tolist() == [[-1] * (width - len(row)) + row for row in rows]
    numbers = torch.arange(ids.shape[1]).expand(len(ids), -1)
    expected = [[0] * (width - len(row)) + list(range(len(row))) for row in rows]
    assert plan.renumber(numbers).tolist() == expected and plan.dropped == ids.shape[1] - width


@given(prompts(), st.integers(0, 4), st.integers(0, 2))
def test_rows_lose_padding_that_no_row_needs(prompt, common, right):
    ids, before, after = prompt
    own = [row.index(next(filter(None, row), 9)) if any(row) else 0 for row in ids.tolist()]
    own = [0 if min(own) else padding for padding in own]  # zeros that begin every row are text
    pad = torch.nn.functional.pad
    ids = pad(ids, (common, right))
    mask = torch.tensor([[0] * (common + n) + [1] * (ids.shape[1] - common - n - right) + [0] * right for n in own])
    places = locate_runs(ids, 9, before)
    untrimmed, plan = PromptCut.plan(ids, places, after), PromptCut.plan(ids, places, after, mask)
    contents = [row[row >= 0][common + n :] for row, n in zip(untrimmed.positions, own, strict=True)]
    width = max(map(len, contents)) + common
    assert plan.positions.shape[1] == width and plan.dropped == ids.shape[1] - width
    number = (mask.cumsum(1) - 1).clamp_min(0)
    numbers = (plan.take(mask, 0).cumsum(1) - 1).clamp_min(0)
    for row, content in enumerate(contents):
        assert plan.positions[row, width - len(content) :].tolist() == content.tolist()
        assert not plan.take(mask, 0)[row, : width - len(content)].any()
    assert torch.equal(plan.renumber(number), numbers)


# --- Different lengths ----------------------------------------------------------------------------


def one_row(prompts):
    return {name: torch.cat([inputs[name] for inputs in prompts], dim=1) for name in ("input_ids", "attention_mask")}


def test_rows_with_videos_of_different_lengths(model):
    alone = [video_inputs(model, frames, seed=frames) for frames in (12, 8)]
    compiled(model)
    expected = [new_tokens(model, inputs)[0] for inputs in alone]
    width = max(inputs["input_ids"].shape[1] for inputs in alone)

    def padded(name):
        return torch.cat(
            [torch.nn.functional.pad(inputs[name], (width - inputs[name].shape[1], 0)) for inputs in alone]
        )

    batch = {"input_ids": padded("input_ids"), "attention_mask": padded("attention_mask")}
    batch["pixel_values_videos"] = [inputs["pixel_values_videos"][0] for inputs in alone]
    got = new_tokens(model, batch)
    assert all(torch.equal(row, answer) for row, answer in zip(got, expected, strict=True))
    said = report(model).to_dict()
    before = [video["tokens"][0] for video in said["videos"]]
    tokens = [video["tokens"] for video in said["videos"]]
    lengths = [inputs["input_ids"].shape[1] + kept - all_ for inputs, (all_, kept) in zip(alone, tokens, strict=True)]
    assert said["prompt"] == [width, max(lengths)]  # no longer than the longest row alone
    assert before == [frames * tokens_per_frame(model) for frames in (12, 8)]
    encoded = earlytom_compile.encode_videos(model, batch["pixel_values_videos"])
    row = one_row(alone)
    expected = new_tokens(model, {**row, "pixel_values_videos": encoded})
    assert torch.equal(new_tokens(model, {**row, "pixel_values_videos": batch["pixel_values_videos"]}), expected)


@pytest.mark.parametrize(
    "videos, says",
    [
        ([], "a list of nothing"),
        ([np.zeros((8, 3, 24, 24), np.float32)], "a list of ndarray"),
        (["talk.mp4"], "a list of str"),
        ("talk.mp4", "a str"),
        (np.zeros((1, 8, 3, 24, 24), np.float32), "a ndarray"),
    ],
)
def test_videos_that_are_no_tensors_are_refused_in_words(model, videos, says):
    inputs = {**video_inputs(model, 8), "pixel_values_videos": videos}
    compiled(model)
    for call in (model.generate, model):
        with pytest.raises(EarlyTomConfigError, match=f"pixel_values_videos: {says}; .* processor"):
            call(**inputs)
    with pytest.raises(EarlyTomConfigError, match=f"pixel_values_videos: {says}; .* processor"):
        earlytom_compile.encode_videos(model, videos)


def test_what_runs_uncompressed_cannot_have_different_lengths(model):
    alone = [video_inputs(model, frames, seed=frames) for frames in (12, 8)]
    videos = [inputs["pixel_values_videos"][0] for inputs in alone]
    compiled(model)
    with (
        pytest.warns(EarlyTomFallbackWarning),
        pytest.raises(EarlyTomConfigError, match="the prompt is not given as input_ids.*calls of their own"),
    ):
        model.generate(
            **one_row(alone), pixel_values_videos=videos, inputs_embeds=torch.zeros(1, 3, 48), max_new_tokens=1
        )


@torch.no_grad()
def test_a_list_of_equal_lengths_runs_the_models_own_code_where_it_must(model):
    inputs = video_inputs(model, 12, videos_per_row=(2,))
    inputs["input_ids"][0, [0, 30]] = inputs["input_ids"][0, [30, 0]]
    expected = model(**inputs).logits
    inputs["pixel_values_videos"] = list(inputs["pixel_values_videos"])
    with pytest.warns(EarlyTomFallbackWarning, match="not next to each other"):
        assert torch.equal(compiled(model)(**inputs).logits, expected)


# --- What transformers says -----------------------------------------------------------------------


@pytest.fixture
def said(caplog, monkeypatch):
    """What transformers logs; it keeps its loggers from handing on what they get."""
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.WARNING, logger="transformers")  # whatever --quiet has made of it in this process
    from transformers.generation.utils import logger as once

    once.warning_once.cache_clear()

    def messages(word):
        return [message for message in caplog.messages if word in message]

    yield messages


@pytest.mark.parametrize(
    "case", ["right padding", "right padding without a mask", "left padding", "one row", "no mask, end is padding"]
)
def test_what_transformers_says_of_padding_is_said_of_a_cut_prompt(model, said, caplog, case):
    rows = 1 if case == "one row" else 2
    inputs = video_inputs(model, 12, videos_per_row=(1,) * rows, left_padding=(0, 3)[:rows])
    end = {"eos_token_id": 0} if case == "no mask, end is padding" else {}
    if "right" in case or rows == 1:
        inputs["input_ids"] = inputs["input_ids"].roll(-3, dims=1)
        inputs["attention_mask"] = inputs["attention_mask"].roll(-3, dims=1)
        inputs["input_ids"][:, -3:], inputs["attention_mask"][:, -3:] = 0, 0
    if "mask" in case:
        del inputs["attention_mask"]

    def warnings_of(words):
        caplog.clear()
        from transformers.generation.utils import logger as once

        once.warning_once.cache_clear()
        new_tokens(model, inputs, max_new_tokens=1, **end)
        return {word: bool(said(word)) for word in words}

    words = ("right-padding was detected", "attention mask")
    expected = warnings_of(words)
    assert expected[words[0]] == ("right" in case) or case == "no mask, end is padding"
    compiled(model)
    assert warnings_of(words) == expected


# --- The example ----------------------------------------------------------------------------------


def test_the_example_answers_as_the_pixels_do(tmp_path, monkeypatch, capsys):
    from earlytom_compile.cli.demo import write_demo_video
    from earlytom_compile.cli.loading import load_checkpoint, prepare_inputs
    from earlytom_compile.toyworld.model import WEIGHTS

    path = Path(__file__).parents[2] / "examples" / "follow_up.py"
    spec = importlib.util.spec_from_file_location("follow_up", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    first, second, *_ = (question.text for question in write_demo_video(tmp_path / "clip.mp4"))
    compile_, models = earlytom_compile.compile, []
    monkeypatch.setattr(
        earlytom_compile, "compile", lambda model, **o: models.append(compile_(model, lowering="eager", **o))
    )
    example.main(str(WEIGHTS), str(tmp_path / "clip.mp4"), first, second)
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2] == [first, second] and all(line.strip() for line in lines[1::2])

    loaded = load_checkpoint(str(WEIGHTS), device="cpu")
    inputs = prepare_inputs(loaded, tmp_path / "clip.mp4", first, frames=32, progress_on=Console(quiet=True))
    output = models[0].generate(**inputs, max_new_tokens=32, do_sample=False)
    answer = loaded.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert lines[1].strip() == answer.strip()
