"""Every number that means a changed axis follows it, and no equal number does."""

import math
import operator
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Node
from torch.testing import assert_close
from tracing import Traced, shrink, trace

from earlytom_compile.passes.retarget_axes import ResizedAxis, retarget_axes

COLLIDING = st.sampled_from([2, 3, 4, 6])
"""Few sizes for many axes: most examples have axes of equal size that mean different things."""

few, fewer = examples(8), examples(3)
"""Tracing symbolic sizes takes a second."""


class FrameEncoder(nn.Module):
    """A vision encoder layer and what follows it: pooling, flattening over frames, a separator row."""

    def __init__(self, heads: int, head_dim: int, side: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.heads, self.side, width = heads, side, heads * head_dim
        self.first, self.qkv, self.out = (nn.Linear(width, n) for n in (width, 3 * width, width))
        self.norm = nn.LayerNorm(width)
        self.separator = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        frames, tokens, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(frames, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(frames, tokens, width)
        x = x + self.out(mixed)
        image = x.view(frames, self.side, self.side, width).permute(0, 3, 1, 2)
        pooled = F.interpolate(image, size=(math.ceil(self.side / 2), self.side), mode="bilinear")
        rows = pooled.permute(0, 2, 3, 1).reshape(1, frames * pooled.shape[2] * pooled.shape[3], width)
        rows = torch.cat([rows, self.separator[None, None].repeat(1, 1, 1)], dim=1)
        order = torch.arange(frames, device=x.device)[:, None, None]
        return rows.flatten(0, 1), x + order, x.view(frames * tokens, width).unflatten(0, (frames, tokens))


ENCODERS = st.tuples(COLLIDING, COLLIDING, COLLIDING, st.sampled_from([2, 3]))


@given(ENCODERS, st.booleans(), st.data())
@few
def test_frames_follow_through_an_encoder(sizes, as_node, data):
    check_encoder(*sizes, False, as_node, data)


@given(ENCODERS, st.booleans(), st.data())
@fewer
def test_frames_follow_through_an_encoder_of_symbolic_sizes(sizes, as_node, data):
    check_encoder(*sizes, True, as_node, data)


def check_encoder(frames, heads, head_dim, side, dynamic, as_node, data):
    to = data.draw(st.integers(1, frames - 1), label="frames left")
    model = FrameEncoder(heads, head_dim, side)
    x = torch.randn(frames, side * side, heads * head_dim)
    traced = trace(model, x, dynamic=dynamic)
    axis = shrink(traced, traced.called("linear")[0], 0, to, "frames", as_node)
    assert retarget_axes(traced.module, [axis]) >= 6
    with torch.no_grad():
        assert_close(traced.run(), model(x[:to]), rtol=1e-5, atol=1e-5)


class Decoder(nn.Module):
    """A causal language model layer with rotary positions, grouped heads and a padding mask."""

    def __init__(self, kv_heads: int, groups: int, head_dim: int, vocab: int, eager: bool, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.heads, self.kv_heads, self.head_dim, self.eager = kv_heads * groups, kv_heads, head_dim, eager
        width = self.heads * head_dim
        self.embed = nn.Embedding(vocab, width)
        self.q, self.k, self.v = (nn.Linear(width, n * head_dim) for n in (self.heads, kv_heads, kv_heads))
        self.head = nn.Linear(width, vocab, bias=False)
        self.register_buffer("frequencies", torch.rand(head_dim // 2))

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        left, right = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return x * cos + torch.cat((-right, left), dim=-1) * sin

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        rows, length = ids.shape
        x = self.embed(ids)
        positions = torch.arange(length)
        angles = positions[None, :, None].float() * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        q, k, v = (layer(x).view(rows, length, -1, self.head_dim).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        k, v = (self.repeat(t) for t in (k, v))
        row, query, key = torch.arange(rows)[:, None, None, None], positions[:, None], torch.arange(length)
        allowed = (key <= query) & mask.bool()[row, key[None, None, None, :]]
        allowed = allowed.expand(rows, -1, length, length)
        if self.eager:
            bias = torch.where(allowed, 0.0, torch.full((), -1e9))
            weights = torch.matmul(q, k.transpose(2, 3)) * self.head_dim**-0.5 + bias[:, :, :, : k.shape[-2]]
            mixed = torch.matmul(weights.softmax(-1), v)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        x = x + mixed.transpose(1, 2).reshape(rows, length, -1)
        return self.head(x), self.head(x[:, -1:])

    def repeat(self, t: Tensor) -> Tensor:
        rows, heads, length, depth = t.shape
        wide = t[:, :, None].expand(rows, heads, self.heads // heads, length, depth)
        return wide.reshape(rows, self.heads, length, depth)


DECODERS = st.tuples(st.integers(1, 3), st.integers(3, 8), COLLIDING, COLLIDING, st.sampled_from([2, 4, 6]))


@given(DECODERS, st.booleans(), st.booleans(), st.data())
@few
def test_prompt_follows_through_a_decoder(sizes, eager, as_node, data):
    check_decoder(*sizes, eager, False, as_node, data)


@given(DECODERS, st.booleans(), st.booleans(), st.data())
@fewer
def test_prompt_follows_through_a_decoder_of_symbolic_sizes(sizes, eager, as_node, data):
    check_decoder(*sizes, eager, True, as_node, data)


def check_decoder(rows, length, kv_heads, groups, head_dim, eager, dynamic, as_node, data):
    to = data.draw(st.integers(1, length - 1), label="prompt left")
    vocab = data.draw(st.sampled_from([length, 7]), label="vocabulary")
    model = Decoder(kv_heads, groups, head_dim, vocab, eager)
    ids = torch.randint(vocab, (rows, length))
    mask = torch.ones_like(ids)
    mask[0, : to // 2] = 0
    traced = trace(model, ids, mask, dynamic=dynamic)
    first = shrink(traced, traced.node("ids"), 1, to, "prompt", as_node)
    second = shrink(traced, traced.node("mask"), 1, to)
    retarget_axes(traced.module, [first, ResizedAxis(second.node, 1, "prompt", first.size)])
    with torch.no_grad():
        assert_close(traced.run(), model(ids[:, :to], mask[:, :to]), rtol=1e-5, atol=1e-5)


def legacy_mask(x: Tensor, mask: Tensor) -> Tensor:
    """A causal mask as transformers 4.4x builds it: triu, in-place product, slices on both sides of an assignment."""
    rows, length = mask.shape
    lowest = torch.finfo(x.dtype).min
    positions = torch.arange(length)
    causal = torch.full((length, length), fill_value=lowest)
    causal = torch.triu(causal, diagonal=1)
    causal *= torch.arange(length) > positions.reshape(-1, 1)
    causal = causal[None, None, :, :].expand(rows, 1, -1, -1).clone()
    padding = causal[:, :, :, :length] + mask[:, None, None, :]
    causal[:, :, :, :length] = causal[:, :, :, :length].masked_fill(padding == 0, lowest)
    scores = (x @ x.transpose(1, 2))[:, None] + causal
    return (scores.softmax(-1) @ x[:, None]).squeeze(1)


@pytest.mark.parametrize("as_node", [False, True])
@pytest.mark.parametrize(("rows", "length"), [(1, 4), (4, 4), (2, 6)])
def test_masks_of_older_transformers(rows, length, as_node):
    x, mask = torch.randn(rows, length, 4), torch.ones(rows, length)
    mask[0, 0] = 0
    traced = trace(legacy_mask, x, mask)
    first = shrink(traced, traced.node("x"), 1, 3, "prompt", as_node)
    second = shrink(traced, traced.node("mask"), 1, 3)
    retarget_axes(traced.module, [first, ResizedAxis(second.node, 1, "prompt", first.size)])
    assert_close(traced.run(), legacy_mask(x[:, :3], mask[:, :3]))


def test_only_the_axis_is_rewritten():
    """Two frames, two heads, heads of size two, two by two tokens: one kind of 2 changes."""
    traced = trace(FrameEncoder(heads=2, head_dim=2, side=2), torch.randn(2, 4, 4))
    axis = shrink(traced, traced.called("linear")[0], 0, 1, "frames", as_node=True)
    assert retarget_axes(traced.module, [axis]) == 7
    assert dict(spelled_with_nodes(traced)) == {
        "reshape": "x, N, 4, 3, 2, -1",
        "mixed": "x, N, 4, 4",
        "view": "x, N, 2, 2, 4",
        "rows": "x, 1, N*2, 4",
        "arange": "N",
        "view_1": "x, N*4, 4",
        "unflatten": "x, 0, N, 4",
    }


def spelled_with_nodes(traced: Traced) -> Iterator[tuple[str, str]]:
    """Calls whose sizes are read from tensors, as ``2*N`` where 2 and a size that was read are multiplied."""

    def shown(argument: Any) -> str:
        if not isinstance(argument, Node):
            return str(argument)
        if argument.target is operator.mul:
            return "*".join(map(shown, argument.args))
        return "N" if argument.target is torch.ops.aten.sym_size.int else "x"

    for node in traced.module.graph.nodes:
        text = ", ".join(shown(x) for arg in node.args for x in (arg if isinstance(arg, tuple) else [arg]))
        if node.op.startswith("call") and node.target is not operator.mul and "N" in text.replace("None", ""):
            yield node.name, text
