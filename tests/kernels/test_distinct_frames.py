"""Frames that repeat one exactly: numbered by their pixels, taken once, returned to all."""

from dataclasses import replace

import numpy as np
import plain_python
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import dtypes, laid_out, layouts, native_dtypes, operator_settings, ops, seeds
from test_plan_reuse import calls
from torch.library import opcheck


@st.composite
def videos_that_repeat(draw):
    """Calls of ``plan_reuse`` in which some frames are the frame before again, and some only in part of it."""
    call = draw(calls(dtype=dtypes))
    pixels = call.pixels.clone()
    for video in pixels:
        for f in range(1, len(video)):
            rows = draw(st.sampled_from([0, 0, 1, video.shape[2], video.shape[2], video.shape[2]]))
            video[f, :, :rows] = video[f - 1, :, :rows]
    return replace(call, pixels=pixels)


def repeats(call, pixels, source, f):
    """Whether all patches of frame f have the source that they had in f - 1, and the pixels of both to the last bit."""
    for p in range(call.grid[0] * call.grid[1]):
        now, before = (int(source[g, call.prefix + p]) for g in (f, f - 1))
        views = [plain_python.pixels_of(pixels[g], call.grid, call.patch, p) for g in (f, f - 1, now)]
        if now != before or not all(np.array_equal(views[0], view) for view in views[1:]):
            return False
    return True


def numbered(call, source):
    """rows and counts, one frame after the other."""
    rows, counts, number = [], [], -1
    for pixels, of_video in zip(call.pixels.float().numpy(), source, strict=True):
        first = [f == 0 or not repeats(call, pixels, of_video, f) for f in range(len(pixels))]
        counts.append(sum(first))
        for new in first:
            number += new
            rows.append(number)
    return rows, counts


@operator_settings
@given(call=videos_that_repeat(), layout=layouts)
def test_a_frame_repeats_the_one_before_where_all_its_patches_do(call, layout):
    source, change, _, _ = call.plan()
    rows, counts = ops.distinct_frames(laid_out(source, layout), laid_out(change, layout), call.prefix)
    assert rows.dtype == counts.dtype == torch.int64 and rows.is_contiguous()
    assert (rows.tolist(), counts.tolist()) == numbered(call, source)


@operator_settings
@given(call=videos_that_repeat())
def test_without_a_budget_and_a_threshold_every_frame_that_repeats_is_found(call):
    """Filling up takes none of its places, unless all of the video are computed."""
    call = replace(call, tau=0.0, budget=0)
    source, change, computed, measured = call.plan()
    rows, _ = ops.distinct_frames(source, change, call.prefix)
    height, width = (count * side for count, side in zip(call.grid, call.patch, strict=True))
    inside = call.pixels[..., :height, :width]
    for v, of_video in enumerate(rows.view(source.shape[:2])):
        if measured[v, 1] == 0 and computed[v] < call.every:
            same = (inside[v, 1:] == inside[v, :-1]).flatten(1).all(1)
            assert torch.equal(of_video[1:] == of_video[:-1], same)


def test_videos_are_numbered_one_after_the_other_and_never_share_a_frame():
    pixels = torch.zeros(3, 4, 1, 4, 4)
    pixels[0, 2:] = pixels[1, 1:3] = 1
    source, change, _, _ = ops.plan_reuse(pixels, [2, 2], [2, 2], 1, 0.0, 0)
    rows, counts = ops.distinct_frames(source, change, 1)
    assert rows.tolist() == [0, 0, 1, 1, 2, 3, 3, 4, 5, 5, 5, 5] and counts.tolist() == [2, 3, 1]


def test_leading_places_do_not_count_and_patches_do():
    source = torch.tensor([[[0, 0], [1, 0], [2, 0]]])
    change = torch.tensor([[[torch.inf, torch.inf], [torch.inf, 0.0], [torch.inf, 0.0]]])
    assert ops.distinct_frames(source, change, 1)[0].tolist() == [0, 0, 0]
    assert ops.distinct_frames(source, change, 0)[0].tolist() == [0, 1, 2]


def test_a_frame_that_differs_by_less_than_the_threshold_is_its_own():
    """And so is one that repeats it, since nobody compared the two."""
    pixels = torch.zeros(4, 1, 4, 4)
    pixels[1:3] = 0.125
    source, change, _, _ = ops.plan_reuse(pixels, [2, 2], [2, 2], 0, 0.25, 0)
    assert ops.distinct_frames(source, change, 0)[0].tolist() == [0, 1, 2, 3]


