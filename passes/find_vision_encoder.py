"""Find vision encoders by what their graph computes, whatever their classes are called and however it is spelled.

A block is pre-norm and bidirectional::

    h1 = h + project(attention(q(h), k(h), v(h)))      # h, h1, out: [T, S, D]
    out = h1 + mlp(h1)

where q, k, v, project and mlp are any subgraphs that are position-wise, that is, compute every token of every frame
from itself alone (positions.py): norms, linears, adapters and quantised weights, learned scales, rotary positions. An
encoder is a chain of blocks of one shape, each fed by the one before. Language models do not match: their attention is
causal or masked. Module names appear in reports, never in decisions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from typing import Any

import torch
from torch.fx import GraphModule, Node

from earlytom_compile.passes.axes import AxisMap, op_name
from earlytom_compile.passes.axis_algebra import Dim
from earlytom_compile.passes.axis_call import TensorAxes
from earlytom_compile.passes.axis_rules_indexing import is_weight
from earlytom_compile.passes.dataflow import Dataflow
from earlytom_compile.passes.patterns import CASTS, argument, module_path, other_operand, peel, shape_of, value_of
from earlytom_compile.passes.positions import first_mixing

_IN_WINDOWS = "earlytom::window_attention"
_AMONG_TOKENS = "attention of the tokens [T, H, S, d] of each frame among themselves"


@dataclass(frozen=True)
class Layer:
    """One layer of a transformer: what enters it, [T, S, D], and the attention inside."""

    input: Node
    attention: Node

    @property
    def query(self) -> Node:
        """[T, H, S, d] as it enters the attention."""
        return self.attention.args[0]  # type: ignore[return-value]

    @property
    def key(self) -> Node:
        """[T, H, S, d] as it enters the attention."""
        return self.attention.args[1]  # type: ignore[return-value]

    @property
    def scale(self) -> float | Node | None:
        """Factor on q·k; None means 1/sqrt(d)."""
        scale = argument(self.attention, 4, "scale") if self.windows else self.attention.kwargs.get("scale")
        return scale  # type: ignore[return-value]

    @property
    def windows(self) -> Sequence[int]:
        """The windows that attention stays in, as ``window_attention`` takes them; none: all tokens of a frame meet."""
        return argument(self.attention, 3, "windows") if op_name(self.attention) == _IN_WINDOWS else ()


@dataclass(frozen=True)
class Block(Layer):
    """One encoder layer, whose output [T, S, D] is known."""

    output: Node


@dataclass(frozen=True)
class Encoder:
    """A chain of isomorphic blocks; ``blocks[i]`` is encoder layer i of those that the graph runs."""

    blocks: tuple[Block, ...]

    @property
    def name(self) -> str:
        """Where the chain lives in the model: the part its blocks' module paths share."""
        paths = [_path_of(block).split(".") for block in self.blocks]
        shared = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))]
        return ".".join(shared) or "<unnamed>"

    @property
    def full_layers(self) -> tuple[int, ...]:
        """Layers in which all tokens of a frame meet; none where they do so in every layer."""
        full = tuple(i for i, block in enumerate(self.blocks) if not block.windows)
        return () if len(full) == len(self.blocks) else full


def _path_of(block: Block) -> str:
    """Where a block's attention lies in the model, or what is nearest before it: rows() may spell attention itself."""
    nodes = [block.attention]
    while nodes and not module_path(nodes[0]) and nodes[0] is not block.input:
        nodes = nodes[0].all_input_nodes[:1]
    return module_path(nodes[0]) if nodes else ""


@dataclass(frozen=True)
class Miss:
    """An attention that belongs to no block, and why."""

    attention: Node
    at: Node
    """The first node that does not fit."""
    taken_for: str
    """What it would be if it did."""


class GraphView:
    """A graph as the finders see it: its axes and its data flow, which hold as long as nobody edits it."""

    def __init__(self, graph_module: GraphModule) -> None:
        self.graph_module = graph_module
        self.graph = graph_module.graph
        self.axes = AxisMap.infer(graph_module)
        self.flow = Dataflow(graph_module.graph)

    def dims(self, node: object) -> tuple[Dim, ...]:
        """The axes of a tensor; empty where nothing is known."""
        value = self.axes.values.get(node) if isinstance(node, Node) else None
        return tuple(dim.root for dim in value.dims) if isinstance(value, TensorAxes) else ()

    @cached_property
    def pictures(self) -> list[Node]:
        """The graph inputs that could be videos, images, or keys and values of a cache: all that has four axes."""
        inputs = [node for node in self.graph.nodes if node.op == "placeholder" and not is_weight(node)]
        values = [(node, value_of(node)) for node in inputs]
        return [n for n, x in values if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim() >= 4]

    def first_mixing(
        self, source: Node, kept: Sequence[int], *targets: Node, through: Node | None = None
    ) -> Node | None:
        """See :func:`positions.first_mixing`."""
        frames = self.dims(source)[kept[0]] if self.dims(source) else None

        def foreign(read: Node) -> bool | None:
            if not any(self.flow.is_from(read, picture) for picture in self.pictures):
                return None
            return frames is None or frames.size.is_(1) or frames in self.dims(read)

        how: dict[str, Any] = {"foreign": foreign, "through": through}
        return first_mixing(self.graph_module, self.flow, source, kept, *targets, **how)


