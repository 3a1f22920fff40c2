"""Cutting a graph at its layers: the pieces compute what the graph computed, and equal layers share one key."""

import pytest
import torch
from effort import cases
from torch import nn
from tracing import trace
from without_inductor import leave_pieces_as_they_are

from earlytom_compile.passes.find_vision_encoder import GraphView, find_vision_encoder
from earlytom_compile.passes.split_stages import split_stages
from earlytom_compile.reporting import GraphRecord
from earlytom_compile.stages import lower_stages


class Layer(nn.Module):
    """A pre-norm block, of which ``frames`` may be known only at run time."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (linear(h).unflatten(-1, (2, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class Stack(nn.Module):
    """``layers`` between an embedding and a head, in a list or as plain attributes."""

    def __init__(self, hiddens, listed: bool = True):
        super().__init__()
        self.embed, self.head = nn.Linear(3, 8), nn.Linear(8, 5)
        layers = [Layer(8, hidden) for hidden in hiddens]
        self.names = [f"layer_{'abcdefgh'[i]}" for i in range(len(layers))]
        if listed:
            self.layers = nn.ModuleList(layers)
        for name, layer in zip(self.names, [] if listed else layers, strict=False):
            setattr(self, name, layer)
        self.listed = listed

    def forward(self, x):
        x = self.embed(x).relu()
        for layer in self.layers if self.listed else [getattr(self, name) for name in self.names]:
            x = layer(x)
        return self.head(x), x.mean()


def split(model, x, structure=False, **options):
    traced = trace(model, x, **options)
    blocks = [block for encoder in find_vision_encoder(GraphView(traced.module)).encoders for block in encoder.blocks]
    stages, pieces = split_stages(traced.module, blocks if structure else ())
    return traced, stages, pieces


@pytest.mark.parametrize(
    "structure, listed, dynamic",
    cases(
        (True, True, False), (False, True, True), (True, False, True),
        among=[(*how, dynamic) for how in ((True, True), (False, True), (True, False)) for dynamic in (False, True)],
    ),
)  # fmt: skip
def test_pieces_compute_what_the_graph_computed(structure, listed, dynamic):
    model, x = Stack([16, 16, 16, 16], listed).eval(), torch.randn(4, 6, 3)
    traced, stages, pieces = split(model, x, structure, dynamic=dynamic)
    assert len(pieces) == 1 + 4 + 1
    with torch.no_grad():
        for actual, expected in zip(stages(*traced.inputs), model(x), strict=True):
            assert torch.equal(actual, expected)


def test_equal_layers_share_a_key_and_others_do_not():
    _, _, pieces = split(Stack([16, 16, 24, 16, 24]).eval(), torch.randn(4, 6, 3))
    before, *layers, after = [piece.key for piece in pieces]
    assert layers[0] == layers[1] == layers[3] != layers[2] == layers[4]
    assert len({before, after, *layers}) == 4


def test_dtype_and_strides_are_part_of_the_key():
    model = Stack([16, 16, 16]).eval()
    keys = [
        split(model.to(dtype), x, dynamic=False)[2][1].key
        for dtype, x in (
            (torch.float32, torch.randn(4, 6, 3)),
            (torch.float32, torch.randn(5, 6, 3)),
            (torch.bfloat16, torch.randn(4, 6, 3).bfloat16()),
        )
    ]
    assert len(set(keys)) == 3


def test_two_modules_in_a_list_are_no_layers():
    _, _, pieces = split(Stack([16, 16]).eval(), torch.randn(4, 6, 3))
    assert len(pieces) == 1


class Regions(nn.Module):
    """Layers inside one autocast region, which no cut may open."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for layer in self.layers:
                x = layer(x)
        return x + 1


def test_no_cut_inside_an_autocast_region():
    model, x = Regions().eval(), torch.randn(2, 4)
    traced, stages, pieces = split(model, x)
    assert len(pieces) == 1 and "autocast" in str(traced.module.graph)
    with torch.no_grad():
        assert torch.equal(stages(*traced.inputs)[0], model(x))


class WritesInPlace(nn.Module):
    """A buffer that layers write and read again: the order of the graph is the only thing that tells."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        total = torch.zeros_like(x)
        for layer in self.layers:
            x = layer(x + total)
            total += x
        return total


class WritesUnderAView(nn.Module):
    """One layer reads through a view what another has written."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.head = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        total = torch.zeros_like(x)
        row = total[0]
        for layer in self.layers:
            x = layer(x + row)
            total += x
            x = x + row
        for layer in self.head:
            x = layer(x)
        return x


@pytest.mark.parametrize("inductor", cases((False,), among=[(False,), (True,)]), ids=["Dynamo", "Inductor"])
def test_views_of_memory_that_is_written_stay_in_one_piece(monkeypatch, inductor):
    if not inductor:
        leave_pieces_as_they_are(monkeypatch)
    model, x = WritesUnderAView().eval(), torch.randn(2, 4)

    def backend(graph_module, example_inputs):
        _, pieces = split_stages(graph_module)
        assert len(pieces) == 1 + 3  # the layers with the view, then each of the head
        return lower_stages(graph_module, example_inputs, GraphRecord("", False))

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))


def test_functions_of_higher_order_operators_belong_to_their_piece():
    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
                x = torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))
            return x

    model, x = Conditional().eval(), torch.randn(2, 4)
    traced, stages, pieces = split(model, x)
    assert len(pieces) > 3
    with torch.no_grad():
        assert torch.equal(stages(*traced.inputs)[0], model(x))
    # What the key of a piece does not tell is not kept for another graph.
    assert [piece.has_attributes for piece in pieces] == ["cond" in str(piece.graph_module.graph) for piece in pieces]


def test_no_cut_where_functorch_transforms_are_active():
    class Mapped(Stack):
        def forward(self, x):
            return torch.vmap(torch.sin)(super().forward(x)[0])

    model, x = Mapped([16, 16, 16]).eval(), torch.randn(4, 6, 3)
    traced, stages, pieces = split(model, x)
    assert len(pieces) == 1 and "_vmap_" in traced.code()
    with torch.no_grad():
        assert torch.equal(stages(*traced.inputs)[0], model(x))


def test_writes_keep_their_order():
    model, x = WritesInPlace().eval(), torch.randn(2, 4)
    traced, stages, pieces = split(model, x)
    assert len(pieces) > 4
    with torch.no_grad():
        assert torch.equal(stages(*traced.inputs)[0], model(x))
