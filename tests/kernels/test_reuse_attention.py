import plain_python
import pytest
import rounding
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import DTYPES, active_places, laid_out, layouts, native_dtypes, operator_settings, ops, seeds, sources
from rounding import assert_within

shapes = st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 7))
shares = st.sampled_from([0.0, 0.3, 1.0])


def packed_for_attention(seed, source, heads, width, dtype=torch.float32):
    """(query, key, value, rows, offsets)."""
    index, rows, offsets = ops.pack_places(source, active_places(source))
    shape = (3, 1, heads, len(index), width)
    return *(2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype), rows, offsets


def bound_of(query, key, value, rows, offsets, scale, unit=rounding.UNIT):
    """[1, H, T, d], frame by frame."""
    borders = offsets.tolist()
    bounds = [
        rounding.attention(query[0, :, start:stop], key[0][:, rows[frame]], value[0][:, rows[frame]], scale, unit)
        for frame, (start, stop) in enumerate(zip(borders, borders[1:], strict=False))
    ]
    return torch.cat(bounds, 1)[None]


@operator_settings
@given(
    seed=seeds,
    shape=shapes,
    share=shares,
    heads=st.integers(1, 3),
    width=st.integers(1, 9),
    dtype=native_dtypes,
    layout=st.tuples(layouts, layouts, layouts),
    scale=st.sampled_from([0.125, 1.0, -0.5, 0.0]),
)
def test_is_attention_of_active_queries_to_all_places(seed, shape, share, heads, width, dtype, layout, scale):
    *three, rows, offsets = packed_for_attention(seed, sources(seed, *shape, share), heads, width, dtype)
    laid = [laid_out(x, how) for x, how in zip(three, layout, strict=True)]
    actual = ops.reuse_attention(*laid, rows, offsets, scale)
    assert actual.dtype == dtype and actual.shape == three[0].shape and actual.transpose(1, 2).is_contiguous()
    wide = [x[0].double().numpy() for x in three]
    expected = plain_python.reuse_attention(*wide, rows.tolist(), offsets.tolist(), scale)
    assert_within(actual[0], torch.from_numpy(expected), bound_of(*three, rows, offsets, scale)[0])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("frames, heads, places, width", [(3, 4, 49, 72), (2, 2, 257, 64), (5, 3, 196, 16)])
@pytest.mark.parametrize("by_row", [True, False])
def test_with_every_place_active_has_the_bits_of_full_attention(frames, heads, places, width, dtype, by_row):
    generator = torch.Generator().manual_seed(0)
    if by_row:  # heads split from a projection
        three = torch.randn(3, frames, places, heads, width, generator=generator).to(dtype).transpose(2, 3)
    else:
        three = torch.randn(3, frames, heads, places, width, generator=generator).to(dtype)
    source = torch.arange(frames)[:, None].expand(1, frames, places)
    _, rows, offsets = ops.pack_places(source, frames * places)
    packed = [x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for x in three]
    actual = ops.reuse_attention(*packed, rows, offsets, 0.3)
    expected = F.scaled_dot_product_attention(*three, scale=0.3)
    assert torch.equal(actual[0].transpose(0, 1).unflatten(0, (frames, places)), expected.transpose(1, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_video_has_the_bits_it_has_alone(dtype):
    source = sources(3, 3, 4, 30)
    query, key, value, rows, offsets = packed_for_attention(0, source, 2, 24, dtype)
    together = ops.reuse_attention(query, key, value, rows, offsets, 0.3)
    for v in range(3):
        start, stop = offsets[4 * v], offsets[4 * v + 4]
        own = [x[:, :, start:stop] for x in (query, key, value)]
        alone = ops.reuse_attention(*own, rows[4 * v : 4 * v + 4] - start, offsets[4 * v : 4 * v + 5] - start, 0.3)
        assert torch.equal(alone, together[:, :, start:stop])


def test_has_the_same_bits_in_20_runs():
    inputs = packed_for_attention(6, sources(6, 1, 5, 40), 2, 16)
    expected = ops.reuse_attention(*inputs, 0.25)
    assert all(torch.equal(ops.reuse_attention(*inputs, 0.25), expected) for _ in range(20))


def test_keys_in_another_order_are_gathered_though_all_are_the_frames_own():
    """Rows that no plan has: the last place reads the first row."""
    query, key, value, rows, offsets = packed_for_attention(1, torch.zeros(1, 1, 5, dtype=torch.int64), 1, 4)
    value = torch.arange(5.0)[None, None, :, None].expand(1, 1, 5, 4)
    rows = torch.tensor([[1, 1, 1, 1, 1]])
    assert (ops.reuse_attention(query, key, value, rows, offsets, 1.0) == 1).all()


def test_frames_without_active_places_take_no_time_from_the_others():
    """A still video of many frames attends once."""
    source = torch.zeros(1, 50, 6, dtype=torch.int64)
    query, key, value, rows, offsets = packed_for_attention(2, source, 2, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.reuse_attention(query, key, value, rows, offsets, 1.0)
    calls = [event.count for event in profile.key_averages() if event.key == "aten::scaled_dot_product_attention"]
    assert calls == [1]


def test_a_value_that_is_not_finite_stays_in_the_frames_that_read_it():
    source = torch.tensor([[[0, 0, 0], [0, 1, 0], [2, 2, 2]]])
    query, key, value, rows, offsets = packed_for_attention(2, source, 2, 8)
    value[0, :, 0] = float("nan")
    attended = ops.reuse_attention(query, key, value, rows, offsets, 1.0)[0].isnan().any(-1).all(0)
    assert attended.tolist() == [True, True, True, True, False, False, False]


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"query": torch.ones(2, 4, 3)}, "float32 with 3 axes"),
        ({"query": torch.ones(1, 2, 4, 3).half()}, "float16"),
        ({"key": torch.ones(1, 1, 4, 3)}, "repeat grouped heads"),
        ({"value": torch.ones(1, 2, 4, 5)}, "same shape"),
        ({"rows": torch.ones(2, 3)}, "float32 with 2 axes"),
        ({"rows": torch.zeros(2, 0, dtype=torch.int64)}, "must not be 0"),
        ({"rows": torch.zeros(3, 3, dtype=torch.int64)}, "3 offsets"),
        ({"offsets": torch.tensor([[0, 3, 4]])}, "with 2$"),
        ({"offsets": torch.tensor([0, 4])}, "2 offsets"),
        ({"offsets": torch.tensor([0, 3, 5])}, r"\[0, 3, 5\] do not ascend from 0 to the 4"),
        ({"offsets": torch.tensor([1, 3, 4])}, r"\[1, 3, 4\]"),
        ({"offsets": torch.tensor([0, 5, 4])}, r"\[0, 5, 4\]"),
        ({"rows": torch.tensor([[0, 1, 2], [0, 4, 2]])}, "from 0 to 4, but 4 rows"),
        ({"rows": torch.tensor([[0, 1, 2], [0, -1, 2]])}, "from -1"),
    ],
)
def test_refuses_what_means_nothing(changes, says):
    x = torch.ones(1, 2, 4, 3)
    arguments = {"query": x, "key": x, "value": x, "rows": torch.tensor([[0, 1, 2], [0, 3, 2]])}
    arguments |= {"offsets": torch.tensor([0, 3, 4])} | changes
    with pytest.raises(ValueError, match=f"(?s)reuse_attention.*{says}"):
        ops.reuse_attention(*arguments.values(), 1.0)
