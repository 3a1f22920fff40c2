"""Spelled-out attention becomes scaled_dot_product_attention, and nothing else does."""

import pytest
import torch
from hand_made import VideoModel, capture, count
from tiny_models import tiny_llava_onevision, video_inputs

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
    graph_module = capture(torch.nn.Module(), x) if False else _capture_function(linear_attention, x, x, x)
    assert canonicalize_attention(graph_module.graph) == 0


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


def test_fires_on_transformers_eager_attention():
    model = tiny_llava_onevision(vision_layers=3, text_layers=2, attn_implementation="eager")
    inputs = video_inputs(model, 4)
    compiled = torch.compile(model, backend=_canonical)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=1e-4, rtol=1e-4)


def _capture_function(function, *inputs):
    graphs = []

    def backend(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    return graphs[0]
