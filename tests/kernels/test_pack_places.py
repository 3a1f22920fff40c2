import plain_python
import pytest
import rounding
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import DTYPES, active_places, laid_out, layouts, native_dtypes, operator_settings, ops, seeds, sources
from rounding import assert_within

shapes = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 9))
shares = st.sampled_from([0.0, 0.3, 1.0])


def packed(source):
    return ops.pack_places(source, active_places(source))


def drawn(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@operator_settings
@given(seed=seeds, shape=shapes, share=shares, layout=layouts)
def test_numbers_active_places_frame_after_frame(seed, shape, share, layout):
    source = sources(seed, *shape, share)
    laid = source if layout == "contiguous" else source.transpose(0, 2).contiguous().transpose(0, 2)
    parts = packed(laid)
    expected = plain_python.packed_places(source.tolist())
    for part, numbers in zip(parts, expected, strict=True):
        assert part.dtype == torch.int64 and part.is_contiguous() and part.tolist() == numbers


@operator_settings
@given(seed=seeds, shape=shapes, share=shares)
def test_a_video_is_packed_as_it_would_be_alone(seed, shape, share):
    source = sources(seed, *shape, share)
    index, rows, offsets = packed(source)
    videos, frames, places = shape
    for v in range(videos):
        own = packed(source[v : v + 1])
        first, start = v * frames, offsets[v * frames]
        assert torch.equal(own[0] + first * places, index[start : offsets[first + frames]])
        assert torch.equal(own[1] + start, rows[first : first + frames])
        assert torch.equal(own[2] + start, offsets[first : first + frames + 1])


@operator_settings
@given(seed=seeds, shape=shapes, share=shares, channels=st.integers(1, 5), dtype=native_dtypes, layout=layouts)
def test_takes_active_places_and_gives_them_back(seed, shape, share, channels, dtype, layout):
    videos, frames, places = shape
    source = sources(seed, *shape, share)
    hidden = drawn(seed, videos * frames, places, channels, dtype=dtype)
    index, rows, _ = packed(source)
    taken = ops.take_places(laid_out(hidden, layout), index)
    assert taken.dtype == dtype and taken.shape == (1, len(index), channels) and taken.is_contiguous()
    expected = [hidden[place // places, place % places].tolist() for place in index.tolist()]
    assert taken[0].tolist() == expected
    assert torch.equal(ops.return_places(laid_out(hidden, layout), taken, index, rows), hidden), "nothing was changed"


@operator_settings
@given(
    seed=seeds,
    shape=shapes,
    share=shares,
    channels=st.integers(1, 5),
    dtype=native_dtypes,
    layout=st.tuples(layouts, layouts),
)
def test_an_inactive_place_changes_as_its_source_did(seed, shape, share, channels, dtype, layout):
    videos, frames, places = shape
    source = sources(seed, *shape, share)
    hidden = drawn(seed, videos * frames, places, channels, dtype=dtype)
    index, rows, _ = packed(source)
    new = drawn(seed + 1, 1, len(index), channels, dtype=dtype)
    out = ops.return_places(laid_out(hidden, layout[0]), laid_out(new, layout[1]), index, rows)
    assert out.dtype == dtype and out.shape == hidden.shape and out.is_contiguous()
    row_of = {place: row for row, place in enumerate(index.tolist())}
    expected, active = hidden.double().clone(), torch.zeros(videos * frames, places, dtype=torch.bool)
    for n in range(videos * frames):
        video, frame = divmod(n, frames)
        for s in range(places):
            computed = video * frames + int(source[video, frame, s])
            after = new[0, row_of[computed * places + s]].double()
            active[n, s] = computed == n
            expected[n, s] = after if active[n, s] else expected[n, s] + (after - hidden[computed, s].double())
    assert torch.equal(out[active].double(), expected[active])
    assert_within(out, expected, rounding.return_places(hidden, new, index, rows))


@operator_settings
@given(
    seed=seeds, shape=shapes, share=shares, heads=st.integers(1, 3), width=st.integers(1, 5), dtype=native_dtypes,
    layout=layouts,
)  # fmt: skip
def test_spreads_rows_to_all_places(seed, shape, share, heads, width, dtype, layout):
    source = sources(seed, *shape, share)
    index, rows, _ = packed(source)
    given_ = drawn(seed, 1, heads, len(index), width, dtype=dtype)
    spread = ops.spread_places(laid_out(given_, layout), rows)
    frames, places = rows.shape
    assert spread.dtype == dtype and spread.shape == (frames, heads, places, width)
    assert spread.transpose(1, 2).is_contiguous()
    for n in range(frames):
        for s in range(places):
            assert torch.equal(spread[n, :, s], given_[0, :, rows[n, s]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_active_places_are_exact_copies_whatever_they_hold(dtype):
    source = torch.tensor([[[0, 0, 0], [0, 1, 0]]])
    index, rows, _ = packed(source)
    hidden, new = torch.full((2, 3, 1), float("inf"), dtype=dtype), torch.ones(1, 4, 1, dtype=dtype)
    new[0, :3, 0] = torch.tensor([float("nan"), float("inf"), -0.0])
    out = ops.return_places(hidden, new, index, rows)
    bits = {2: torch.int16, 4: torch.int32}[out.element_size()]
    assert torch.equal(out.view(-1)[index].view(bits), new[0, :, 0].view(bits))
    assert out[1, [0, 2]].isnan().all(), "of infinity less infinity"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_updates_are_added_in_float32_and_rounded_once(dtype):
    index, rows, _ = packed(torch.zeros(1, 2, 1, dtype=torch.int64))
    (before, own), after = drawn(0, 2, 500, dtype=dtype), drawn(1, 500, dtype=dtype)
    out = ops.return_places(torch.stack([before, own])[:, None], after[None, None], index, rows)[1, 0]
    # Numbers of 16 bits have differences and sums that float64 holds.
    exact = own.double() + (after.double() - before.double()).float().double()
    assert torch.equal(out, exact.float().to(dtype))
    assert not torch.equal(out, own + (after - before))


@pytest.mark.parametrize(
    "op, changes, says",
    [
        ("pack_places", {"source": torch.zeros(2, 3)}, "float32 with 2 axes"),
        ("pack_places", {"source": torch.zeros(1, 0, 3, dtype=torch.int64)}, "total=4 for source"),
        ("pack_places", {"total": 5}, "total=5, but the source has 4 active"),
        ("pack_places", {"total": 7}, r"total=7 .* between 3, .* and 6"),
        ("pack_places", {"source": torch.tensor([[[0, 0, 0], [2, 1, 0]]])}, "not computed"),
        ("pack_places", {"source": torch.tensor([[[0, 0, 0], [-1, 1, 0]]])}, "not computed"),
        ("pack_places", {"source": torch.tensor([[[0, 1, 0], [0, 1, 1]]])}, "not computed"),
        ("take_places", {"hidden": torch.ones(2, 3)}, "2 axes, and torch.int64"),
        ("take_places", {"hidden": torch.ones(2, 0, 4)}, "is empty"),
        ("take_places", {"index": torch.tensor([0.0])}, "float32 with 1"),
        ("take_places", {"index": torch.tensor([6])}, "from 6 to 6, but there are 6"),
        ("take_places", {"index": torch.tensor([-1, 2])}, "from -1 to 2"),
        ("return_places", {"packed": torch.ones(1, 4, 4).half()}, "float16 with 3"),
        ("return_places", {"packed": torch.ones(4, 4)}, "2$"),
        ("return_places", {"packed": torch.ones(1, 3, 4)}, r"packed \[1, 3, 4\].* must be \[1, 4, 4\]"),
        ("return_places", {"rows": torch.zeros(3, 3, dtype=torch.int64)}, r"rows \[3, 3\]"),
        ("return_places", {"rows": torch.zeros(2, 3)}, "float32 with 2"),
        ("return_places", {"rows": torch.full((2, 3), 4)}, "rows runs from 4 to 4, but there are 4"),
        ("return_places", {"index": torch.tensor([0, 1, 2, 6])}, "index runs from 0 to 6"),
        ("spread_places", {"packed": torch.ones(1, 4, 4)}, "3 axes"),
        ("spread_places", {"packed": torch.ones(2, 2, 4, 4)}, r"\[2, 2, 4, 4\] must be \[1"),
        ("spread_places", {"rows": torch.full((2, 3), -1)}, "rows runs from -1"),
    ],
)
def test_refuses_what_means_nothing(op, changes, says):
    source = torch.tensor([[[0, 0, 0], [0, 1, 0]]])
    index, rows, _ = packed(source)
    hidden, new = torch.ones(2, 3, 4), torch.ones(1, 4, 4)
    arguments = {
        "pack_places": {"source": source, "total": 4},
        "take_places": {"hidden": hidden, "index": index},
        "return_places": {"hidden": hidden, "packed": new, "index": index, "rows": rows},
        "spread_places": {"packed": torch.ones(1, 2, 4, 5), "rows": rows},
    }[op] | changes
    with pytest.raises(ValueError, match=f"{op}.*{says}"):
        getattr(ops, op)(*arguments.values())
