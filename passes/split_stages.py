"""Cut a graph at its layers, so that identical layers compile once.

Before: one graph; 26 encoder layers, three merges, projector, language model
After::

    h = before(pixels, ...)              # patch embedding
    h = layer(h, *weights_0)             # one compiled layer, called with each layer's weights
    ...
    h = layer(h, *weights_6)
    h = merge(h)                         # operators of ours: nothing to compile
    h = layer'(h, *weights_7)            # once more, for a number of frames known at run time
    ...
    h = between(h, ...)                  # projector, pooling, selection, the shorter prompt
    h = decoder_layer(h, *weights_0)     # the language model's layers likewise
    ...
    out = after(h, ...)

The encoder's layers are known from their structure. Those of a language model are told by the path of the module
that ran a node, which may be wrong: a cut in another place costs time, never the result. Cuts lie between nodes in
the order of the graph, so whatever depends on that order keeps it. None opens an autocast region, and none parts two
views of one memory that somebody writes to, since pieces are compiled as if their inputs shared nothing.
"""

import operator
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from earlytom_compile.passes.find_vision_encoder import Block
from earlytom_compile.passes.graph_order import writes
from earlytom_compile.passes.patterns import MOVES, insert, memory_of, module_path, op_name, value_of

_ENTER = frozenset(("_enter_autocast", "_enter_inference_mode"))
_EXIT = frozenset(("_exit_autocast", "_exit_inference_mode"))
_LAYER = re.compile(r"^(.*?)[.](\d+)(?=[.]|$)")
_FEWEST_LAYERS = 3
_SIZES = frozenset(
    ("getitem", "sum", "item", "sym_size.int", "sym_min", "full", "arange", "_check", "ge", "le", "sub", "mul")
)
_MOVES = MOVES | {"cat", "stack", "index_select"}
FRAME_BY_FRAME = frozenset(
    ("earlytom::attention_received", "earlytom::window_attention", "earlytom::window_attention_received")
)
"""Operators of ours in the middle of a layer that compute each frame (axis 0) from that frame alone."""


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
        """False if it holds only operators of ours, moves of what they made and sizes: nothing for a compiler."""
        nodes = self.graph_module.graph.nodes
        moves = _MOVES if any(map(_is_ours, nodes)) else frozenset[str]()
        return any(_computes(node) and op_name(node) not in moves for node in nodes)

    @property
    def has_attributes(self) -> bool:
        """Whether it reads constants or functions that are attributes of the graph."""
        return any(node.op == "get_attr" for node in self.graph_module.graph.nodes)

    @property
    def where(self) -> str:
        """The part of the model it comes from, for messages."""
        paths = (module_path(node) for node in self.graph_module.graph.nodes)
        return next((path for path in paths if path), "<unnamed>")

    @property
    def key(self) -> str:
        """The same for pieces that the same compiled code can run."""
        nodes = list(self.graph_module.graph.nodes)
        index = {node: f"%{i}" for i, node in enumerate(nodes)}
        symbols: dict[str, str] = {}
        lines = []
        for node in nodes:
            arguments = map_arg((node.args, node.kwargs), lambda n: index[n])
            target = _layout(value_of(node), symbols) if node.op == "placeholder" else _name(node.target)
            lines.append(f"{node.op} {target} {arguments if node.op != 'placeholder' else ''}")
        return "\n".join(lines)