@operator_settings
@given(seed=seeds, counts=st.lists(st.integers(1, 4), min_size=1, max_size=6), dtype=native_dtypes, layout=layouts,
       shape=st.lists(st.integers(1, 4), max_size=3))  # fmt: skip
def test_takes_the_first_of_each_and_returns_it_to_all(seed, counts, dtype, layout, shape):
    rows = torch.tensor([number for number, count in enumerate(counts) for _ in range(count)])
    x = torch.randn(len(rows), *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    taken = ops.take_frames(laid_out(x, layout), rows, len(counts))
    assert taken.dtype == dtype and taken.is_contiguous()
    firsts = [sum(counts[:number]) for number in range(len(counts))]
    assert taken.tolist() == [x[first].tolist() for first in firsts]
    returned = ops.return_frames(laid_out(taken, layout), rows)
    assert returned.dtype == dtype and returned.is_contiguous()
    assert returned.tolist() == [x[firsts[number]].tolist() for number in rows.tolist()]
    assert torch.equal(ops.take_frames(returned, rows, len(counts)), taken)


@operator_settings
@given(call=videos_that_repeat())
def test_pixels_that_are_taken_and_returned_are_those_of_all_frames(call):
    """What is beside the grid belongs to nobody."""
    source, change, _, _ = call.plan()
    rows, counts = ops.distinct_frames(source, change, call.prefix)
    height, width = (count * side for count, side in zip(call.grid, call.patch, strict=True))
    frames = call.pixels[..., :height, :width].flatten(0, 1)
    taken = ops.take_frames(frames, rows, int(counts.sum()))
    assert len(taken) == counts.sum() and torch.equal(ops.return_frames(taken, rows), frames)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    source, change = torch.tensor([[[0, 0], [1, 0], [2, 0]]]), torch.ones(1, 3, 2)
    rows = torch.tensor([0, 0, 1])
    for prefix in (0, 1):
        opcheck(ops.distinct_frames.default, (source, change, prefix))
    for x in (torch.randn(3, 4, 2), torch.randn(3)):
        opcheck(ops.take_frames.default, (x.to(dtype), rows, 2))
        opcheck(ops.return_frames.default, (x[:2].to(dtype), rows))


@pytest.mark.parametrize(
    "op, changes, says",
    [
        ("distinct_frames", {"source": torch.zeros(2, 3, dtype=torch.int64)}, "int64 with 2 axes"),
        ("distinct_frames", {"source": torch.zeros(1, 3, 2)}, "got torch.float32"),
        ("distinct_frames", {"change": torch.zeros(1, 3, 2, dtype=torch.float64)}, "float64 with 3"),
        ("distinct_frames", {"change": torch.zeros(3, 2)}, "float32 with 2"),
        ("distinct_frames", {"change": torch.zeros(1, 3, 1)}, r"\[1, 3, 2\] and change \[1, 3, 1\]"),
        ("distinct_frames", {"prefix": -1}, "prefix=-1"),
        ("distinct_frames", {"prefix": 3}, "prefix=3"),
        ("take_frames", {"x": torch.tensor(1.0)}, "0 axes"),
        ("take_frames", {"x": torch.ones(2, 2)}, r"x \[2, 2\] and n=2 for rows \[0, 0, 1\]"),
        ("take_frames", {"n": 1}, "n=1"),
        ("take_frames", {"n": 3}, "n=3"),
        ("take_frames", {"rows": torch.zeros(1, 3, dtype=torch.int64)}, "int64 with 2 axes"),
        ("take_frames", {"rows": torch.zeros(3)}, "float32 with 1"),
        ("return_frames", {"rows": torch.zeros(3)}, "float32 with 1"),
        ("return_frames", {"x": torch.tensor(1.0)}, "0 axes"),
    ],
)
def test_refuses_what_means_nothing(op, changes, says):
    arguments = {
        "distinct_frames": {
            "source": torch.zeros(1, 3, 2, dtype=torch.int64), "change": torch.zeros(1, 3, 2), "prefix": 0,
        },
        "take_frames": {"x": torch.ones(3, 2), "rows": torch.tensor([0, 0, 1]), "n": 2},
        "return_frames": {"x": torch.ones(2, 2), "rows": torch.tensor([0, 0, 1])},
    }[op] | changes  # fmt: skip
    with pytest.raises(ValueError, match=f"{op}.*{says}"):
        getattr(ops, op)(*arguments.values())
