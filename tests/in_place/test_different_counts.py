"""Rows with different numbers of videos, and videos of different lengths in one call: each as it is alone."""

import pytest
import torch
from generating import compiled, new_tokens
from tiny_models import tokens_per_frame, video_inputs

from earlytom_compile import report

VARIANTS = ("paper", "released", "plus")
CALLS = {
    "in one row": [(12, 5)],
    "in rows of their own": [(12,), (5,)],
    "a row without one": [(9,), (), (3,)],
    "all at once": [(12, 5, 1), (7,), (), (5, 12)],
}


def one_row(model, frames, seed):
    """A row of ids and a list of its videos: the words of ``seed``, then each video and a word."""
    words = video_inputs(model, 1, videos_per_row=(0,), before=3, after=4, seed=seed)["input_ids"][0]
    ids, videos = list(words[:3]), []
    for nth, count in enumerate(frames):
        videos.append(video_inputs(model, count, seed=10 * seed + nth)["pixel_values_videos"][0])
        ids += [model.config.video_token_id] * (count * tokens_per_frame(model) + 1) + [words[nth]]
    return torch.tensor([*ids, *words[3:]]), videos


def batch(model, rows):
    """Padded on the left, with all videos in a list."""
    width = max(len(ids) for ids, _ in rows)
    pad = [(width - len(ids), 0) for ids, _ in rows]
    return {
        "input_ids": torch.stack([torch.nn.functional.pad(ids, p) for (ids, _), p in zip(rows, pad, strict=True)]),
        "attention_mask": torch.stack(
            [torch.nn.functional.pad(torch.ones_like(ids), p) for (ids, _), p in zip(rows, pad, strict=True)]
        ),
        "pixel_values_videos": [video for _, videos in rows for video in videos],
    }


def alone(model, row):
    inputs = batch(model, [row])
    return inputs if row[1] else {name: inputs[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("call", CALLS)
def test_generate_answers_each_row_as_alone(model, call, variant):
    rows = [one_row(model, frames, seed) for seed, frames in enumerate(CALLS[call])]
    compiled(model, variant=variant)
    expected = torch.cat([new_tokens(model, alone(model, row)) for row in rows])
    assert torch.equal(new_tokens(model, batch(model, rows)), expected)
    assert [video["frames"][0] for video in report(model).to_dict()["videos"]] == [n for f in CALLS[call] for n in f]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("call", CALLS)
def test_forward_gives_each_row_the_logits_it_has_alone(model, call, variant):
    rows = [one_row(model, frames, seed) for seed, frames in enumerate(CALLS[call])]
    compiled(model, variant=variant)
    with torch.no_grad():
        logits = model(**batch(model, rows)).logits
        for row, got in zip(rows, logits, strict=True):
            expected = model(**alone(model, row)).logits[0]
            torch.testing.assert_close(got[-len(expected) :], expected, atol=1e-4, rtol=1e-4)