def split_stages(
    graph_module: GraphModule, blocks: Sequence[Block] = (), *, by_module: bool = True, selection: Node | None = None
) -> tuple[GraphModule, list[Piece]]:
    """(graph that calls the pieces, the pieces in the order it calls them).

    ``blocks`` are the layers known by structure; ``by_module`` adds those known by module path. What is computed of
    pixels alone, and of the last layer alone before ``selection``, a result of the operator that looks at all tokens,
    are pieces too. Replace the submodule ``piece.name`` of the graph to run something else in a piece's place.
    """
    nodes = [node for node in graph_module.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    (output,) = (node for node in graph_module.graph.nodes if node.op == "output")
    top, copies = Graph(), dict[Node, Node]()
    for node in graph_module.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            copies[node] = top.node_copy(node)
    modules, pieces = dict[str, Any](), list[Piece]()
    sizes = _size_nodes(graph_module.graph)
    between = _encoder_cuts(nodes, blocks) | (_module_cuts(nodes) if by_module else set())
    if blocks:
        end = nodes.index(selection) + 1 if selection is not None else 0
        between |= {*_cuts_around_ours(nodes, 0, min(_encoder_cuts(nodes, blocks)))[:2]}
        between |= {*_cuts_around_ours(nodes, nodes.index(blocks[-1].output) + 1, end)}
    between.add(next((i for i, node in enumerate(nodes) if _computes(node)), 0))  # sizes that come first are no work
    between -= _inside_regions(nodes) | _between_written_views(graph_module.graph, nodes)
    if any(op_name(node).startswith("_vmap_") for node in nodes):
        between = set()  # such as the masks of flex_attention: a stack of transforms that all nodes in it share
    cuts = [0, *sorted(cut for cut in between if 0 < cut < len(nodes)), len(nodes)]
    for start, end in zip(cuts, cuts[1:], strict=False):
        name = f"piece_{len(pieces)}"
        part, read, made = extract(nodes[start:end], sizes)
        read = _sizes_from_tensors(part, read)
        modules[name] = GraphModule(graph_module, part)
        pieces.append(Piece(name, modules[name]))
        call = top.call_module(name, tuple(copies[node] for node in read))
        for position, node in enumerate(made):
            copies[node] = top.call_function(operator.getitem, (call, position))
            copies[node].meta["example_value"] = value_of(node)
    top.output(map_arg(output.args[0], lambda node: copies[node]))
    for node in top.nodes:
        if node.op == "get_attr":
            modules[str(node.target)] = operator.attrgetter(str(node.target))(graph_module)
    return GraphModule(modules, top), pieces


def _encoder_cuts(nodes: list[Node], blocks: Sequence[Block]) -> set[int]:
    """Positions in ``nodes`` where an encoder layer begins or ends."""
    place = {node: i for i, node in enumerate(nodes)}
    begins = {min(place[node] for node in _own_nodes(block, place)) for block in blocks}
    return begins | {place[block.output] + 1 for block in blocks}


def _cuts_around_ours(nodes: list[Node], begin: int, end: int) -> list[int]:
    """Positions from ``begin`` to ``end`` where operators of ours, which look at all frames, end or begin, in turn."""
    cuts, ours = list[int](), True
    for position, node in enumerate(nodes[begin:end], begin):
        if _is_ours(node) if not ours else _computes(node):
            cuts.append(position)
            ours = not ours
    return cuts


def _module_cuts(nodes: list[Node]) -> set[int]:
    """Positions where one of several numbered modules begins or ends, such as ``model.layers.3``."""
    matches = [_LAYER.match(module_path(node)) for node in nodes]
    counts = Counter(parent for parent, _ in {(match[1], match[2]) for match in matches if match})
    layers = [match[0] if match and counts[match[1]] >= _FEWEST_LAYERS else None for match in matches]
    first = {layer: i for i, layer in reversed(list(enumerate(layers))) if layer is not None}
    last = {layer: i + 1 for i, layer in enumerate(layers) if layer is not None}
    return set(first.values()) | set(last.values())


def _inside_regions(nodes: list[Node]) -> set[int]:
    """Positions inside an autocast region."""
    depth, inside = 0, set[int]()
    for position, node in enumerate(nodes):
        if depth > 0:
            inside.add(position)
        depth += (op_name(node) in _ENTER) - (op_name(node) in _EXIT)
    return inside


def _between_written_views(graph: Graph, nodes: list[Node]) -> set[int]:
    """Positions that two tensors of one memory cross, if that memory is written to anywhere."""
    place = {node: i for i, node in enumerate(nodes)}
    targets = ((*node.args[:1], node.kwargs.get("out")) for node in nodes if writes(node))
    written = {memory_of(target) for either in targets for target in either} - {None}
    crossing: dict[Any, list[tuple[int, int]]] = {}
    for node in graph.nodes:
        memory = memory_of(node)
        last = max((place[user] for user in node.users if user in place), default=-1)
        if memory in written and last >= 0:
            crossing.setdefault(memory, []).append((place.get(node, -1) + 1, last))
    parted = set[int]()
    for spans in crossing.values():
        counts = Counter(position for begin, end in spans for position in range(begin, end + 1))
        parted |= {position for position, count in counts.items() if count > 1}
    return parted


def _own_nodes(block: Block, place: dict[Node, int]) -> set[Node]:
    """Everything computed from the block's input that its output needs, up to the merge that feeds it."""
    reached, pending = set[Node](), [block.output]
    first = place.get(block.input, -1)
    while pending:
        node = pending.pop()
        if node in reached or place.get(node, -1) <= first or (_is_ours(node) and node is not block.attention):
            continue
        reached.add(node)
        pending.extend(node.all_input_nodes)
    return reached


def _computes(node: Node) -> bool:
    """False for operators of ours and sizes."""
    return node.op.startswith("call") and not (_is_ours(node) or op_name(node) in _SIZES)


def _is_ours(node: Node) -> bool:
    """True for an operator of ours and for one of its results."""
    made = node.args[0] if node.target is operator.getitem else node
    return isinstance(made, Node) and str(made.target).startswith("earlytom.")


def _size_nodes(graph: Graph) -> dict[Any, Node]:
    """The inputs of the graph that are symbols of dynamic shapes."""
    values = ((value_of(node), node) for node in graph.nodes if node.op == "placeholder")
    sizes = ((value.node.expr, node) for value, node in values if isinstance(value, torch.SymInt))
    return {symbol: node for symbol, node in sizes if symbol.is_Symbol}


def extract(members: list[Node], sizes: dict[Any, Node]) -> tuple[Graph, list[Node], list[Node]]:
    """(the members as a graph, what it reads, what others read of it); ``sizes`` tells what else knows a symbol."""
    inside = set(members)
    read = list(dict.fromkeys(source for node in members for source in node.all_input_nodes if source not in inside))
    # A size such as (s // 14)**2 does not tell s, which compiled code needs.
    symbols = sorted(set().union(*(_symbols(value_of(node)) for node in read)), key=str)
    named = (sizes[symbol] for symbol in symbols if symbol in sizes)
    read = list(dict.fromkeys([*read, *(node for node in named if node not in inside)]))
    made = [node for node in members if any(user not in inside for user in node.users)]
    graph, copies = Graph(), dict[Node, Node]()
    for number, node in enumerate(node for node in read if not _is_module(node)):
        copies[node] = graph.placeholder(f"input_{number}")
        copies[node].meta["example_value"] = value_of(node)
    for node in (*filter(_is_module, read), *members):
        copies[node] = graph.node_copy(node, lambda source: copies[source])
    graph.output(tuple(copies[node] for node in made))
    return graph, [node for node in read if not _is_module(node)], made


def gather_pieces(stages: GraphModule, pieces: Sequence[Piece], name: str) -> tuple[list[Node], list[Node]]:
    """Put consecutive ``pieces`` into one submodule of the graph that calls them, called ``name``: (what it reads, what
    it made, as nodes that show their values)."""
    names, graph = {piece.name for piece in pieces}, stages.graph
    calls = {node for node in graph.nodes if node.op == "call_module" and node.target in names}
    members = [node for node in graph.nodes if node in calls or not calls.isdisjoint(node.all_input_nodes[:1])]
    members = [node for node in members if node in calls or node.target is operator.getitem]
    part, read, made = extract(members, {})
    stages.add_submodule(name, GraphModule(stages, part))
    with graph.inserting_before(members[-1].next):
        call = graph.call_module(name, tuple(read))
        for position, node in enumerate(made):
            result = graph.call_function(operator.getitem, (call, position))
            result.meta["example_value"] = value_of(node)
            node.replace_all_uses_with(result)
    for node in reversed(members):
        graph.erase_node(node)
    stages.recompile()
    return read, made


def _sizes_from_tensors(graph: Graph, read: list[Node]) -> list[Node]:
    """Let a piece ask its tensors for their sizes, whoever told it before, so that layers which differ in that alone
    are of one kind; returns what of ``read`` is still an input."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    places: dict[Any, tuple[Node, int]] = {}
    for node in reversed(inputs):
        shape = value_of(node).shape if isinstance(value_of(node), torch.Tensor) else ()
        for dim, size in reversed(list(enumerate(shape))):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                places[size.node.expr] = node, dim
    asked: dict[Any, Node] = {}
    first = next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
    for node in list(graph.nodes):
        size = value_of(node)
        symbol = size.node.expr if isinstance(size, torch.SymInt) else None
        if symbol not in places:
            continue
        if symbol not in asked:
            with graph.inserting_before(first):
                asked[symbol] = insert(graph, torch.ops.aten.sym_size.int, *places[symbol], like=size)
        node.replace_all_uses_with(asked[symbol])
        graph.erase_node(node)
    left = set(graph.nodes)
    return [source for source, node in zip(read, inputs, strict=True) if node in left]


def _is_module(node: Node) -> bool:
    """True for the function a higher-order operator calls, which is part of a piece and no input."""
    return node.op == "get_attr" and isinstance(
        operator.attrgetter(str(node.target))(node.graph.owning_module), torch.nn.Module
    )


def _symbols(value: Any) -> set[Any]:
    if isinstance(value, torch.Tensor):
        return set().union(*(_symbols(size) for size in (*value.shape, *value.stride())))
    return set(value.node.expr.free_symbols) if isinstance(value, torch.SymInt) else set()


def _layout(value: Any, symbols: dict[str, str]) -> str:
    """What compiled code depends on in an input: kind, sizes and strides, with sizes known at run time renamed."""
    if isinstance(value, torch.Tensor):
        sizes = [_size(size, symbols) for size in (*value.shape, *value.stride())]
        return f"{value.dtype} {value.device} {value.requires_grad} {sizes}{_packed(value, symbols)}"
    return f"{type(value).__name__} {_size(value, symbols)}"


def _packed(value: torch.Tensor, symbols: dict[str, str]) -> str:
    """What a tensor that holds others, such as a quantised weight, is made of; nothing for any other."""
    if not is_traceable_wrapper_subclass(value):
        return ""
    names, context = value.__tensor_flatten__()
    return f" {type(value)} {context} {[_layout(getattr(value, name), symbols) for name in names]}"


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
