"""The forms that are exported reuse patches as the operators do, for one video."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import active_places, clip, native_dtypes, operator_settings, ops, seeds, sources
from plain_loops import looping

from earlytom_compile.kernels import exportable_reuse

FORMS = exportable_reuse.FORMS
shapes = st.tuples(st.just(1), st.integers(1, 6), st.integers(1, 9))
shares = st.sampled_from([0.0, 0.3, 1.0])


@pytest.fixture(scope="module", autouse=True)
def plain_loops():
    with looping(exportable_reuse):
        yield


def same(name, *arguments, **close):
    """What operator and form make of the same arguments."""
    expected, found = getattr(ops, name)(*arguments), FORMS[name](*arguments, most=9)
    several = isinstance(expected, tuple | list)
    for x, y in zip(expected, found, strict=True) if several else ((expected, found),):
        torch.testing.assert_close(y, x, **(close or {"rtol": 0, "atol": 0}))
    return expected


def drawn(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@operator_settings
@given(
    seed=seeds,
    frames=st.integers(1, 9),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    patch=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    prefix=st.integers(0, 2),
    tau=st.sampled_from([0.0, 0.06, 0.5]),
    steps=st.sampled_from([0, 8]),
    dtype=native_dtypes,
)
def test_the_same_patches_are_computed(seed, frames, grid, patch, prefix, tau, steps, dtype):
    height, width = (count * side for count, side in zip(grid, patch, strict=True))
    pixels = clip(seed, frames, 2, height + 1, width, steps).to(dtype)
    source, change, *_ = same("plan_reuse", pixels[None], list(grid), list(patch), prefix, tau, 0)
    same("distinct_frames", source, change, prefix)


@operator_settings
@given(seed=seeds, frames=st.integers(1, 9))
def test_distinct_frames_are_taken_and_returned(seed, frames):
    rows = torch.randint(0, 2, (frames,), generator=torch.Generator().manual_seed(seed)).cumsum(0)
    rows -= rows[0].item()
    taken = same("take_frames", drawn(seed, frames, 3, 2), rows, int(rows[-1]) + 1)
    same("return_frames", taken, rows)


@operator_settings
@given(seed=seeds, shape=shapes, share=shares, channels=st.integers(1, 5), dtype=native_dtypes)
def test_places_are_packed_and_returned(seed, shape, share, channels, dtype):
    source = sources(seed, *shape, share)
    index, rows, _ = same("pack_places", source, active_places(source))
    hidden = drawn(seed, *shape[1:], channels, dtype=dtype)
    taken = same("take_places", hidden, index)
    same("return_places", hidden, taken + drawn(seed + 1, *taken.shape, dtype=dtype), index, rows)
    same("spread_places", drawn(seed, 1, 2, len(index), channels, dtype=dtype), rows)
    same("at_places", drawn(seed, 1, shape[2], 3), index, 1)


@operator_settings
@given(seed=seeds, shape=shapes, share=shares, heads=st.integers(1, 3), width=st.integers(1, 9))
def test_what_changed_attends_to_all_places(seed, shape, share, heads, width):
    source = sources(seed, *shape, share)
    index, rows, offsets = ops.pack_places(source, active_places(source))
    same("reuse_attention", *drawn(seed, 3, 1, heads, len(index), width), rows, offsets, 0.3, rtol=1e-5, atol=1e-6)