@dataclass
class FoundEncoders:
    """What :func:`find_vision_encoder` found, and what it could have found."""

    encoders: list[Encoder] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)


def find_vision_encoder(view: GraphView) -> FoundEncoders:
    """Every maximal chain of isomorphic pre-norm bidirectional blocks, in graph order."""
    found, blocks = FoundEncoders(), []
    for node in view.graph.nodes:
        if op_name(node) in ("scaled_dot_product_attention", _IN_WINDOWS):
            block = _match_block(view, node)
            if isinstance(block, Block):
                blocks.append(block)
            else:
                found.misses.append(block)
    chains: list[list[Block]] = []
    for block in blocks:
        before = [chain for chain in chains if view.flow.is_from(block.input, chain[-1].output)]
        leading = next((chain for chain in before if _shape(chain[-1]) == _shape(block)), None)
        if not before:
            chains.append([block])
        elif leading is None:
            found.misses.append(Miss(block.attention, block.attention, "attention of the size of the blocks before it"))
        elif mixing := view.first_mixing(leading[-1].output, (0, 1), block.input):
            found.misses.append(Miss(block.attention, mixing, "something position-wise between two blocks"))
        else:
            leading.append(block)
    found.encoders += [Encoder(tuple(chain)) for chain in chains]
    return found


def is_bidirectional(attention: Node) -> bool:
    """True if no mask and no causality hides any key from any query, but for the windows of a frame."""
    if op_name(attention) == _IN_WINDOWS:
        return True
    return argument(attention, 3, "attn_mask") is None and not argument(attention, 5, "is_causal", False)


def _shape(block: Block) -> tuple[str, ...]:
    """Heads, tokens and channels of its attention, and channels of its stream."""
    return (*map(str, (shape_of(block.attention) or ())[1:]), *map(str, (shape_of(block.output) or ())[1:]))


def _match_block(view: GraphView, attention: Node) -> Block | Miss:
    if not is_bidirectional(attention):
        return Miss(attention, attention, "attention without a mask, as that of a vision encoder")
    operands = [operand for operand in attention.args[:3] if isinstance(operand, Node)]
    if not _share_frames_and_tokens(view, operands):
        return Miss(attention, attention, _AMONG_TOKENS)
    after, stream = _residual_after(view, attention, operands)
    if after is None or stream is None:
        return Miss(attention, attention, "attention whose result is added to the stream it was computed from")
    frames, _, tokens, _ = view.dims(operands[0])
    if not all(mine is its or its.size.is_(1) for mine, its in zip(view.dims(stream), (frames, tokens), strict=False)):
        return Miss(attention, attention, _AMONG_TOKENS)
    output = _output_of(view, after)
    if mixing := view.first_mixing(stream, (0, 1), after if output is None else output, through=attention):
        return Miss(attention, mixing, _part(view, mixing, operands, after))
    if output is None:
        return Miss(attention, after, "the attention's half of a block, whose MLP follows")
    return Block(stream, attention, output)


def _part(view: GraphView, node: Node, operands: Sequence[Node], after: Node) -> str:
    """What a node inside a block would be, if it did not mix."""
    if any(view.flow.is_from(operand, node) for operand in operands):
        return "a part of the query, key and value projections"
    return "a part of the output projection" if view.flow.is_from(after, node) else "a part of the MLP"


def _share_frames_and_tokens(view: GraphView, operands: Sequence[Node]) -> bool:
    """Whether query, key and value are [T, H, S, d] of the same frames and tokens."""
    shapes = [view.dims(operand) for operand in operands]
    if len(shapes) != 3 or any(len(dims) != 4 for dims in shapes):
        return False
    frames, _, tokens, _ = shapes[0]
    return all(dims[2] is tokens and (dims[0] is frames or frames.size.is_(1)) for dims in shapes[1:])


def _residual_after(
    view: GraphView, attention: Node, operands: Sequence[Node], *, of_input: bool = False
) -> tuple[Node | None, Node | None]:
    """(h + ·, h): the first sum of what comes out of the attention and of what went into it."""
    behind = view.flow.behind(attention)
    own = {attention, *behind}
    for node in behind:
        if op_name(node) != "add" or len(node.all_input_nodes) != 2:
            continue
        streams = [arg for arg in node.all_input_nodes if arg not in own]
        if len(streams) != 1:
            continue
        stream = peel(streams[0], CASTS)
        if not all(view.flow.is_from(operand, stream) for operand in operands):
            continue
        if stream.op == "placeholder" and not of_input:
            continue
        if len(view.dims(stream)) == 3:
            return node, stream
    return None, None


def stream_of(view: GraphView, attention: Node, operands: Sequence[Node]) -> Node | None:
    """The stream [T, S, D] that an attention's ``operands`` are computed from and its result is added to; it may be an
    input of the graph."""
    return _residual_after(view, attention, operands, of_input=True)[1]


def _output_of(view: GraphView, after: Node) -> Node | None:
    """``after + mlp(after)``."""
    for add in (user for user in after.users if op_name(user) == "add"):
        branch = other_operand(add, after)
        if isinstance(branch, Node) and view.flow.is_from(branch, after):
            return add
    return None
