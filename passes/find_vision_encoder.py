"""Find vision encoders by structure, whatever their classes are called.

A block is pre-norm and bidirectional::

    h1 = h + linear(attention(linear_qkv(norm(h))))      # h, h1, out: [T, S, D]
    out = h1 + linear(act(linear(norm(h1))))

and an encoder is a chain of isomorphic blocks, each fed by the one before. Language models do not match: their
attention is causal or masked. Module names appear in reports, never in decisions.
"""

from dataclasses import dataclass
from itertools import takewhile

from torch.fx import Graph, Node

from earlytom_compile.passes.patterns import (
    CASTS,
    MOVES,
    argument,
    module_path,
    op_name,
    other_operand,
    peel,
    readers,
    shape_of,
)

NORMS = frozenset(("layer_norm", "rms_norm"))
_MLP_SEARCH_LIMIT = 24  # nodes between the second norm and the second add; the widest known MLPs have 8


@dataclass(frozen=True)
class Block:
    """One encoder layer: its input and output [T, S, D] and the attention inside."""

    input: Node
    output: Node
    attention: Node
    signature: tuple[object, ...]

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
        return self.attention.kwargs.get("scale")  # type: ignore[return-value]


@dataclass(frozen=True)
class Encoder:
    """A chain of isomorphic blocks; ``blocks[i]`` is encoder layer i of those that the graph runs."""

    blocks: tuple[Block, ...]

    @property
    def name(self) -> str:
        """Where the chain lives in the model: the part its blocks' module paths share."""
        paths = [module_path(block.attention).split(".") for block in self.blocks]
        shared = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))]
        return ".".join(shared) or "<unnamed>"


def find_vision_encoder(graph: Graph) -> list[Encoder]:
    """Every maximal chain of isomorphic pre-norm bidirectional blocks, in graph order."""
    found = (_match_block(node) for node in graph.nodes if op_name(node) == "scaled_dot_product_attention")
    blocks = [block for block in found if block is not None]
    next_of = {block.input: block for block in blocks}
    continues = {block.output for block in blocks}
    encoders = []
    for block in blocks:
        if block.input in continues:
            continue
        chain = [block]
        while (following := next_of.get(chain[-1].output)) and following.signature == block.signature:
            chain.append(following)
        encoders.append(Encoder(tuple(chain)))
    return encoders


def is_bidirectional(attention: Node) -> bool:
    """True if no mask and no causality hides any key from any query."""
    return argument(attention, 3, "attn_mask") is None and not argument(attention, 5, "is_causal", False)


def _match_block(attention: Node) -> Block | None:
    if not is_bidirectional(attention):
        return None
    block_input = _attention_input(attention)
    if block_input is None:
        return None
    after_attention = _residual_after(attention, block_input)
    if after_attention is None:
        return None
    output, mlp = _mlp_after(after_attention)
    if output is None:
        return None
    weights = [tuple(map(str, shape_of(linear.args[1]) or ())) for linear in mlp]
    attention_shape = tuple(map(str, (shape_of(attention) or ())[1:]))
    return Block(block_input, output, attention, (attention_shape, *weights))


def _attention_input(attention: Node) -> Node | None:
    """The residual stream h that q, k and v are all projected from, behind one norm."""
    sources = set()
    for operand in attention.args[:3]:
        projection = peel(operand, MOVES | {"getitem", "chunk", "split"})
        if op_name(projection) != "linear":
            return None
        sources.add(peel(projection.args[0], CASTS))
    norm = sources.pop() if len(sources) == 1 else None
    return peel(norm.args[0], CASTS) if op_name(norm) in NORMS else None  # type: ignore[union-attr]


def _residual_after(attention: Node, block_input: Node) -> Node | None:
    """attention -> moves -> linear -> moves -> add(block_input, ·)."""
    node, projected = attention, False
    while len(following := readers(node)) == 1:
        (node,) = following
        name = op_name(node)
        if name in ("add", "iadd") and projected:
            return node if other_operand(node, block_input) is not None else None
        if name == "linear" and not projected:
            projected = True
        elif name not in MOVES:
            return None
    return None


def _mlp_after(after_attention: Node) -> tuple[Node | None, list[Node]]:
    """The add that closes ``h1 + mlp(norm(h1))`` and the linears inside, outermost first."""
    for add in readers(after_attention, "add", "iadd"):
        branch = other_operand(add, after_attention)
        if isinstance(branch, Node):
            linears = _linears_up_to_norm(branch, after_attention)
            if len(linears) >= 2:
                return add, linears
    return None, []


def _linears_up_to_norm(branch: Node, stream: Node) -> list[Node]:
    """Linears between ``branch`` and a norm of ``stream``; empty if any path leads elsewhere."""
    linears, pending, seen = [], [branch], set[Node]()
    while pending:
        node = pending.pop()
        if node in seen or node.op == "placeholder" or node.op == "get_attr":
            continue
        seen.add(node)
        if len(seen) > _MLP_SEARCH_LIMIT or node is stream:
            return []
        if op_name(node) in NORMS and peel(node.args[0], CASTS) is stream:
            continue
        if op_name(node) == "linear":
            linears.append(node)
        pending.extend(node.all_input_nodes)
    return linears
