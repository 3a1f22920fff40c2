import math
from fractions import Fraction

import numpy as np
import plain_python
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import DTYPES, laid_out, layouts, native_dtypes, operator_settings, ops, per_video, seeds
from rounding import gamma

from earlytom_compile.kernels.select_representatives import MOST_OF_SHARE, TIE, WINDOW, near_equal
from earlytom_compile.reference import select_representatives


def rounding_of_gains(tokens, channels):
    """Of a float32 gain: a sum of likenesses, which come to no more than ``tokens`` in all.

    A likeness is a sum of C products over the root of two more, times a length as a multiple of the mean of all. Sums
    over tokens are made of sums of halves.
    """
    return tokens * gamma(2 * channels + 2 * math.ceil(math.log2(tokens)) + 9)


def tokens_of_few_kinds(seed, frames, tokens, channels, kinds, noise):
    """[frames, tokens, channels]: with ``noise=0`` copies of at most ``kinds`` tokens, so that gains tie."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(kinds, (frames, tokens), generator=generator)
    different = torch.randn(frames, tokens, channels, generator=generator)
    return torch.randn(kinds, channels, generator=generator)[kind] + noise * different


@st.composite
def videos(draw):
    """features, counts."""
    counts = draw(st.lists(st.integers(1, 18), min_size=1, max_size=3))
    noise = draw(st.sampled_from([0.0, 0.1, 1.0]))
    sizes = sum(counts), draw(st.sampled_from([1, 2, 3, 5, 7, 17])), draw(st.integers(1, 5))
    features = tokens_of_few_kinds(draw(seeds), *sizes, draw(st.integers(1, 6)), noise)
    return features.to(draw(native_dtypes)), counts


def budget_of(features, counts, share):
    return max(1, int(share * min(counts) * features.shape[1]))


@operator_settings
@given(video=videos(), share=st.floats(0, 1), layout=layouts)
def test_takes_the_token_that_adds_most_by_the_rules_read_literally(video, share, layout):
    features, counts = video
    budget = budget_of(features, counts, share)
    tokens, kept = ops.select_representatives(laid_out(features, layout), torch.tensor(counts), budget)
    check(features, counts, budget, tokens, kept)


def check(features, counts, budget, tokens, kept):
    """Shapes, order and the choice itself."""
    assert tokens.shape == (len(counts), budget, features.shape[2]) and tokens.dtype == features.dtype
    assert kept.shape == (len(counts), budget, 2) and kept.dtype == torch.int64
    for index, rows in enumerate(per_video(counts)):
        frame, token = kept[index].unbind(1)
        assert torch.equal(tokens[index], features[rows][frame, token])
        places = (frame * features.shape[1] + token).tolist()
        assert places == sorted(set(places))
        check_blocks(features[rows].float().numpy(), set(places), budget)


def check_blocks(video, places, budget):
    """Every block keeps what adds most, and no other block's next token would have added more."""
    (frames, tokens), channels = video.shape[:2], video.shape[2]
    last, following = [], []
    for window, block in plain_python.blocks(frames, tokens):
        first = window.start * tokens
        inside = [place - first for place in block]
        alike = plain_python.likeness(video[window.start : window.stop])[np.ix_(inside, inside)]
        kept = {number for number, place in enumerate(block) if place in places}
        rounding = rounding_of_gains(len(window) * tokens, channels)
        gain = plain_python.last_gain(alike, kept, TIE, rounding)
        assert not math.isnan(gain)
        last.append(gain)
        limit = min(len(block), math.ceil(Fraction(MOST_OF_SHARE * budget * len(block), frames * tokens)))
        assert len(kept) <= limit
        if len(kept) < limit:
            following.append(plain_python.next_gain(alike, kept) - rounding)
    assert min(last) >= max(following, default=-math.inf) - TIE - rounding_of_gains(min(frames, 8) * tokens, channels)


@pytest.mark.parametrize("seed", range(20))
def test_keeps_what_the_specification_keeps(seed):
    frames, noise = 1 + seed, (seed % 3) / 2
    features = tokens_of_few_kinds(seed, frames, 5, 8, kinds=4, noise=noise)
    _, kept = ops.select_representatives(features, torch.tensor([frames]), max(1, round(0.3 * (frames + 2) * 5)))
    expected = select_representatives(features, frames_in=frames + 2, retain_ratio=0.3)
    assert torch.equal(kept[0], expected)


@operator_settings
@given(video=videos(), share=st.floats(0, 1))
def test_a_video_keeps_the_same_alone_and_in_a_batch(video, share):
    features, counts = video
    budget = budget_of(features, counts, share)
    tokens, kept = ops.select_representatives(features, torch.tensor(counts), budget)
    for index, rows in enumerate(per_video(counts)):
        alone = ops.select_representatives(features[rows], torch.tensor(counts[index : index + 1]), budget)
        assert torch.equal(alone[0][0], tokens[index]) and torch.equal(alone[1][0], kept[index])


def test_is_the_same_in_twenty_runs():
    features, counts = torch.randn(17, 9, 16, generator=torch.Generator().manual_seed(5)), torch.tensor([9, 8])
    first = ops.select_representatives(features, counts, 20)
    for _ in range(19):
        for a, b in zip(ops.select_representatives(features, counts, 20), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "frames, sizes",
    [(1, [1]), (7, [7]), (8, [8]), (9, [5, 4]), (16, [8, 8]), (17, [6, 6, 5]), (25, [7, 6, 6, 6]), (32, [8] * 4)],
)
def test_windows_are_near_equal_and_follow_one_another(frames, sizes):
    windows = near_equal(frames, WINDOW)
    assert [end - begin for begin, end in windows] == sizes
    assert [frame for begin, end in windows for frame in range(begin, end)] == list(range(frames))


