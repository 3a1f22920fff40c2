import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import active_places, laid_out, layouts, native_dtypes, operator_settings, ops, seeds, sources
from torch.library import opcheck


@operator_settings
@given(
    seed=seeds, video=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6)),
    around=st.lists(st.integers(1, 3), max_size=3), data=st.data(), dtype=native_dtypes, layout=layouts,
)  # fmt: skip
def test_every_packed_place_has_what_is_its_own(seed, video, around, data, dtype, layout):
    """Wherever the axis of places is: the table as each packed row's frame has it."""
    source = sources(seed, *video)
    axis = data.draw(st.integers(0, len(around)))
    table = torch.randn(*around[:axis], video[2], *around[axis:], generator=torch.Generator().manual_seed(seed))
    table = table.to(dtype)
    index, _, _ = ops.pack_places(source, active_places(source))
    found = ops.at_places(laid_out(table, layout), index, axis)
    assert found.dtype == dtype and found.shape == (*around[:axis], len(index), *around[axis:])
    places = [s for of_video in source.tolist() for f, row in enumerate(of_video) for s, g in enumerate(row) if g == f]
    assert found.movedim(axis, 0).tolist() == [table.movedim(axis, 0)[s].tolist() for s in places]


def test_an_integer_table_stays_one():
    found = ops.at_places(torch.arange(10, 13), torch.tensor([0, 1, 2, 4, 8]), 0)
    assert found.tolist() == [10, 11, 12, 11, 12] and found.dtype == torch.int64


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(axis, dtype):
    opcheck(ops.at_places.default, (torch.randn(3, 3, 3).to(dtype), torch.tensor([0, 1, 2, 4]), axis))


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"axis": 2}, "axis=2 of a table with 2 axes"),
        ({"axis": -1}, "axis=-1"),
        ({"table": torch.tensor(1.0)}, "0 axes"),
        ({"index": torch.zeros(1, 2, dtype=torch.int64)}, "int64 with 2 axes"),
        ({"index": torch.zeros(2)}, "float32 with 1 axes"),
    ],
)
def test_refuses_what_means_nothing(changes, says):
    arguments = {"table": torch.ones(3, 2), "index": torch.tensor([0, 1, 2, 4]), "axis": 0} | changes
    with pytest.raises(ValueError, match=f"at_places.*{says}"):
        ops.at_places(*arguments.values())
