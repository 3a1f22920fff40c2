"""Where videos are in a prompt that LLaVA's own code makes: by hand, and as the prompt itself has them."""

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracle_llava import PLACEHOLDER
from tiny_llava import tiny_llava

from earlytom_compile.families.llava import Llava

WORD, PAD, WIDTH = 7, 0, 48


@pytest.fixture(scope="module")
def model():
    return tiny_llava(newline="grid", pool="average")


@st.composite
def prompts(draw):
    """(rows, images): rows of words and placeholders, and of each image whether it is a video, and its rows. A row of
    text passes over one of them; the last of them may stand for one placeholder more."""
    rows = draw(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=3))
    assume(max(map(len, rows)) > 1)  # else it is a step of decoding to the model
    taken = sum(sum(row) or 1 for row in rows)
    again = any(rows[-1]) and taken > 1 and draw(st.booleans())
    images = draw(st.lists(st.tuples(st.booleans(), st.integers(1, 5)), min_size=taken - again, max_size=taken - again))
    assume(any(is_video for is_video, _ in images))
    return rows, images


def by_hand(rows, images, length, left):
    """Which video of its row each position belongs to; None for padding."""
    waiting, found = iter(images), []
    for row in rows:
        numbers, video = [], 0
        for is_placeholder in row:
            is_video, size = next(waiting, images[-1]) if is_placeholder else (False, 1)
            numbers += [video if is_video else -1] * size
            video += is_video
        if not any(row):
            next(waiting)
        found.append(numbers[:length])
    longest = max(map(len, found))
    gaps = [[None] * (longest - len(numbers)) for numbers in found]
    return [gap + numbers if left else numbers + gap for gap, numbers in zip(gaps, found, strict=True)]


def call_of(rows, images, left):
    """(ids, call, sizes of the videos, rows of the others); a mask where rows differ in length."""
    longest = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        gap = longest - len(row)
        tokens, seen = [PLACEHOLDER if each else WORD for each in row], [1] * len(row)
        ids.append([PAD] * gap + tokens if left else tokens + [PAD] * gap)
        mask.append([0] * gap + seen if left else seen + [0] * gap)
    call = {
        # Encoded videos, and pictures, at which nobody looks.
        "images": [torch.zeros(size, WIDTH) if is_video else torch.zeros(3, 2, 2) for is_video, size in images],
        "modalities": ["video" if is_video else "image" for is_video, _ in images] + ["image"] * len(rows),
        "attention_mask": torch.tensor(mask) if any(0 in row for row in mask) else None,
    }
    sizes = [size for is_video, size in images if is_video]
    others = [(place, torch.zeros(size, WIDTH)) for place, (is_video, size) in enumerate(images) if not is_video]
    return torch.tensor(ids), call, sizes, others


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=prompts(), left=st.booleans(), came_left=st.booleans(), length=st.sampled_from([None, 4, 9]))
def test_every_position(model, drawn, left, came_left, length):
    rows, images = drawn
    ids, call, sizes, others = call_of(rows, images, came_left)
    model.config.tokenizer_padding_side, model.config.tokenizer_model_max_length = "left" if left else "right", length
    with torch.no_grad():
        found = Llava().prompt_videos(model, ids, call, sizes, others)
    expected = by_hand(rows, images, length, left)
    assert found.tolist() == [[-1 if number is None else number for number in row] for row in expected]
    assert found.dtype == torch.int64 and found.device.type == "cpu"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=prompts(), left=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_the_prompt_has_the_videos_there(model, drawn, left, dtype):
    """Each video is made of a number of its own, far from those of words."""
    rows, images = drawn
    ids, call, sizes, others = call_of(rows, images, left)
    model.config.tokenizer_padding_side, model.config.tokenizer_model_max_length = "left" if left else "right", None
    videos = [torch.full((size, WIDTH), 64.0 * (video + 1)) for video, size in enumerate(sizes)]
    with torch.no_grad():
        embeds = Llava().prompt(model, ids, call, videos, others).returned[4][..., 0]
        found = Llava().prompt_videos(model.to(dtype), ids, call, sizes, others)
        model.float()
    belongs = embeds >= 64
    assert torch.equal(found >= 0, belongs)
    for row, (numbers, values) in enumerate(zip(found, embeds, strict=True)):
        # Numbered in each row from 0, and one more where a video begins, which may be the one before once more.
        places = belongs[row].nonzero()[:, 0].tolist()
        for before, place in zip(places, places[1:], strict=False):
            if values[place] != values[before]:
                assert numbers[place] == numbers[before] + 1
        assert not places or numbers[places[0]] == 0


def test_a_batch_without_a_mask_pads_what_differs(model):
    """What the model pads by itself belongs to no video, on either side."""
    ids = torch.tensor([[WORD, PLACEHOLDER], [PLACEHOLDER, PLACEHOLDER]])
    _, call, sizes, others = call_of([[True], [True, True]], [(True, 2), (False, 1), (True, 3)], False)
    for side, row in (("left", [-1, -1, 0, 0]), ("right", [-1, 0, 0, -1])):
        model.config.tokenizer_padding_side, model.config.tokenizer_model_max_length = side, None
        with torch.no_grad():
            found = Llava().prompt_videos(model, ids, {**call, "attention_mask": None}, sizes, others)
        assert found.tolist() == [row, [-1, 0, 0, 0]]
