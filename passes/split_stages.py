"""Cut a rewritten graph at its encoder layers, so that identical layers compile once.

Before: one graph; 26 encoder layers, three merges, projector, language model
After::

    h = before(pixels, ...)              # patch embedding
    h = layer(h, *weights_0)             # one compiled layer, called with each layer's weights
    ...
    h = layer(h, *weights_6)
    h = merge(h)                         # operators of ours: nothing to compile
    h = layer'(h, *weights_7)            # once more, for a number of frames known at run time
    ...
    out = after(h, ...)                  # projector, pooling, selection, language model

Cuts lie between nodes in the order of the graph, so whatever depends on that order (writes into tensors, autocast
regions) keeps it.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node

from .find_vision_encoder import Block
from .patterns import op_name, value_of

_ENTER = frozenset(("_enter_autocast", "_enter_inference_mode"))
_EXIT = frozenset(("_exit_autocast", "_exit_inference_mode"))
_SIZES = frozenset(("getitem", "sum", "item", "sym_size.int", "full", "_check", "ge", "le"))


@dataclass(frozen=True)
class Piece:
    """A part of the graph as a module of its own; its inputs are the placeholders' ``example_value``."""

    name: str  # of the submodule in the graph that calls it
    graph_module: GraphModule

    @property
    def inputs(self) -> list[Any]:
        """Example values of the inputs, fake tensors and sizes."""
        return [value_of(node) for node in self.graph_module.graph.nodes if node.op == "placeholder"]

    @property
    def computes(self) -> bool:
        """False if it holds only operators of ours and sizes: nothing for a compiler."""
        calls = (node for node in self.graph_module.graph.nodes if node.op.startswith("call"))
        return not all(_is_ours(node) or op_name(node) in _SIZES for node in calls)

    @property
    def key(self) -> str:
        """The same for pieces that the same compiled code can run."""
        nodes = list(self.graph_module.graph.nodes)
        index = {node: f"%{i}" for i, node in enumerate(nodes)}
        symbols: dict[str, str] = {}
        lines = []
        for node in nodes:
            arguments = torch.fx.map_arg((node.args, node.kwargs), lambda n: index[n])
            target = _layout(value_of(node), symbols) if node.op == "placeholder" else _name(node.target)
            lines.append(f"{node.op} {target} {arguments if node.op != 'placeholder' else ''}")
        return "\n".join(lines)


def split_stages(graph_module: GraphModule, blocks: Sequence[Block]) -> tuple[GraphModule, list[Piece]]:
    """(graph that calls the pieces, the pieces in the order it calls them).

    Replace the submodule ``piece.name`` of the graph to run something else in a piece's place. Without a cut that
    keeps every region whole there is one piece.
    """
    nodes = [node for node in graph_module.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    (output,) = (node for node in graph_module.graph.nodes if node.op == "output")
    top, copies = Graph(), dict[Node, Node]()
    for node in graph_module.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            copies[node] = top.node_copy(node)
    modules, pieces = dict[str, Any](), list[Piece]()
    cuts = [0, *_cuts(nodes, blocks), len(nodes)]
    for start, end in zip(cuts, cuts[1:], strict=False):
        name = f"piece_{len(pieces)}"
        part, read, made = _extract(nodes[start:end])
        modules[name] = GraphModule(graph_module, part)
        pieces.append(Piece(name, modules[name]))
        call = top.call_module(name, tuple(copies[node] for node in read))
        for position, node in enumerate(made):
            copies[node] = top.call_function(operator.getitem, (call, position))
    top.output(torch.fx.map_arg(output.args[0], lambda node: copies[node]))
    for node in top.nodes:
        if node.op == "get_attr":
            modules[str(node.target)] = operator.attrgetter(str(node.target))(graph_module)
    return GraphModule(modules, top), pieces


def _cuts(nodes: list[Node], blocks: Sequence[Block]) -> list[int]:
    """Positions in ``nodes`` where a layer begins or ends, without those inside a region."""
    place = {node: i for i, node in enumerate(nodes)}
    cuts = set[int]()
    for block in blocks:
        begin, end = min(place[node] for node in _own_nodes(block, place)), place[block.output] + 1
        cuts |= {begin, end}
    depth, inside = 0, set[int]()
    for position, node in enumerate(nodes):
        depth -= op_name(node) in _EXIT
        if depth > 0:
            inside.add(position)
        if op_name(node) in _ENTER:
            depth += 1
    return sorted(cut for cut in cuts - inside if 0 < cut < len(nodes))


def _own_nodes(block: Block, place: dict[Node, int]) -> set[Node]:
    """Everything computed from the block's input that its output needs, up to the merge that feeds it."""
    reached, pending = set[Node](), [block.output]
    first = place.get(block.input, -1)
    while pending:
        node = pending.pop()
        if node in reached or place.get(node, -1) <= first or _is_ours(node):
            continue
        reached.add(node)
        pending.extend(node.all_input_nodes)
    return reached


def _is_ours(node: Node) -> bool:
    return str(node.target).startswith("earlytom.")


def _extract(members: list[Node]) -> tuple[Graph, list[Node], list[Node]]:
    """(the members as a graph, what it reads, what others read of it)."""
    inside = set(members)
    read = list(dict.fromkeys(source for node in members for source in node.all_input_nodes if source not in inside))
    made = [node for node in members if any(user not in inside for user in node.users)]
    graph, copies = Graph(), dict[Node, Node]()
    for number, node in enumerate(read):
        copies[node] = graph.placeholder(f"input_{number}")
        copies[node].meta["example_value"] = value_of(node)
    for node in members:
        copies[node] = graph.node_copy(node, lambda source: copies[source])
    graph.output(tuple(copies[node] for node in made))
    return graph, read, made


def _layout(value: Any, symbols: dict[str, str]) -> str:
    """What compiled code depends on in an input: kind, sizes and strides, with sizes known at run time renamed."""
    if isinstance(value, torch.Tensor):
        sizes = [_size(size, symbols) for size in (*value.shape, *value.stride())]
        return f"{value.dtype} {value.device} {value.requires_grad} {sizes}"
    return f"{type(value).__name__} {_size(value, symbols)}"


def _size(size: Any, symbols: dict[str, str]) -> str:
    if not isinstance(size, torch.SymInt):
        return str(size)
    expression = size.node.expr
    ordered = sorted(expression.free_symbols, key=str)
    renamed = {symbol: sympy.Symbol(symbols.setdefault(str(symbol), f"n{len(symbols)}")) for symbol in ordered}
    return str(expression.xreplace(renamed))


def _name(target: Any) -> str:
    if isinstance(target, str):
        return target
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', target)} {id(target)}"
