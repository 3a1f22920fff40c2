"""Which positions of a prompt stay, by rules that a few lines can say."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from earlytom_compile import EarlyTomConfigError
from earlytom_compile.prompt import PromptCut, locate_pieces

VIDEO, PAD = 9, 0
frames = st.lists(st.integers(1, 4), min_size=1, max_size=4)  # placeholders of each frame
rows = st.lists(st.lists(frames, max_size=3), min_size=1, max_size=3)


TEXT = itertools.count(10)


def prompt_of(row, text=TEXT):
    """A time stamp before each frame, and text around: ids, and the size of each video."""
    ids = [next(text)]
    for video in row:
        for count in video:
            ids += [next(text), *[VIDEO] * count]
        ids.append(next(text))
    return ids, [sum(video) for video in row]


def batch(layouts):
    prompts = [prompt_of(row) for row in layouts]
    length = max(len(ids) for ids, _ in prompts)
    ids = torch.tensor([[PAD] * (length - len(ids)) + ids for ids, _ in prompts])
    return ids, [size for _, sizes in prompts for size in sizes]


@given(layouts=rows)
def test_pieces_are_the_runs_of_each_video(layouts):
    ids, sizes = batch(layouts)
    found = locate_pieces(ids, VIDEO, sizes)
    assert [[[len(run) for run in video] for video in row] for row in found] == layouts
    assert all((ids[r, run.start : run.stop] == VIDEO).all() for r, row in enumerate(found) for v in row for run in v)


@pytest.mark.parametrize("sizes", [[3], [2, 2], [5, 1], [6], [4, 1], [4, 1, 1]])
def test_runs_that_are_not_the_videos(sizes):
    ids = torch.tensor([[5, 9, 9, 6, 9, 9, 7, 9, 8]])  # runs of 2, 2 and 1
    if sum(sizes) == 5 and sizes[0] in (2, 4):
        assert len(locate_pieces(ids, VIDEO, sizes)[0]) == len(sizes)
    else:
        with pytest.raises(EarlyTomConfigError, match=r"5 video placeholder tokens \(id 9\), but its"):
            locate_pieces(ids, VIDEO, sizes)


@given(layouts=rows, data=st.data())
def test_text_stays_and_padding_is_on_the_left(layouts, data):
    ids, sizes = batch(layouts)
    stay = [sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1))) for size in sizes]
    plan = PromptCut.plan(ids, locate_pieces(ids, VIDEO, sizes), [torch.tensor(places) for places in stay])
    for row, positions in zip(ids.tolist(), plan.positions.tolist(), strict=True):
        text = [i for i, token in enumerate(row) if token != VIDEO]
        kept = [position for position in positions if position >= 0]
        assert kept == sorted(kept) and set(text) <= set(kept), "all text stays, in its order"
        assert positions[: len(positions) - len(kept)] == [-1] * (len(positions) - len(kept))
    taken = plan.take(ids, PAD)
    assert (taken == VIDEO).sum() == sum(map(len, stay))


@given(layouts=rows, data=st.data())
def test_each_video_keeps_the_places_that_were_asked_for(layouts, data):
    ids, sizes = batch(layouts)
    stay = [sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1))) for size in sizes]
    plan = PromptCut.plan(ids, locate_pieces(ids, VIDEO, sizes), [torch.tensor(places) for places in stay])
    pending = list(zip(sizes, stay, strict=True))
    for row, positions in zip(ids.tolist(), plan.positions.tolist(), strict=True):
        placeholders = [i for i, token in enumerate(row) if token == VIDEO]
        kept = [i for i in positions if i >= 0 and row[i] == VIDEO]
        expected = []
        while placeholders:
            size, places = pending.pop(0)
            expected += [placeholders[place] for place in places]
            placeholders = placeholders[size:]
        assert kept == expected
    assert not pending
