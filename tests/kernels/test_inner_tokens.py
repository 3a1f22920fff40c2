"""Fewer tokens inside a language model: what the operators compute, against loops over Python numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import DEVICE, DTYPES, laid_out, layouts, native_dtypes, operator_settings, ops, seeds
from test_ops_golden import golden

from earlytom_compile.integrations.inner_steps import InnerPrompt
from earlytom_compile.methods.base import Step
from earlytom_compile.reference import merge_inner_tokens

MERGES = st.sampled_from(["mean", "sequential", "drop"])


@st.composite
def prompts(draw):
    """video_of of one to three rows of one length: text, and up to three videos, between whose tokens may be text."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        row = [-1] * draw(st.integers(0, 3))
        for video in range(draw(st.integers(0, 3))):
            for _ in range(draw(st.integers(1, 3))):
                row += [video] * draw(st.integers(1, 5)) + [-1] * draw(st.integers(0, 2))
        rows.append(row)
    length = max(1, *map(len, rows)) + draw(st.integers(0, 3))
    return torch.tensor([row + [-1] * (length - len(row)) for row in rows])


def planned(video_of, ratio, merge="mean", mask=None):
    plan = InnerPrompt.plan(video_of, mask, [Step(1, ratio, merge)])
    return plan.slots[0], plan.last[0]


@operator_settings
@given(prompts(), st.floats(0.01, 1.0))
def test_how_many_tokens_each_video_keeps_is_known_beforehand(video_of, ratio):
    slots, last = planned(video_of, ratio)
    assert last.tolist() == [video_of.shape[1] - 1] * len(video_of)
    lengths = []
    for row, places in zip(video_of.tolist(), slots.tolist(), strict=True):
        left = [place for place in places if place != -1]
        assert places == [-1] * (len(places) - len(left)) + left
        assert [place for place in left if place >= 0] == [i for i, video in enumerate(row) if video < 0]
        for video in set(row) - {-1}:
            assert left.count(-2 - video) == max(1, round(row.count(video) * ratio))
        lengths.append(len(left))
    assert slots.shape[1] == max(lengths)


