"""Which pieces long videos may go through in chunks: each frame on its own, and all of them outermost."""

import pytest
import torch
import torch.nn.functional as F
from test_find_capturable import FRAME_WISE, MIXED, piece_of
from torch import nn
from tracing import trace

from earlytom_compile.frame_chunks import ChunkedRun
from earlytom_compile.kernels import all_ops  # noqa: F401  (registers torch.ops.earlytom)
from earlytom_compile.passes.find_frame_runs import Share, find_frame_runs, share_of
from earlytom_compile.passes.patterns import value_of
from earlytom_compile.passes.split_stages import split_stages

FRAMES = 7
OURS = torch.ops.earlytom


def counts_of(piece):
    tensors = (value for value in piece.inputs if isinstance(value, torch.Tensor))
    return set().union(*(size.node.expr.free_symbols for x in tensors for size in x.shape if not isinstance(size, int)))


def runs_of(piece):
    return find_frame_runs([piece], counts_of(piece))


def patches(x, weight):
    return F.conv2d(x, weight, None, (2, 2))


def rotated(x):
    half = torch.cat((-x[..., 4:], x[..., :4]), dim=-1)
    return x * x.new_ones(8).cos() + half * x.new_ones(8).sin()


def with_class_token(x, token):
    return torch.cat((token.expand(x.size(0), -1, -1), x), dim=1)


def pooled(x):
    return F.interpolate(x.view(x.size(0), 4, 4, 8).permute(0, 3, 1, 2), size=[2, 2], mode="bilinear").flatten(2)


def received(query, key):
    attention = OURS.attention_received.default(query, key, 0.5)
    return attention.view(-1, 1, 2, 2).mean((2, 3))


MORE = {
    "pixels of a batch of one": (lambda x, w: patches(x.view(x.size(1), 3, 4, 4), w), (1, "n", 3, 4, 4), (5, 3, 2, 2)),
    "patches become tokens": (lambda x, w: patches(x, w).flatten(2).transpose(1, 2), ("n", 3, 4, 4), (5, 3, 2, 2)),
    "rows of all tokens": (lambda x, w: F.linear(x.view(-1, 8), w).view(-1, 4, 3), ("n", 4, 8), (3, 8)),
    "packed qkv": (lambda x: x.view(x.size(0), 4, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)[1] * 2, ("n", 4, 24)),
    "half of the channels, turned": (rotated, ("n", 4, 8)),
    "a class token in each frame": (with_class_token, ("n", 4, 8), (1, 1, 8)),
    "a token less": (lambda x: x[:, 1:] * 2, ("n", 4, 8)),
    "pooling": (pooled, ("n", 16, 8)),
    "2x2 merger": (lambda x, w: F.linear(x.view(-1, 4 * 8), w), ("n", 4, 8), (3, 32)),
    "mean of tokens": (lambda x: x.mean(1), ("n", 4, 8)),
    "softmax over tokens": (lambda x: x.softmax(1), ("n", 4, 8)),
    "products inside frames": (lambda x, y: (x @ y).softmax(-1) @ x, ("n", 4, 8), ("n", 8, 4)),
    "attention received": (received, ("n", 2, 4, 8), ("n", 2, 4, 8)),
    "each frame twice": (lambda x: x.repeat_interleave(2, 0) * 2, ("n", 4)),
    "tokens in an order": (lambda x, i: x[:, i.long()] * 2, ("n", 4, 8), (5,)),
    "tokens selected": (lambda x, i: x.index_select(1, i.long()) * 2, ("n", 4, 8), (5,)),
    "what each frame looks up": (lambda i, table: F.embedding(i.long(), table) * 2, ("n", 4), (9, 8)),
}  # fmt: skip
ALONE = {**FRAME_WISE, **MORE}


def drawn(shapes):
    generator = torch.Generator().manual_seed(0)
    sizes = ([FRAMES if size == "n" else size for size in shape] for shape in shapes)
    return [torch.rand(shape, generator=generator, dtype=torch.float64) for shape in sizes]


@pytest.mark.parametrize("function, shapes", [(f, s) for f, *s in ALONE.values()], ids=ALONE)
def test_each_frame_by_itself_goes_through_in_chunks(function, shapes):
    piece = piece_of(function, *shapes)
    piece.graph_module.recompile()
    (run,) = runs_of(piece)
    graph = piece.graph_module.graph
    (output,) = (node for node in graph.nodes if node.op == "output")
    shares = [share_of(value_of(node), run.frames) for node in graph.nodes if node.op == "placeholder"]
    made = [share_of(value_of(node), run.frames) for node in output.all_input_nodes]
    arguments, seen = drawn(shapes), []

    def watched(*given):
        seen.append(given)
        return piece.graph_module(*given)

    results = ChunkedRun(watched, shares, made, at_once=2)(*arguments)
    assert len(seen) == 3
    for result, expected in zip(results, piece.graph_module(*arguments), strict=True):
        torch.testing.assert_close(result, expected)


