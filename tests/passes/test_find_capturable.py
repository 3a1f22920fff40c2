"""What a CUDA graph may replay: frame by frame where frames are added, and no operator that waits, writes or leaks."""

import pytest
import torch
import torch.nn.functional as F
from test_split_stages import Stack
from torch import nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode
from torch.fx import Interpreter, symbolic_trace
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols
from tracing import trace

from earlytom_compile.passes.find_capturable import find_runs, gather, reason_not_to_capture
from earlytom_compile.passes.split_stages import Piece, split_stages


class Recorder(Interpreter):
    """Writes down what each node makes, as Dynamo does."""

    def run_node(self, n):
        n.meta["example_value"] = super().run_node(n)
        return n.meta["example_value"]


def piece_of(function, *shapes):
    """``function`` as a piece whose sizes ``"n"`` and ``"m"`` are known at run time only."""
    shape_env = ShapeEnv()
    sizes = {name: shape_env.create_unbacked_symint() for name in "nm"}
    for size in sizes.values():
        torch._check(size >= 2)
    graph_module = symbolic_trace(function)
    (output,) = (node for node in graph_module.graph.nodes if node.op == "output")
    if not isinstance(output.args[0], tuple):
        output.args = ((output.args[0],),)
    with FakeTensorMode(shape_env=shape_env), enable_python_dispatcher():
        Recorder(graph_module).run(*(torch.empty([sizes.get(size, size) for size in shape]) for shape in shapes))
    return Piece("piece", graph_module)


def attention(*operands):
    return F.scaled_dot_product_attention(*operands)


FRAME_WISE = {
    "a linear layer": (lambda x, w: F.linear(x, w), ("n", 4, 8), (3, 8)),
    "norm of tokens": (lambda x: F.layer_norm(x, (8,)), ("n", 4, 8)),
    "norm of frames": (lambda x: F.layer_norm(x, (4, 8)), ("n", 4, 8)),
    "attention inside frames": (lambda q, k, v: attention(q, k, v), ("n", 2, 4, 8), ("n", 2, 4, 8), ("n", 2, 4, 8)),
    "one head": (lambda q, k, v: attention(q, k, v), ("n", 4, 8), ("n", 4, 8), ("n", 4, 8)),
    "heads": (lambda x: (x + 1).view(x.size(0), 4, 2, 4).transpose(1, 2), ("n", 4, 8)),
    "flatten": (lambda x: F.gelu(x.flatten(1)), ("n", 4, 8)),
    "both halves": (lambda x: x.chunk(2, dim=-1)[0] * x.chunk(2, dim=-1)[1], ("n", 4, 8)),
    "positions for all": (lambda x, y: x + y, ("n", 4, 8), (4, 8)),
    "two of each frame": (lambda x, y: (x + y) * 2, ("n", 4, 8), ("n", 1, 1)),
}


@pytest.mark.parametrize("function, shapes", [(f, s) for f, *s in FRAME_WISE.values()], ids=FRAME_WISE)
def test_frame_wise_pieces_are_captured(function, shapes):
    assert reason_not_to_capture(piece_of(function, *shapes)) is None


MIXED = {
    "centred over frames": (lambda x: x - x.mean(0, keepdim=True), ("n", 4, 8)),
    "softmax over frames": (lambda x: x.softmax(0), ("n", 4, 8)),
    "running sum": (lambda x: x.cumsum(0), ("n", 4, 8)),
    "reversed": (lambda x: x.flip(0), ("n", 4, 8)),
    "shifted": (lambda x: x.roll(1, 0), ("n", 4, 8)),
    "sorted": (lambda x: x.sort(0)[0], ("n", 4, 8)),
    "permuted": (lambda x: x[x.sum((1, 2)).argsort()], ("n", 4, 8)),
    "attention across frames": (lambda x: attention(*[x.transpose(0, 1)] * 3).transpose(0, 1), ("n", 4, 8)),
    "attention of pooled frames": (lambda x: attention(x, x, x), ("n", 8)),
    "all frames as one sequence": (lambda x: attention(*[x.reshape(1, -1, 8)] * 3).view(-1, 4, 8), ("n", 4, 8)),
    "norm over frames": (lambda x: F.layer_norm(x, x.size()), ("n", 4, 8)),
    "divided by their number": (lambda x: x / x.size(0), ("n", 4, 8)),
    "frames are not first": (lambda x: x * 2, (4, "n", 8)),
    "two numbers of frames": (lambda x, y: (x * 2, y * 2), ("n", 4), ("m", 4)),
    "twice as many": (lambda x: x.repeat(2, 1), ("n", 4)),
    "a sum": (lambda x: x.sum(), ("n", 4)),
}


