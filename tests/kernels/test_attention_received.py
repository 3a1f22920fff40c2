import plain_python
import pytest
import rounding
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import DTYPES, laid_out, layouts, native_dtypes, operator_settings, ops, seeds
from rounding import assert_within

shapes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 7), st.integers(1, 9))


def query_and_key(seed, shape, dtype=torch.float32):
    return 2 * torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@operator_settings
@given(seed=seeds, shape=shapes, dtype=native_dtypes, layout=layouts, scale=st.sampled_from([0.125, 1.0, 3.0]))
def test_is_the_column_mean_of_the_attention_map(seed, shape, dtype, layout, scale):
    query, key = query_and_key(seed, shape, dtype)
    actual = ops.attention_received(laid_out(query, layout), laid_out(key, layout), scale)
    assert actual.dtype == torch.float32 and actual.is_contiguous()
    bound = rounding.attention_received(query, key, scale)
    for t in range(shape[0]):
        expected = plain_python.attention_received(query[t].double().numpy(), key[t].double().numpy(), scale)
        assert_within(actual[t], torch.from_numpy(expected), bound[t])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 4, 49, 72), (2, 6, 196, 64), (1, 1, 256, 80)])
def test_frames_are_independent_and_each_sums_to_one(shape, dtype):
    query, key = query_and_key(0, shape, dtype)
    together = ops.attention_received(query, key, shape[3] ** -0.5)
    assert_sums_to_one(together, shape)
    for t in range(shape[0]):
        assert torch.equal(
            ops.attention_received(query[t : t + 1], key[t : t + 1], shape[3] ** -0.5), together[t : t + 1]
        )


def assert_sums_to_one(received, shape):
    """[T, S] of [T, H, S, d]: probabilities are normed by sums of S terms, and summed over H * S of them and S."""
    _, heads, tokens, _ = shape
    assert_within(received.double().sum(1), torch.ones(len(received)), rounding.gamma((heads + 2) * tokens + 8))


def test_has_the_same_bits_in_20_runs():
    query, key = query_and_key(6, (2, 3, 50, 16))
    expected = ops.attention_received(query, key, 0.25)
    assert all(torch.equal(ops.attention_received(query, key, 0.25), expected) for _ in range(20))


def test_heads_split_from_one_projection_need_no_copy_to_be_right():
    projected = torch.randn(2, 10, 3 * 8)
    query = projected.view(2, 10, 3, 8).transpose(1, 2)
    expected = torch.softmax(query @ query.transpose(-1, -2) * 0.5, -1).mean((1, 2))
    bound = 2 * rounding.attention_received(query, query, 0.5)
    assert_within(ops.attention_received(query, query, 0.5), expected, bound)


def test_large_scores_do_not_overflow():
    query, key = query_and_key(1, (1, 2, 5, 4), torch.float16)
    received = ops.attention_received(query * 100, key * 100, 1.0)
    assert received.isfinite().all()
    assert_sums_to_one(received, query.shape)


def test_never_holds_the_attention_of_more_than_one_frame():
    query, key = query_and_key(0, (8, 2, 64, 8))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        ops.attention_received(query, key, 1.0)
    one_frame = 2 * 64 * 64 * 4
    held = peak = 0
    for event in profile.events():
        if event.name == "[memory]":
            held += event.cpu_memory_usage
            peak = max(peak, held)
    assert peak < 2 * one_frame


@pytest.mark.parametrize(
    "query, key, says",
    [
        (torch.ones(1, 2, 3, 4), torch.ones(1, 1, 3, 4), "repeat grouped key heads"),
        (torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4).half(), "float16"),
        (torch.ones(2, 3, 4), torch.ones(2, 3, 4), "3 axes"),
        (torch.ones(0, 2, 3, 4), torch.ones(0, 2, 3, 4), "empty"),
    ],
)
def test_refuses_what_means_nothing(query, key, says):
    with pytest.raises(ValueError, match=f"attention_received.*{says}"):
        ops.attention_received(query, key, 1.0)
