"""Spelled-out attention becomes scaled_dot_product_attention, and nothing else does."""

import pytest
import torch
from hand_made import VideoModel, capture, count
from tiny_models import tiny_llava_onevision, video_inputs

from earlytom_compile.families.registry import make_traceable
from earlytom_compile.passes.canonicalize_attention import canonicalize_attention


def test_fires_and_computes_the_same():
    model = VideoModel(layers=3, attention="matmul")
    inputs = model.example()
    graph_module = capture(model, *inputs)
    matmuls = count(graph_module, "matmul")
    assert canonicalize_attention(graph_module.graph) == 3
    graph_module.graph.lint()
    assert count(graph_module, "softmax") == 0 and count(graph_module, "matmul") == matmuls - 6
    assert count(graph_module, "scaled_dot_product_attention") == 3 + 1  # the reader's own
    compiled = torch.compile(model, backend=_canonical)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), model(*inputs))


def _canonical(graph_module, example_inputs):
    canonicalize_attention(graph_module.graph)
    graph_module.recompile()
    return graph_module.forward


@pytest.mark.parametrize("attention", ["sdpa", "weights returned", "dropout"])
def test_does_not_fire(attention):
    model = VideoModel(layers=2, attention=attention)
    graph_module = capture(model, *model.example())
    before = str(graph_module.graph)
    assert canonicalize_attention(graph_module.graph) == 0
    assert str(graph_module.graph) == before


def test_two_matmuls_without_softmax_are_not_attention():
    def linear_attention(q, k, v):
        return torch.matmul(torch.matmul(q, k.transpose(-1, -2)) * 0.1, v)

    x = torch.randn(1, 2, 5, 4)
    assert canonicalize_attention(_capture_function(linear_attention, x, x, x).graph) == 0


def test_softmax_over_queries_is_not_attention():
    def odd(q, k, v):
        return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-1, -2)), dim=-2), v)

    x = torch.randn(1, 2, 5, 4)
    assert canonicalize_attention(_capture_function(odd, x, x, x).graph) == 0


@pytest.mark.parametrize(
    "spelling",
    [
        lambda q, k, v, m: torch.softmax(q @ k.transpose(-1, -2) / 3.0 + m, -1) @ v,
        lambda q, k, v, m: torch.softmax(m + 0.2 * torch.matmul(q, k.transpose(2, 3)), dim=3) @ v,
        lambda q, k, v, m: torch.matmul((torch.matmul(q * 0.3, k.mT) + m).softmax(-1), v),
    ],
)
def test_masks_and_scales_in_other_spellings(spelling):
    q, k, v = (torch.randn(2, 3, 5, 4) for _ in range(3))
    mask = torch.randn(2, 1, 5, 5)
    graph_module = _capture_function(spelling, q, k, v, mask)
    assert canonicalize_attention(graph_module.graph) == 1
    compiled = torch.compile(spelling, backend=_canonical)
    torch.testing.assert_close(compiled(q, k, v, mask), spelling(q, k, v, mask))


class SiglipAttention(torch.nn.Module):
    """Attention as LLaVA-NeXT's SigLIP spells it: scale behind the product, float32 softmax, dropout of 0."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.dropout = 0.0
        self.q, self.k, self.v, self.out = (torch.nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        frames, tokens, width = x.size()
        q, k, v = (
            linear(x).view(frames, tokens, self.heads, width // self.heads).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        weights = torch.matmul(q, k.transpose(2, 3)) * self.scale
        if weights.size() != (frames, self.heads, tokens, tokens):
            raise ValueError(weights.size())
        weights = torch.nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
        weights = torch.nn.functional.dropout(weights, p=self.dropout, training=self.training)
        mixed = torch.matmul(weights, v).transpose(1, 2).contiguous()
        return self.out(mixed.reshape(frames, tokens, width))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_fires_on_the_attention_of_llava_next(dtype, tolerance):
    model, x = SiglipAttention(24, 3).to(dtype).eval(), torch.randn(4, 11, 24).to(dtype)
    graph_module = capture(model, x)
    assert canonicalize_attention(graph_module.graph) == 1
    with torch.no_grad():
        actual = torch.compile(model, backend=_canonical)(x)
        torch.testing.assert_close(actual, model(x), atol=tolerance, rtol=tolerance)


@pytest.mark.long  # test_backend.py compresses such a model, which takes that it fires in the encoder
def test_fires_on_transformers_eager_attention():
    model = tiny_llava_onevision(vision_layers=3, text_layers=2, attn_implementation="eager")
    inputs = video_inputs(model, 4)
    fired = []
    make_traceable()

    def backend(graph_module, example_inputs):
        fired.append(canonicalize_attention(graph_module.graph))
        assert count(graph_module, "softmax") == 0
        return _canonical(graph_module, example_inputs)

    with torch.no_grad():
        actual = torch.compile(model, backend=backend)(**inputs).logits
        torch.testing.assert_close(actual, model(**inputs).logits, atol=1e-4, rtol=1e-4)
    assert fired == [3 + 2]  # every layer of the encoder and of the language model: no map is left


def _capture_function(function, *inputs):
    graphs = []

    def backend(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    return graphs[0]