def test_a_rare_thing_gets_a_token_and_a_common_one_not_more():
    background, thing = torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0])
    features = background.repeat(4, 6, 1)
    features[2, 3] = thing
    _, kept = ops.select_representatives(features, torch.tensor([4]), 2)
    assert kept[0].tolist() == [[1, 0], [2, 3]]  # background of frame 1 is nearer to all frames than that of frame 0


def test_each_kind_is_kept_once_before_any_is_kept_twice():
    kinds = torch.eye(6)
    features = kinds[torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, 3, 3, 4, 5]])]
    _, kept = ops.select_representatives(features, torch.tensor([2]), 6)
    assert kept[0].tolist() == [[0, 0], [0, 3], [0, 5], [1, 2], [1, 4], [1, 5]]
    # Only the first kind is in both frames: its copies in the other one are not fully represented yet.
    _, more = ops.select_representatives(features, torch.tensor([2]), 8)
    assert more[0].tolist() == [[0, 0], [0, 1], [0, 3], [0, 5], [1, 0], [1, 2], [1, 4], [1, 5]]


def test_what_moves_keeps_tokens_at_several_times():
    features = torch.zeros(7, 9, 4)
    for frame in range(7):
        features[frame, frame] = torch.tensor([0, 3.0, 0, 0])  # the same thing, one place further
    _, kept = ops.select_representatives(features, torch.tensor([7]), 5)
    things = [frame for frame, token in kept[0].tolist() if frame == token]
    assert len(things) == 2 and things[1] - things[0] >= 2  # and three tokens for the background


def test_what_is_far_from_the_mean_counts_more():
    features = torch.diag(torch.tensor([1.0, 1.0, 3.0, 1.0]))[None]
    _, kept = ops.select_representatives(features, torch.tensor([1]), 1)
    assert kept[0].tolist() == [[0, 2]]


def test_equal_tokens_keep_the_lower_index_in_blocks_that_take_turns():
    features = torch.full((9, 4, 3), 0.1)
    _, kept = ops.select_representatives(features, torch.tensor([9]), 7)
    # Windows of 5 and 4 frames; the first one begins.
    assert kept[0].tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [5, 0], [5, 1], [5, 2]]
    _, kept = ops.select_representatives(torch.full((2, 33, 3), 0.1), torch.tensor([2]), 4)
    assert kept[0].tolist() == [[0, 0], [0, 1], [0, 11], [0, 22]]


@pytest.mark.parametrize("seed", range(10))
def test_rounding_does_not_choose_among_copies(seed):
    features = tokens_of_few_kinds(seed, 4, 6, 8, kinds=9, noise=0)
    noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(seed))
    exact, rounded = (
        ops.select_representatives(x, torch.tensor([4]), 12)[1] for x in (features, features * (1 + 1e-6 * noise))
    )
    assert torch.equal(exact, rounded)


def test_autocast_changes_nothing():
    features, counts = torch.randn(8, 16, 64, generator=torch.Generator().manual_seed(3)), torch.tensor([8])
    expected = ops.select_representatives(features, counts, 30)
    with torch.autocast("cpu", torch.bfloat16):
        actual = ops.select_representatives(features, counts, 30)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


def test_a_budget_below_one_token_a_block_goes_to_what_differs():
    features = torch.zeros(24, 2, 3)
    features[8:16, 1, 0] = 1.0
    _, kept = ops.select_representatives(features, torch.tensor([24]), 2)
    assert kept[0].tolist() == [[11, 0], [11, 1]]  # the one nearest to all eight frames, of either kind


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_budget_of_everything_keeps_everything_in_order(dtype):
    features = torch.randn(20, 3, 2).to(dtype)
    tokens, _ = ops.select_representatives(features, torch.tensor([10, 10]), 30)
    assert torch.equal(tokens, features.view(2, 30, 2))


@pytest.mark.parametrize("tokens", [1, 5])
def test_one_frame(tokens):
    features = torch.randn(1, tokens, 4)
    kept = ops.select_representatives(features, torch.tensor([1]), tokens)[1]
    assert kept[0].tolist() == [[0, token] for token in range(tokens)]


@pytest.mark.parametrize(
    "features, counts, says",
    [
        (torch.randn(4, 3), [3, 1], "2 axes"),
        (torch.ones(4, 3, 2, dtype=torch.int64), [3, 1], "int64"),
        (torch.full((4, 3, 2), torch.nan), [3, 1], "NaN or inf"),
        (torch.full((4, 3, 2), -torch.inf), [3, 1], "NaN or inf"),
        (torch.full((4, 3, 2), 1e300, dtype=torch.float64), [3, 1], "NaN or inf"),
        (torch.randn(4, 3, 2), [3, 2], r"counts=\[3, 2\] over 4 frames"),
        (torch.randn(4, 3, 2), [4, 0], r"counts=\[4, 0\]"),
        (torch.randn(4, 3, 2), [3.0, 1.0], "float32"),
        (torch.randn(4, 3, 2), [[3, 1]], "2 axes"),
        (torch.randn(0, 3, 2), [], "counts must be|counts="),
    ],
)
def test_refuses_what_means_nothing(features, counts, says):
    with pytest.raises(ValueError, match=f"select_representatives:.*({says})"):
        ops.select_representatives(features, torch.tensor(counts), 1)


@pytest.mark.parametrize("budget", [0, -1, 4])
def test_refuses_a_budget_that_a_video_cannot_fill(budget):
    with pytest.raises(ValueError, match=rf"budget={budget}, but a video has [13] frames of 3 tokens"):
        ops.select_representatives(torch.randn(4, 3, 2), torch.tensor([3, 1]), budget)
