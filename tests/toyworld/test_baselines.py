"""Cheap baselines beside loops over frames and places, and their operations beside torch's own counter."""

from dataclasses import replace

import pytest
import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from torch_counter import counter

from earlytom_compile.toyworld import grids
from earlytom_compile.toyworld.answers import normalized
from earlytom_compile.toyworld.baselines import (
    AVERAGING,
    BASELINES,
    POOLING,
    SUBSAMPLING,
    averaged_frames,
    baseline,
    middle_frames,
    pooled,
)
from earlytom_compile.toyworld.checkpoint import build_model
from earlytom_compile.toyworld.evaluate import load_questions
from earlytom_compile.toyworld.language import build_tokenizer
from earlytom_compile.toyworld.model import SHAPE
from earlytom_compile.toyworld.world import FRAMES


@pytest.fixture(scope="module")
def model():
    return build_model(replace(SHAPE, vision_layers=3, text_layers=1), build_tokenizer(), seed=4).eval()


@pytest.fixture(scope="module")
def questions():
    return load_questions("validation", first=2, videos=3)


@pytest.fixture(scope="module")
def pixels(questions):
    return normalized(questions.frames[1])


GRIDS = st.tuples(st.integers(1, 8), st.integers(1, 4), st.integers(1, 4))


def block(place, of, blocks):
    """Places of a block: from where it begins, rounded down, to where it ends, rounded up."""
    return range(place * of // blocks, -(-(place + 1) * of // blocks))


@examples(40)
@given(st.integers(1, 8), GRIDS, st.integers(0, 2**32 - 1))
def test_tokens_are_averaged_over_blocks_of_time_and_place(frames, grid, seed):
    rows = torch.randn(frames, 16, 3, generator=torch.Generator().manual_seed(seed))
    found, (times, height, width) = pooled(rows, grid), grid
    expected = []
    for time in range(times):
        for y in range(height):
            for x in range(width):
                inside = [
                    rows[frame, 4 * row + column]
                    for frame in block(time, frames, times)
                    for row in block(y, 4, height)
                    for column in block(x, 4, width)
                ]
                expected.append(sum(inside) / len(inside))
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-6)


@given(st.integers(1, 12), st.data())
def test_fewer_frames_come_from_parts_as_equal_as_they_can_be(frames, data):
    count = data.draw(st.integers(1, frames))
    numbers = torch.arange(frames, dtype=torch.float32)[:, None]
    taken, averaged = middle_frames(numbers, count)[:, 0].tolist(), averaged_frames(numbers, count)[:, 0].tolist()
    assert len(set(taken)) == count and taken == sorted(taken)
    for part, frame in enumerate(taken):
        assert frame <= (part + 0.5) * frames / count < frame + 1
    longer, first = frames % count, 0
    for part, mean in enumerate(averaged):
        length = frames // count + (part < longer)
        assert mean == pytest.approx(first + (length - 1) / 2)
        first += length
    assert first == frames


@pytest.mark.parametrize("name, frames", [(SUBSAMPLING, 3), (AVERAGING, 3), (POOLING, None)])
@pytest.mark.parametrize("grid", [None, (2, 3, 2)])
def test_each_is_the_models_own_features_of_other_frames_and_then_means(model, pixels, name, frames, grid):
    found = baseline(name, model, frames=frames, grid=grid)(pixels)
    fewer = {SUBSAMPLING: pixels[[1, 4, 6]], POOLING: pixels}.get(name)
    if name == AVERAGING:
        fewer = torch.stack([pixels[:3].mean(0), pixels[3:6].mean(0), pixels[6:].mean(0)])
    with torch.no_grad():
        rows = model.model.get_video_features(fewer[None], return_dict=True).pooler_output[0][:-1].view(-1, 16, 128)
    if name == POOLING and grid is None:
        grid = (32, 2, 2)  # without a ratio: as many blocks as there are tokens
    expected = rows.flatten(0, 1) if grid is None else pooled(rows, grid)
    torch.testing.assert_close(found.tokens, expected, rtol=1e-5, atol=1e-6)
    assert found.work == len(fewer) / FRAMES


@pytest.mark.parametrize("ratio, frames, times", [(0.25, 2, 8), (0.15, 1, 5), (0.1, 1, 3), (1.0, 8, 32)])
def test_a_ratio_decides_what_is_not_given(model, ratio, frames, times):
    made = {name: baseline(name, model, ratio) for name in BASELINES}
    assert {name: one.sizes(8) for name, one in made.items()} == {
        SUBSAMPLING: (frames, None), AVERAGING: (frames, None), POOLING: (8, (times, 2, 2)),
    }  # fmt: skip


@pytest.mark.parametrize("name, frames", [(SUBSAMPLING, 3), (AVERAGING, 5), (POOLING, None)])
def test_operations_are_what_torch_counts(model, pixels, name, frames):
    compress = baseline(name, model, frames=frames, grid=(2, 2, 2))
    with counter() as counted:
        compress.tokens(pixels)
    assert compress(pixels).flops == counted.get_total_flops()


def test_every_shape_of_blocks_is_tried_and_only_better_ones_stay(model, questions):
    found = grids.tried(model, questions, AVERAGING, 2)
    assert sorted(one.grid for one in found) == [(t, y, x) for t in (1, 2) for y in range(1, 5) for x in range(1, 5)]
    assert list(grids.sources()) == [
        (POOLING, 8), *((name, frames) for name in (SUBSAMPLING, AVERAGING) for frames in range(1, 8)),
    ]  # fmt: skip
    assert all(0 <= one.right <= 1 and one.tokens == one.grid[0] * one.grid[1] * one.grid[2] for one in found)


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 4))))
def test_of_equally_many_tokens_the_best_stays_unless_fewer_do_as_well(drawn):
    found = [grids.Tried(POOLING, 8, (times, side, 1), right / 4) for times, side, right in drawn]
    best = grids.best(found)
    assert [one.tokens for one in best] == sorted({one.tokens for one in best})
    for one in found:
        assert any(other.tokens <= one.tokens and other.right >= one.right for other in best)
    assert all(not (a.tokens <= b.tokens and a.right >= b.right) for a in best for b in best if a is not b)