@pytest.mark.parametrize("function, shapes", [(f, s) for f, *s in MIXED.values()], ids=MIXED)
def test_what_mixes_frames_or_counts_them_is_not(function, shapes):
    reason = reason_not_to_capture(piece_of(function, *shapes))
    assert reason == "it is not known to compute each frame from that frame alone"


def test_attention_over_a_mask_of_each_frame():
    shapes = [("n", 2, 4, 8)] * 3 + [("n", 1, 4, 4)]
    assert reason_not_to_capture(piece_of(lambda q, k, v, mask: attention(q, k, v, mask), *shapes)) is None


def test_what_mixes_frames_of_a_fixed_number_is_captured():
    assert reason_not_to_capture(piece_of(lambda x: x.softmax(0), (5, 4, 8))) is None


UNFIT = {
    "writes": (lambda x: x.add_(1) * 2, "writes to its inputs"),
    "writes through a view": (lambda x: x[0].mul_(2) + 1, "writes to its inputs"),
    "hands an input out": (lambda x: (x.view(-1), x + 1), "hands out sizes or its inputs"),
    "moves to another device": (lambda x: (x.to("meta"), x + 1), "several devices"),
}


@pytest.mark.parametrize("function, reason", UNFIT.values(), ids=UNFIT)
def test_unfit_pieces_say_why(function, reason):
    assert reason in reason_not_to_capture(piece_of(function, (5, 4)))


@torch.library.custom_op("capturable_test::store", mutates_args={"cache"})
def store(x: torch.Tensor, cache: torch.Tensor) -> None:
    cache.copy_(x)


def test_custom_operators_write_to_any_of_their_arguments():
    def into_cache(x, cache):
        torch.ops.capturable_test.store.default(x, cache)
        return x * cache

    assert "writes to its inputs" in reason_not_to_capture(piece_of(into_cache, (5, 4), (5, 4)))


def test_higher_order_operators_are_left_alone():
    traced = trace(lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)) + 1, torch.randn(4))
    assert "higher-order" in reason_not_to_capture(Piece("piece", traced.module))


def test_tensors_inside_a_transform_are_left_alone():
    traced = trace(lambda x: torch.vmap(torch.sin)(x) + 1, torch.randn(4))
    assert "stand for others" in reason_not_to_capture(Piece("piece", traced.module))


def test_a_piece_needs_no_inputs():
    runs, _ = find_runs([piece_of(lambda: torch.ones(4).add(1))], {"piece"})
    assert [run.device for run in runs] == [torch.device("cpu")]


def test_writing_to_own_memory_is_fine():
    assert reason_not_to_capture(piece_of(lambda x: (x * 2).add_(1), (5, 4))) is None


def test_data_dependent_sizes_are_waited_for():
    piece = piece_of(lambda x: x * 2, (5, 4))
    (product,) = (node for node in piece.graph_module.graph.nodes if node.op == "call_function")
    shape_env = ShapeEnv()
    with FakeTensorMode(shape_env=shape_env), enable_python_dispatcher():
        product.meta["example_value"] = torch.empty(shape_env.create_unbacked_symint(), 4)
    assert free_unbacked_symbols(product.meta["example_value"])
    assert reason_not_to_capture(piece) == "it makes a size that depends on the data"


def test_a_piece_that_is_not_compiled_ends_a_run():
    model, x = Stack([16] * 6).eval(), torch.randn(4, 6, 3)
    traced = trace(model, x)
    stages, pieces = split_stages(traced.module)
    names = [piece.name for piece in pieces]
    runs, reasons = find_runs(pieces, {*names} - {names[3]})
    assert [[piece.name for piece in run.pieces] for run in runs] == [names[:3], names[4:]] and not reasons


@pytest.mark.parametrize("left_out", [set(), {3}, {0, 2, 5}])
def test_gathered_runs_compute_what_the_graph_computed(left_out):
    model, x = Stack([16] * 6).eval(), torch.randn(4, 6, 3)
    traced = trace(model, x)
    stages, pieces = split_stages(traced.module)
    assert len(pieces) == 8
    runs, _ = find_runs(pieces, {piece.name for i, piece in enumerate(pieces) if i not in left_out})
    given = {}
    for number, run in enumerate(runs):
        signature = gather(stages, run, f"run_{number}")
        stages.get_submodule(f"run_{number}").register_forward_pre_hook(
            lambda _, args, name=number, kinds=signature.inputs: given.update({name: [*zip(kinds, args, strict=True)]})
        )
    stages.graph.lint()
    with torch.no_grad():
        for actual, expected in zip(stages(*traced.inputs), model(x), strict=True):
            assert torch.equal(actual, expected)
    called = [node.target for node in stages.graph.nodes if node.op == "call_module"]
    assert len(called) == len(runs) + len(left_out)
    for kinds in given.values():
        for kind, arg in kinds:
            assert kind == ("weight" if isinstance(arg, nn.Parameter) else "tensor")