MORE_MIXED = {
    "numbered": (lambda x: x + torch.arange(x.size(0)).view(-1, 1, 1), ("n", 4, 8)),
    "all but the first": (lambda x: x[1:] - x[:-1], ("n", 4, 8)),
    "joined to themselves": (lambda x: torch.cat((x, x)), ("n", 4, 8)),
    "taken in an order": (lambda x, i: x[i.long()], ("n", 8), ("n",)),
    "some frames": (lambda x, i: x[i.long()] * x[:1], ("n", 8), (5,)),
    "frames selected": (lambda x, i: x.index_select(0, i.long()) * 2, ("n", 4, 8), ("n",)),
    "some frames selected": (lambda x, i: x.index_select(0, i.long()) * x.sum(), ("n", 4, 8), (5,)),
    "looked up among frames": (lambda x, i: F.embedding(i.long(), x), ("n", 8), ("n", 2)),
    "frames inside a row": (lambda x: x.transpose(0, 1).reshape(-1, 8) * 2, ("n", 4, 8)),
    "rows taken for frames": (lambda x: x.view(4, -1, 8).softmax(1).view(-1, 8), ("n", 4, 8)),
    "videos in front": (lambda x: x.flatten(0, 1) * 2, (2, "n", 4, 8)),
    "written to": (lambda x: (x * 2).add_(1), ("n", 4, 8)),
    "frames as channels": (lambda x, w: F.linear(x.transpose(0, 1), w), ("n", 4), (3, "n")),
    "an operator of ours that looks at all": (lambda x: OURS.frame_similarity.default(x * 2, 3), ("n", 4, 8)),
    "an operator without an axis rule": (lambda x: torch.special.bessel_j0(x), ("n", 4)),
}  # fmt: skip


@pytest.mark.parametrize(
    "function, shapes", [(f, s) for f, *s in {**MIXED, **MORE_MIXED}.values()], ids={**MIXED, **MORE_MIXED}
)
def test_what_mixes_frames_or_counts_them_goes_through_as_a_whole(function, shapes):
    assert runs_of(piece_of(function, *shapes)) == []


def test_a_size_that_counts_something_else_makes_no_run():
    piece = piece_of(lambda x: x * 2, ("n", 4, 8))
    assert len(runs_of(piece)) == 1 and find_frame_runs([piece], set()) == []


def test_shares_of_tensors_and_numbers():
    piece = piece_of(lambda x: (x.size(0), x.size(0) * 4, x.size(1)), ("n", 4))
    (frames,) = counts_of(piece)
    *_, output = piece.graph_module.graph.nodes
    one, four, other = map(value_of, output.args[0])
    assert [share_of(value, frames) for value in (one, four, other, 5)] == [Share(None, 1), Share(None, 4), None, None]
    with pytest.raises(ValueError, match="not so much for each"):
        share_of(one + 1, frames)
    wide = value_of(next(iter(piece.graph_module.graph.nodes)))
    assert share_of(wide, frames) == Share(0, 1)
    assert share_of(wide.view(1, -1, 4), frames) == Share(1, 1) and share_of(wide.flatten(), frames) == Share(0, 4)
    with pytest.raises(ValueError, match="not so much for each"):
        share_of(wide.t(), frames)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.out, self.up, self.down = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        heads = self.qkv(self.norm1(x)).view(x.size(0), -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads.unbind(0))
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Tower(nn.Module):
    """Four layers, between the second and third of which frames meet."""

    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Linear(3, 8), nn.ModuleList(Layer() for _ in range(4))

    def forward(self, x):
        x = self.embed(x)
        for number, layer in enumerate(self.layers):
            x = layer(x if number != 2 else x - x.mean(0, keepdim=True))
        return x


def test_pieces_in_a_row_are_one_run_until_frames_meet():
    x = torch.randn(6, 5, 3)
    torch._dynamo.mark_dynamic(x, 0)
    traced = trace(Tower().eval(), x, dynamic=None)
    _, pieces = split_stages(traced.module)
    (frames,) = {symbol for piece in pieces for symbol in counts_of(piece)}
    names = [piece.name for piece in pieces]
    assert len(names) == 6  # embedding, two layers, the difference, two layers
    runs = [[piece.name for piece in run.pieces] for run in find_frame_runs(pieces, {frames})]
    assert runs == [names[:3], names[4:]]
