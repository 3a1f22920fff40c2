import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import ops

lengths = st.lists(st.integers(1, 2), min_size=1, max_size=8)  # of the frames that went in, how many each is made of


def plan(made_of):
    """``source`` [T, 2] of a plan in which neighbours merge, and the first frame of each merged one."""
    ends = torch.tensor(made_of).cumsum(0)
    first = ends - torch.tensor(made_of)
    rows = torch.stack((first, ends - 1), 1)
    return torch.cat((rows, torch.zeros(int(ends[-1]) - len(rows), 2, dtype=torch.int64))), first


@given(made_of=lengths, again=st.data())
def test_merged_frames_begin_where_their_first_frame_did(made_of, again):
    source, first = plan(made_of)
    found = ops.first_of_merged(None, source, len(first))
    assert torch.equal(found, first)
    n, twice = len(first), []
    while sum(twice) < n:
        twice.append(again.draw(st.integers(1, min(2, n - sum(twice)))))
    source, of_merged = plan(twice)
    assert torch.equal(ops.first_of_merged(found, source, len(of_merged)), first[of_merged])


def test_what_does_not_fit():
    source, _ = plan([1, 2])
    for first in (torch.zeros(3), torch.zeros(3, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match="first must be int64"):
            ops.first_of_merged(first, source, 2)
    with pytest.raises(ValueError, match="n=4 of a plan for 3 frames"):
        ops.first_of_merged(None, source, 4)
