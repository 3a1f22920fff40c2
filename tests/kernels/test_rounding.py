"""The bounds of rounding.py let rounding pass, and nothing else."""

import numpy as np
import plain_python
import pytest
import rounding
import torch
from op_inputs import ops, video
from rounding import assert_within


def cut(x, bits):
    """float32 with ``bits`` of its 23 fraction bits left, as tensor cores read it."""
    return (x.view(torch.int32) & -(1 << (23 - bits))).view(torch.float32)


def outside(actual, expected, bound):
    with pytest.raises(AssertionError, match="times what rounding can do"):
        assert_within(actual, expected, bound)


def queries_and_keys(shape=(2, 2, 33, 72)):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


def attention(query, key, scale):
    frames = [plain_python.attention_received(q, k, scale) for q, k in zip(query.numpy(), key.numpy(), strict=True)]
    return torch.from_numpy(np.stack(frames))


@pytest.mark.parametrize("scale", [72**-0.5, 1.0])
def test_attention_with_ten_bits_or_another_scale_or_without_a_token_is_outside(scale):
    query, key = queries_and_keys()
    expected = attention(query.double(), key.double(), scale)
    bound = rounding.attention_received(query, key, scale)
    assert_within(ops.attention_received(query, key, scale), expected, bound)
    outside(ops.attention_received(cut(query, 10), cut(key, 10), scale), expected, bound)
    outside(ops.attention_received(query, key, scale * 1.001), expected, bound)
    without = query.clone()
    without[:, :, -1] = without[:, :, -2]
    outside(ops.attention_received(without, key, scale), expected, bound)


@pytest.mark.parametrize("bound", [rounding.frame_similarity, rounding.triton_frame_similarity])
def test_similarity_with_seven_bits_or_without_a_token_is_outside(bound):
    hidden = video(0, 6, 7, 72)
    expected = torch.from_numpy(plain_python.banded(hidden.double().numpy(), 5))
    assert_within(ops.frame_similarity(hidden, 5), expected, bound(hidden))
    outside(ops.frame_similarity(cut(hidden, 7), 5), expected, bound(hidden))
    outside(ops.frame_similarity(hidden[:, :-1], 5), expected, bound(hidden))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_blend_with_rounded_weights_or_in_the_dtype_is_outside(dtype):
    x = torch.randn(2, 500, generator=torch.Generator().manual_seed(0)).to(dtype)
    source, weight = torch.tensor([[0, 1], [0, 0]]), torch.tensor([[0.3, 0.7], [0.0, 0.0]])
    exact = (x.double() * weight[0].double()[:, None]).sum(0, keepdim=True)
    bound = rounding.merge_frames(x, source, weight, 1)
    assert_within(ops.merge_frames([x], source, weight, 1)[0], exact, bound)
    coarse = cut(weight, 5)
    outside((x.double() * coarse[0].double()[:, None]).sum(0, keepdim=True), exact, bound)
    if dtype != torch.float32:
        outside((x[0] * weight[0, 0].to(dtype) + x[1] * weight[0, 1].to(dtype))[None], exact, bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_attention_with_fewer_bits_or_another_scale_or_without_a_place_is_outside(dtype):
    three = torch.randn(3, 1, 2, 33, 72, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows, offsets = torch.arange(33)[None], torch.tensor([0, 33])

    def attended(query, key, value, rows=rows, scale=0.3):
        return ops.reuse_attention(query, key, value, rows, offsets, scale)[0]

    wide = [x[0].double().numpy() for x in three]
    expected = torch.from_numpy(plain_python.reuse_attention(*wide, rows.tolist(), [0, 33], 0.3))
    bound = rounding.attention(*(x[0] for x in three), 0.3)
    assert_within(attended(*three), expected, bound)
    coarse = [cut(x.float(), 10 if dtype == torch.float32 else 3).to(dtype) for x in three]
    outside(attended(*coarse), expected, bound)
    outside(attended(*three, scale=0.3 * (1.001 if dtype == torch.float32 else 1.2)), expected, bound)
    outside(attended(*three, rows=rows.clamp_max(31)), expected, bound)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_update_in_the_dtype_is_outside(dtype):
    (before, own), after = torch.randn(2, 500).to(dtype), torch.randn(500).to(dtype)
    index, rows = torch.tensor([0]), torch.tensor([[0], [0]])
    arguments = torch.stack([before, own])[:, None], after[None, None], index, rows
    exact = torch.stack([after.double(), own.double() + (after.double() - before.double())])[:, None]
    bound = rounding.return_places(*arguments)
    assert_within(ops.return_places(*arguments), exact, bound)
    outside(torch.stack([after, own + (after - before)])[:, None], exact, bound)