@operator_settings
@given(st.lists(st.integers(0, 2), min_size=1, max_size=3), st.integers(1, 7), st.integers(1, 4), st.booleans(), seeds)
def test_the_plan_in_a_graph_is_that_of_the_host(texts, size, videos, masked, seed):
    """Rows with as many videos of one size: what ``plan_inner_tokens`` serves."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for before in texts:
        row, behind = [3] * before, 2 + sum(texts) - before
        for _ in range(videos):
            row += [9] * size
        rows.append(row + [3] * behind)
    ids = torch.tensor(rows)
    mask = torch.ones_like(ids)
    if masked:
        for row, before in zip(mask, texts, strict=True):
            row[:before] = 0
            row[len(row) - int(torch.randint(2, (1,), generator=generator)) :] = 0
    numbers = torch.where(ids == 9, ((ids == 9).cumsum(1) - 1) // size, -1)
    steps = [Step(1, 0.6, "mean"), Step(2, 0.3, "drop")]
    expected = InnerPrompt.plan(numbers, mask if masked else None, steps)
    after = [max(1, round(size * step.keep_ratio)) for step in steps]
    lengths = [ids.shape[1] - videos * (size - left) for left in after]
    video_of, last, slots = ops.plan_inner_tokens(ids, mask if masked else None, 9, size, after, lengths)
    assert torch.equal(video_of, numbers)
    for mine, theirs in zip((*last, *slots), (*expected.last, *expected.slots), strict=True):
        assert torch.equal(mine, theirs)


@operator_settings
@given(prompts(), st.floats(0.01, 1.0), MERGES, native_dtypes, layouts, st.booleans(), seeds)
def test_each_video_of_each_row_is_what_the_reference_makes_of_it(video_of, ratio, merge, dtype, layout, ties, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, length = video_of.shape
    hidden = torch.randn(rows, length, 4, generator=generator).to(dtype)
    scores = torch.rand(rows, length, generator=generator)
    scores = (3 * scores).round() if ties else scores
    slots, _ = planned(video_of, ratio)
    left, kept = ops.keep_inner_tokens(laid_out(hidden, layout), scores, video_of, slots, merge)
    assert left.dtype == dtype and left.shape == (rows, slots.shape[1], 4) and kept.shape == slots.shape
    for row in range(rows):
        stay, expected = _by_reference(hidden[row], scores[row], video_of[row].tolist(), ratio, merge)
        padding = slots.shape[1] - len(stay)
        assert kept[row].tolist() == [-1] * padding + stay
        close = torch.finfo(dtype).eps * 4 * hidden.abs().max().item() if dtype != torch.float64 else 1e-5
        torch.testing.assert_close(left[row, padding:], expected, atol=close, rtol=0)


def _by_reference(hidden, scores, video_of, ratio, merge):
    """(positions that stay, their tokens): one video after another."""
    positions = list(range(len(hidden)))
    for video in sorted(set(video_of) - {-1}):
        own = [place for place, position in enumerate(positions) if video_of[position] == video]
        keep = max(1, round(len(own) * ratio))
        if merge == "drop":
            left = sorted(sorted(range(len(own)), key=lambda i: (-float(scores[own[i]]), i))[:keep])
            merged = hidden[own][left]
        else:
            span = {"image_start": 0, "image_length": len(own), "drop_ratio": 1 - keep / len(own)}
            variant = "paper" if merge == "mean" else "released"
            merged, left = merge_inner_tokens(hidden[None, own], scores[own], variant=variant, **span)
            merged, left = merged[0], left.tolist()
        hidden = hidden.clone()
        hidden[[own[i] for i in left]] = merged
        gone = set(own) - {own[i] for i in left}
        stay = [place for place in range(len(hidden)) if place not in gone]
        hidden, scores, positions = hidden[stay], scores[stay], [positions[place] for place in stay]
    return positions, hidden


@operator_settings
@given(prompts(), MERGES, seeds)
def test_text_is_untouched_to_the_bit_and_rows_do_not_meet(video_of, merge, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*video_of.shape, 5, generator=generator)
    scores = torch.rand(video_of.shape, generator=generator)
    slots, _ = planned(video_of, 0.5)
    left, kept = ops.keep_inner_tokens(hidden, scores, video_of, slots, merge)
    for row, numbers in enumerate(video_of):
        text = (numbers < 0).nonzero().flatten()
        places = (kept[row] == text[:, None]).nonzero()[:, 1]
        assert torch.equal(left[row, places], hidden[row, text]) and len(places) == len(text)
    changed = hidden.clone()
    changed[1:] = 7.0
    again, _ = ops.keep_inner_tokens(changed, scores, video_of, slots, merge)
    assert torch.equal(again[0], left[0])


@golden("inner")
def test_sequential_merging_is_that_of_the_released_code(scalars, tensors):
    begin, count, length = scalars["image_start"], scalars["image_length"], scalars["L"]
    video_of = torch.full((1, length), -1)
    video_of[:, begin : begin + count] = 0
    slots, _ = planned(video_of, 1 - scalars["r"])
    scores = tensors["attention"][0].mean(0)[-1:]
    hidden, kept = ops.keep_inner_tokens(tensors["hidden"], scores, video_of, slots, "sequential")
    assert torch.equal(kept[0], tensors["kept_indices"])
    torch.testing.assert_close(hidden, tensors["merged_hidden"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("merge", ["mean", "sequential"])
def test_the_same_bits_in_every_run(merge):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 300, 16, generator=generator).to(DEVICE)
    scores = torch.rand(2, 300, generator=generator).to(DEVICE)
    video_of = torch.where(torch.arange(300) % 150 < 10, -1, torch.arange(300) // 150).expand(2, -1)
    slots, _ = planned(video_of, 0.3)
    arguments = (hidden, scores, video_of.to(DEVICE), slots.to(DEVICE), merge)
    first = ops.keep_inner_tokens(*arguments)
    for _ in range(20):
        for again, once in zip(ops.keep_inner_tokens(*arguments), first, strict=True):
            assert torch.equal(again, once)


def hiding(seen, dtype):
    """What is added to scores, so that only what is seen counts."""
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


@st.composite
def attentions(draw):
    """query, key, mask, last, causal."""
    rows, groups, repeats = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    length, size, seed = draw(st.integers(1, 9)), draw(st.integers(1, 5)), draw(seeds)
    generator = torch.Generator().manual_seed(seed)
    dtype = draw(native_dtypes)
    query = torch.randn(rows, groups * repeats, length, size, generator=generator).to(dtype)
    key = torch.randn(rows, groups, length, size, generator=generator).to(dtype)
    last = torch.randint(length, (rows,), generator=generator)
    kind = draw(st.sampled_from(["none", "causal", "bool", "float"]))
    mask = None
    if kind in ("bool", "float"):
        seen = torch.rand(draw(st.sampled_from([1, rows])), 1, length, length, generator=generator) > 0.3
        mask = seen if kind == "bool" else hiding(seen, dtype)
    return query, key, mask, last, kind == "causal"


@operator_settings
@given(attentions(), st.booleans(), layouts)
def test_attention_is_the_mean_over_heads_of_each_softmax(attention, everyone, layout):
    query, key, mask, last, causal = attention
    scale = 0.7
    got = ops.attention_paid(laid_out(query, layout), laid_out(key, layout), mask, last, scale, causal, everyone)
    rows, heads, length, _ = query.shape
    assert got.shape == (rows, length) and got.dtype == torch.float32
    for row in range(rows):
        expected, seen = [0.0] * length, [0] * length
        for i in range(length) if everyone else [int(last[row])]:
            visible = [j for j in range(length) if _sees(mask, row, i, j) and (j <= i or not causal)]
            for j in visible:
                seen[j] += 1
            for head in range(heads):
                own = key[row, head * key.shape[1] // heads].float().tolist()
                products = [
                    scale * sum(a * b for a, b in zip(query[row, head, i].float().tolist(), own[j], strict=True))
                    for j in visible
                ]
                total = sum(math.exp(x - max(products)) for x in products)
                for j, x in zip(visible, products, strict=True):
                    expected[j] += math.exp(x - max(products)) / total / heads
        expected = [x / max(count, 1) for x, count in zip(expected, seen, strict=True)]
        torch.testing.assert_close(got[row], torch.tensor(expected), atol=1e-5, rtol=1e-4)


def _sees(mask, row, i, j):
    if mask is None:
        return True
    value = mask[row % len(mask), 0, i, j]
    return bool(value) if mask.dtype == torch.bool else float(value) == 0.0


@operator_settings
@given(st.integers(1, 3), st.integers(1, 8), st.sampled_from(["none", "bool", *DTYPES]), st.booleans(), seeds)
def test_a_mask_keeps_what_is_left_and_hides_padding(rows, length, kind, one_for_all, seed):
    generator = torch.Generator().manual_seed(seed)
    width = int(torch.randint(1, length + 1, (1,), generator=generator))
    kept = torch.full((rows, width), -1)
    for row in kept:
        left = int(torch.randint(1, width + 1, (1,), generator=generator))
        row[width - left :] = torch.randperm(length, generator=generator)[:left].sort().values
    seen = torch.rand(1 if one_for_all else rows, 1, length, length, generator=generator) > 0.3
    seen = torch.ones(1, 1, length, length, dtype=torch.bool).tril() if kind == "none" else seen
    mask = {"none": None, "bool": seen}.get(kind)
    if isinstance(kind, torch.dtype):
        mask = hiding(seen, kind)
    short = ops.shorten_mask(mask, kept)
    assert short.shape == (rows, 1, width, width) and short.dtype == (torch.bool if mask is None else mask.dtype)
    visible = short if short.dtype == torch.bool else short == 0
    for row in range(rows):
        for i, a in enumerate(kept[row].tolist()):
            for j, b in enumerate(kept[row].tolist()):
                expected = i == j if a < 0 else b >= 0 and bool(seen[row % len(seen), 0, a, b])
                assert bool(visible[row, 0, i, j]) == expected


@operator_settings
@given(prompts(), native_dtypes, layouts, st.booleans(), seeds)
def test_what_lies_along_the_prompt_is_taken_of_each_row(longer, dtype, layout, one_for_all, seed):
    slots, _ = planned(longer, 0.5)
    kept = slots.clamp_min(-1)
    rows, length = longer.shape
    table = torch.randn(1 if one_for_all else rows, length, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)
    taken = ops.take_inner_positions(laid_out(table, layout), kept)
    assert taken.shape == (*kept.shape, 3) and taken.dtype == dtype
    again = kept[:, : max(1, kept.shape[1] // 2)].clamp_max(kept.shape[1] - 1)
    whole = ops.kept_of_kept(kept, again)
    for row in range(rows):
        for place, position in enumerate(kept[row].tolist()):
            assert torch.equal(taken[row, place], table[row % len(table), max(position, 0)])
        expected = [-1 if place < 0 else int(kept[row, place]) for place in again[row].tolist()]
        assert whole[row].tolist() == expected


def test_wrong_input_is_refused_by_name():
    hidden, scores, numbers = torch.ones(1, 3, 2), torch.ones(1, 3), torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="merge='sum'; use one of 'mean', 'sequential', 'drop'"):
        ops.keep_inner_tokens(hidden, scores, numbers, numbers, "sum")
    with pytest.raises(ValueError, match="slots must be int64"):
        ops.keep_inner_tokens(hidden, scores, numbers, numbers.int(), "drop")
    with pytest.raises(ValueError, match="hidden must be float"):
        ops.keep_inner_tokens(hidden.long(), scores, numbers, numbers, "drop")
    four = torch.ones(1, 2, 3, 4)
    with pytest.raises(ValueError, match="heads must be a multiple"):
        ops.attention_paid(four, torch.ones(1, 3, 3, 4), None, numbers[0, :1], 1.0, True, False)
    with pytest.raises(ValueError, match="mask must be bool or float"):
        ops.shorten_mask(torch.ones(1, 1, 3, 3, dtype=torch.int64), numbers)
    with pytest.raises(ValueError, match="as many as lengths"):
        ops.plan_inner_tokens(numbers, None, 9, 3, [1], [1, 2])


def test_rows_without_a_video_stay_as_they_are():
    plan = InnerPrompt.plan(torch.full((2, 4), -1), None, [Step(1, 0.5, "drop")])
    assert torch.equal(plan.slots[0], torch.arange(4).expand(2, -1)) and not plan.padded
