import plain_tokens
import pytest
import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from method_videos import KINDS, video

from earlytom_compile.methods.density_peaks import cluster, peak_scores
from earlytom_compile.methods.exact import fixed_point, squared_distances


@examples(500)
@given(
    seed=st.integers(0, 2**32 - 2),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(1, 6)),
    kind=st.sampled_from(KINDS),
    neighbours=st.integers(1, 8),
    data=st.data(),
)
def test_clusters_each_group_as_if_there_were_no_other(seed, sizes, kind, neighbours, data):
    tokens = video(seed, *sizes, kind).features.double()
    members = torch.rand(sizes[:2], generator=torch.Generator().manual_seed(seed)) < 0.7
    numbers = [data.draw(st.integers(0, int(row.sum()))) for row in members]
    integers, unit = fixed_point(tokens)
    means, centers = cluster(tokens, integers, members, unit, numbers, neighbours)
    for group in range(sizes[0]):
        places = members[group].nonzero()[:, 0].tolist()
        own = [tokens[group, p].tolist() for p in places], [list(map(int, integers[group, p].tolist())) for p in places]
        expected = plain_tokens.clusters(*own, unit.item(), numbers[group], neighbours) if numbers[group] else {}
        assert {places[i] for i in expected} == set(centers[group].nonzero()[:, 0].tolist())
        for i, mean in expected.items():
            torch.testing.assert_close(means[group, places[i]], torch.tensor(mean, dtype=torch.float64))


def test_peaks_are_dense_and_apart():
    """Two heaps of tokens on a line and one token far from both: the middle of each heap, and then the lone one, which
    is far from all others (1.4) and not dense (exp(-2.1))."""
    line = torch.tensor([0.0, 0.01, 0.03, 0.5, 0.51, 0.53, 2.0]).view(1, 7, 1).double()
    everyone = torch.ones(1, 7, dtype=torch.bool)
    for number, expected in [(1, [1]), (2, [1, 4]), (3, [1, 4, 6]), (7, list(range(7)))]:
        integers, unit = fixed_point(line)
        _, centers = cluster(line, integers, everyone, unit, [number], 2)
        assert centers[0].nonzero()[:, 0].tolist() == expected


def test_copies_come_last_and_belong_to_the_first():
    tokens = torch.tensor([[1.0], [5.0], [1.0], [1.0], [9.0]]).double()[None]
    integers, unit = fixed_point(tokens)
    everyone = torch.ones(1, 5, dtype=torch.bool)
    means, centers = cluster(tokens, integers, everyone, unit, [4], 2)
    assert centers[0].tolist() == [True, True, True, False, True]
    assert means[0, [0, 1, 2, 4], 0].tolist() == [1.0, 5.0, 1.0, 9.0]


def test_more_neighbours_than_can_be_added_exactly_are_refused():
    everyone = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(AssertionError):
        peak_scores(squared_distances(torch.ones(1, 2, 1).double()), everyone, torch.tensor(1.0), 1, 9)
