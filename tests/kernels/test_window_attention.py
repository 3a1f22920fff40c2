"""Attention inside windows, and the importance it gives, against attention over the whole frame with a mask."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import DTYPES, laid_out, layouts, native_dtypes, operator_settings, ops, seeds

windows = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5)), min_size=1, max_size=4).map(
    lambda sizes: [number for size in sizes for number in size]
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def operands(seed, frames, heads, places, width, dtype, count):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, frames, heads, places, width, generator=generator).to(dtype)


def window_of(sizes):
    """int64 [S]: the window of each place."""
    lengths = [length for number, length in zip(sizes[::2], sizes[1::2], strict=True) for _ in range(number)]
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def attention_map(query, key, sizes, scale):
    """float64 [T, H, S, S], nothing between two windows."""
    window = window_of(sizes)
    scores = query.double() @ key.double().mT * scale
    return scores.masked_fill(window[:, None] != window, -math.inf).softmax(-1)


@operator_settings
@given(
    seed=seeds, frames=st.integers(1, 3), heads=st.integers(1, 2), sizes=windows, dtype=native_dtypes, layout=layouts
)
def test_is_attention_with_the_windows_as_a_mask(seed, frames, heads, sizes, dtype, layout):
    given_ = operands(seed, frames, heads, len(window_of(sizes)), 6, dtype, 3)
    query, key, value = (laid_out(x, layout) for x in given_)
    mixed = ops.window_attention(query, key, value, sizes, 0.5)
    expected = attention_map(*given_[:2], sizes, 0.5) @ given_[2].double()
    assert mixed.dtype == dtype and mixed.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(mixed.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@operator_settings
@given(
    seed=seeds, frames=st.integers(1, 3), heads=st.integers(1, 2), sizes=windows, dtype=native_dtypes, layout=layouts
)
def test_a_place_receives_from_its_own_window_alone(seed, frames, heads, sizes, dtype, layout):
    query, key = operands(seed, frames, heads, len(window_of(sizes)), 6, dtype, 2)
    received = ops.window_attention_received(laid_out(query, layout), laid_out(key, layout), sizes, 0.5)
    assert received.dtype == torch.float32 and received.is_contiguous()
    expected = attention_map(query, key, sizes, 0.5).mean((1, 2))
    torch.testing.assert_close(received.double(), expected, atol=1e-6, rtol=1e-5)
    shares = torch.bincount(window_of(sizes)) / received.shape[1]
    by_window = torch.zeros(frames, len(shares)).index_add_(1, window_of(sizes), received)
    torch.testing.assert_close(by_window, shares.expand(frames, -1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_window_has_the_bits_of_attention_on_it_alone(dtype):
    query, key, value = operands(0, 3, 2, 20, 16, dtype, 3)
    mixed = ops.window_attention(query, key, value, [2, 8, 1, 4], 0.25)
    for start, stop in ((0, 8), (8, 16), (16, 20)):
        own = (x[:, :, start:stop].contiguous() for x in (query, key, value))
        alone = torch.nn.functional.scaled_dot_product_attention(*own, scale=0.25)
        assert torch.equal(mixed[:, :, start:stop], alone)


def test_one_window_is_the_whole_frame():
    query, key, value = operands(1, 2, 2, 9, 8, torch.float32, 3)
    whole = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.3)
    assert torch.equal(ops.window_attention(query, key, value, [1, 9], 0.3), whole)
    assert torch.equal(ops.window_attention_received(query, key, [1, 9], 0.3), ops.attention_received(query, key, 0.3))


@pytest.mark.parametrize("sizes", [[], [1], [2, 4], [1, 8, 1], [0, 4, 1, 9], [3, 3, 1, -1]])
def test_windows_that_are_not_the_places(sizes):
    query, key, value = operands(2, 1, 1, 9, 4, torch.float32, 3)
    with pytest.raises(ValueError, match=r"windows .* for 9 places; they are pairs"):
        ops.window_attention(query, key, value, sizes, 1.0)
    with pytest.raises(ValueError, match=r"windows .* for 9 places; they are pairs"):
        ops.window_attention_received(query, key, sizes, 1.0)


def test_operands_that_do_not_fit():
    query, key, value = operands(3, 1, 1, 4, 4, torch.float32, 3)
    with pytest.raises(ValueError, match="of one float dtype"):
        ops.window_attention(query, key.double(), value, [1, 4], 1.0)
    with pytest.raises(ValueError, match="of one float dtype"):
        ops.window_attention_received(query[0], key[0], [1, 4], 1.0)
    with pytest.raises(ValueError, match="without empty axes"):
        ops.window_attention(query, key[:, :, :3], value, [1, 4], 1.0)
