import plain_python
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from op_inputs import laid_out, layouts, operator_settings, ops, seeds

VIDEO = 7


@st.composite
def prompts(draw, same_videos):
    """Token rows [R, S], placeholders a video, and the number of videos of each row."""
    before, rows = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    if same_videos:
        videos = [draw(st.integers(0, 3))] * rows
    else:
        videos = draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows).filter(any))
    length = max(videos) * before + draw(st.integers(0, 5))
    length = max(length, 1)
    table = []
    for count in videos:
        others = length - count * before
        # Where the row's videos begin among its other tokens: first, last, next to each other, anywhere.
        starts = sorted(draw(st.lists(st.integers(0, others), min_size=count, max_size=count)))
        row, text = [], 0
        for start in starts:
            row += [100 + i for i in range(text, start)] + [VIDEO] * before
            text = start
        table.append(row + [100 + i for i in range(text, others)])
    return torch.tensor(table), before, videos


@operator_settings
@given(
    prompt=prompts(same_videos=True),
    share=st.floats(0, 1),
    layout=layouts,
    dtype=st.sampled_from([torch.int64, torch.int32]),
)
def test_every_video_is_cut_to_its_first_placeholders(prompt, share, layout, dtype):
    ids, before, videos = prompt
    after = round(share * before)
    length = ids.shape[1] - videos[0] * (before - after)
    given_ids = ids.to(dtype) if layout == "contiguous" else ids.to(dtype).t().contiguous().t()
    positions = ops.keep_positions(given_ids, VIDEO, before, after, length)
    assert positions.dtype == torch.int64 and positions.is_contiguous()
    expected = [plain_python.keep_row(row, VIDEO, before, [after] * videos[0]) for row in ids.tolist()]
    assert positions.tolist() == expected


@operator_settings
@given(prompt=prompts(same_videos=False), data=st.data())
def test_ragged_cuts_each_video_to_its_own_and_pads_on_the_left(prompt, data):
    ids, before, videos = prompt
    quotas = [[data.draw(st.integers(0, before)) for _ in range(count)] for count in videos]
    expected = [
        plain_python.keep_row(*row) for row in zip(ids.tolist(), [VIDEO] * 9, [before] * 9, quotas, strict=False)
    ]
    longest = max(map(len, expected))
    assume(longest > 0)
    kept = torch.tensor(sum(quotas, []))
    positions = ops.keep_positions_ragged(ids, kept, VIDEO, before)
    assert positions.tolist() == [[-1] * (longest - len(row)) + row for row in expected]


def test_ragged_is_the_static_cut_where_all_keep_as_many():
    ids = torch.tensor([[1, VIDEO, VIDEO, VIDEO, 2], [VIDEO, VIDEO, VIDEO, 3, 4]])
    static = ops.keep_positions(ids, VIDEO, 3, 2, 4)
    assert static.tolist() == [[0, 1, 2, 4], [0, 1, 3, 4]]
    assert torch.equal(ops.keep_positions_ragged(ids, torch.tensor([2, 2]), VIDEO, 3), static)


@operator_settings
@given(
    seed=seeds,
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    length=st.integers(0, 6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.bool]),
    layout=layouts,
    padded=st.booleans(),
)
def test_takes_rows_and_fills_padding(seed, shape, length, dtype, layout, padded):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)
    given_x = x if layout == "contiguous" else x.transpose(0, 1).contiguous().transpose(0, 1)
    positions = torch.randint(-1 if padded else 0, shape[1], (shape[0], length), generator=generator)
    out = ops.take_positions(given_x, positions, 1.0)
    assert out.dtype == dtype and out.shape == (shape[0], length, *shape[2:]) and out.is_contiguous()
    for row in range(shape[0]):
        for i, position in enumerate(positions[row].tolist()):
            assert torch.equal(out[row, i], x[row, position] if position >= 0 else torch.ones_like(x[row, 0]))


def test_fills_float_masks_with_minus_infinity():
    out = ops.take_positions(torch.zeros(1, 2), torch.tensor([[-1, 1]]), float("-inf"))
    assert out.tolist() == [[float("-inf"), 0.0]]


