import sys

import plain_python
import pytest
import rounding
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import (
    DTYPES,
    counts_lists,
    dtypes,
    laid_out,
    layouts,
    native_dtypes,
    operator_settings,
    ops,
    per_video,
    seeds,
    video,
)
from rounding import assert_within

from earlytom_compile.kernels.frame_similarity import _fixed_point_bits

shapes = st.tuples(st.integers(1, 12), st.integers(1, 7), st.integers(1, 9))


@operator_settings
@given(seed=seeds, shape=shapes, band=st.integers(1, 13), dtype=native_dtypes, layout=layouts)
def test_is_the_mean_cosine_of_the_pairs_in_the_band(seed, shape, band, dtype, layout):
    hidden = laid_out(video(seed, *shape, dtype), layout)
    actual = ops.frame_similarity(hidden, band)
    expected = plain_python.banded(hidden.double().numpy(), band)
    assert actual.dtype == torch.float32 and actual.is_contiguous()
    assert_within(actual, torch.from_numpy(expected), rounding.frame_similarity(hidden))


@pytest.mark.parametrize("tokens, channels", [(1, 1152), (196, 384), (729, 31), (1025, 8)])
def test_is_as_exact_for_the_shapes_of_real_encoders(tokens, channels):
    hidden = video(3, 5, tokens, channels)
    expected = plain_python.banded(hidden.double().numpy(), 4)
    error = (ops.frame_similarity(hidden, 4).double() - torch.from_numpy(expected)).abs().max()
    assert error <= rounding.frame_similarity(hidden)
    # Roundings of many channels fall this way and that. Of 4 standard deviations for the worst of 10 pairs: lengths are
    # off by half a sum of squares in blocks of 8 or more, coordinates by a step / sqrt(12).
    steps = 2.0 ** -_fixed_point_bits(tokens) / 12**0.5
    assert error <= rounding.UNIT + 4 * (rounding.UNIT * (channels / 8) ** 0.5 + rounding.UNIT + steps)


@operator_settings
@given(seed=seeds, shape=shapes, counts=counts_lists, band=st.integers(1, 9), dtype=dtypes)
def test_a_video_has_the_same_bits_alone_and_in_a_batch(seed, shape, counts, band, dtype):
    hidden = video(seed, sum(counts), *shape[1:], dtype)
    together = ops.frame_similarity(hidden, band)
    for rows in per_video(counts):
        alone = ops.frame_similarity(hidden[rows], band)
        inside = torch.arange(alone.shape[0])[:, None] > torch.arange(band)
        assert torch.equal(alone[inside], together[rows][inside])
        assert alone[~inside].eq(0).all()


@operator_settings
@given(seed=seeds, shape=shapes, dtype=dtypes, period=st.integers(1, 3))
def test_equal_frames_tie_bit_for_bit_at_every_distance(seed, shape, dtype, period):
    frames, tokens, channels = shape
    hidden = video(seed, period, tokens, channels, dtype).repeat(frames, 1, 1)
    similarity = ops.frame_similarity(hidden, len(hidden))
    for t in range(period, len(hidden)):
        for j in range(t):
            if j + 1 >= period:
                assert similarity[t, j] == similarity[t, (j + 1) % period - 1] or (j + 1) % period == 0
            if (j + 1) % period == 0:
                assert similarity[t, j] == 1.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frames", [4, 33])
def test_a_still_video_of_real_size_is_all_ones(frames, dtype):
    hidden = video(0, 1, 197, 384, dtype).repeat(frames, 1, 1)
    similarity = ops.frame_similarity(hidden, 7)
    assert similarity[torch.arange(frames)[:, None] > torch.arange(7)].eq(1).all()


def test_zero_tokens_have_cosine_zero():
    hidden = torch.ones(3, 4, 2)
    hidden[:, 0] = 0
    hidden[2, 1] = 0
    expected = torch.tensor([[0, 0], [0.75, 0], [0.5, 0.5]])
    assert_within(ops.frame_similarity(hidden, 2), expected, rounding.frame_similarity(hidden))


def test_frames_of_zeros_are_like_nothing():
    assert ops.frame_similarity(torch.zeros(3, 4, 2), 2).eq(0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_frame_that_cannot_be_compared_is_nan_and_no_other_is(bad):
    hidden = video(1, 5, 3, 4)
    hidden[2, 1, 3] = bad
    similarity = ops.frame_similarity(hidden, 4)
    touches = torch.zeros(5, 4, dtype=torch.bool)
    touches[2, :2] = touches[3, 0] = touches[4, 1] = True
    assert torch.equal(similarity.isnan(), touches)


def test_products_are_exact_so_that_no_order_of_summation_can_show():
    hidden = video(7, 6, 33, 20)
    kernel = sys.modules["earlytom_compile.kernels.frame_similarity"]
    bits = kernel._fixed_point_bits(33)
    unit, _ = kernel._fixed_point_tokens(hidden, bits)
    integers = [[int(value) for value in frame] for frame in unit.tolist()]
    assert torch.equal(unit, torch.tensor(integers, dtype=torch.float64))
    (products,), _ = kernel._products(hidden, [(0, 6, 0)])
    for a in range(6):
        for b in range(6):
            assert int(products[a, b]) == sum(x * y for x, y in zip(integers[a], integers[b], strict=True))
        assert sum(abs(x * x) for x in integers[a]) < 2**53


@pytest.mark.parametrize("tokens", [1, 2, 3, 196, 256, 257, 729, 1024, 1025, 4096])
def test_the_sum_over_all_tokens_fits_float64_and_loses_no_precision_to_it(tokens):
    bits = sys.modules["earlytom_compile.kernels.frame_similarity"]._fixed_point_bits(tokens)
    assert bits >= 20 and tokens * 4**bits <= 2**52 < 4 * tokens * 4 ** (bits + 1)


def test_is_the_same_with_any_number_of_threads_and_every_time():
    hidden, threads = video(5, 20, 50, 64), torch.get_num_threads()
    expected = ops.frame_similarity(hidden, 6)
    try:
        for number in (1, 2, 1, 2):
            torch.set_num_threads(number)
            assert torch.equal(ops.frame_similarity(hidden, 6), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "hidden, band, says",
    [
        (torch.ones(3, 4), 1, "3"),
        (torch.ones(3, 4, 5, dtype=torch.int64), 1, "int64"),
        (torch.ones(3, 0, 5), 1, r"\[3, 0, 5\]"),
        (torch.ones(0, 4, 5), 1, r"\[0, 4, 5\]"),
        (torch.ones(3, 4, 5), 0, "band=0"),
    ],
)
def test_refuses_what_means_nothing(hidden, band, says):
    with pytest.raises(ValueError, match=f"frame_similarity.*{says}"):
        ops.frame_similarity(hidden, band)