@operator_settings
@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=4), seed=seeds)
def test_a_separator_follows_each_video(counts, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = laid_out(torch.randn(sum(counts), 3, generator=generator), "strided")
    separator = torch.randn(3, generator=generator)
    out = ops.append_separators(tokens, torch.tensor(counts), separator)
    expected = []
    for count, start in zip(counts, [sum(counts[:i]) for i in range(len(counts))], strict=True):
        expected += [*tokens[start : start + count], separator]
    assert torch.equal(out, torch.stack(expected))


def test_a_separator_takes_the_dtype_of_the_tokens():
    out = ops.append_separators(torch.ones(2, 3).bfloat16(), torch.tensor([2]), torch.full((3,), 0.1))
    assert out.dtype == torch.bfloat16 and torch.equal(out[2], torch.full((3,), 0.1).bfloat16())


IDS = torch.tensor([[1, VIDEO, VIDEO, 2], [VIDEO, VIDEO, 3, 4]])
UNEVEN = torch.tensor([[1, VIDEO, VIDEO, 2], [5, 6, 3, 4]])


@pytest.mark.parametrize(
    "ids, before, after, length, says",
    [
        (IDS, 2, 1, 4, "row 0 has 2 placeholders.*leave 3, not the length=4"),
        (UNEVEN, 2, 1, 3, "row 1 has 0 placeholders.*the same number of videos each"),
        (IDS, 3, 1, 3, "row 0 has 2 placeholders.*videos of 3 cut to 1"),
        (IDS, 2, 3, 3, r"before=2, after=3; .*after in \[0, before\]"),
        (IDS, 0, 0, 3, "before=0"),
        (IDS.float(), 2, 1, 3, "float32"),
        (IDS[0], 2, 1, 3, "1 axes"),
    ],
)
def test_keep_positions_refuses_what_does_not_fit(ids, before, after, length, says):
    with pytest.raises(ValueError, match=f"keep_positions:.*{says}"):
        ops.keep_positions(ids, VIDEO, before, after, length)


@pytest.mark.parametrize(
    "ids, kept, before, says",
    [
        (IDS, [1], 2, r"rows hold \[2, 2\] placeholders .* for 1 videos of 2"),
        (IDS, [1, 1, 1], 2, "all rows together 6"),
        (IDS, [1], 4, "every row must hold whole videos"),
        (IDS, [3, 1], 2, r"kept=\[3, 1\]"),
        (IDS, [-1, 1], 2, r"kept=\[-1, 1\]"),
        (IDS, [], 2, "0 videos"),
        (torch.full((1, 2), VIDEO), [0], 2, "some position must stay"),
        (IDS, [1.0, 1.0], 2, "float32"),
    ],
)
def test_keep_positions_ragged_refuses_what_does_not_fit(ids, kept, before, says):
    kept = torch.tensor(kept, dtype=torch.int64 if not kept else None)
    with pytest.raises(ValueError, match=f"keep_positions_ragged:.*{says}"):
        ops.keep_positions_ragged(ids, kept, VIDEO, before)


@pytest.mark.parametrize(
    "x, positions, fill, says",
    [
        (torch.ones(1, 3), [[3]], 0.0, "from 3 to 3, x has 3 along axis 1"),
        (torch.ones(1, 3), [[-2, 0]], 0.0, "from -2 to 0"),
        (torch.ones(2, 3), [[0]], 0.0, "x has 2 rows, positions 1"),
        (torch.ones(3), [[0]], 0.0, "1 axes"),
        (torch.ones(1, 3, dtype=torch.int64), [[0]], 0.5, "fill=0.5"),
        (torch.ones(1, 3, dtype=torch.int64), [[0]], float("-inf"), "fill=-inf"),
        (torch.ones(1, 3, dtype=torch.bool), [[0]], 2.0, "fill=2.0"),
    ],
)
def test_take_positions_refuses_what_does_not_fit(x, positions, fill, says):
    with pytest.raises(ValueError, match=f"take_positions:.*{says}"):
        ops.take_positions(x, torch.tensor(positions), fill)


@pytest.mark.parametrize(
    "tokens, counts, separator, says",
    [
        (torch.ones(3, 2), [2], torch.ones(2), r"kept_counts=\[2\] for tokens \[3, 2\]"),
        (torch.ones(3, 2), [4, -1], torch.ones(2), r"kept_counts=\[4, -1\]"),
        (torch.ones(3, 2), [3], torch.ones(1), "separator of 1 channels"),
        (torch.ones(3), [3], torch.ones(1), "1 axes"),
    ],
)
def test_append_separators_refuses_what_does_not_fit(tokens, counts, separator, says):
    with pytest.raises(ValueError, match=f"append_separators:.*{says}"):
        ops.append_separators(tokens, torch.tensor(counts), separator)
