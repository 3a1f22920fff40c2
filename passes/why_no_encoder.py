"""Why a graph has no vision encoder that is understood: the first operator that was not, where it is, and what the
finder took it for. A graph with a picture in it never hears that it has none."""

from collections.abc import Sequence

from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from earlytom_compile.passes.attention_spellings import attention_operators
from earlytom_compile.passes.axes import op_name
from earlytom_compile.passes.axis_call import MARK, RULES
from earlytom_compile.passes.axis_rules_indexing import is_weight
from earlytom_compile.passes.find_pixels import caches, pictures
from earlytom_compile.passes.find_vision_encoder import FoundEncoders, GraphView, Miss, is_bidirectional
from earlytom_compile.passes.patterns import argument, shape_of, value_of
from earlytom_compile.passes.reasons import NotApplicable, NothingToCompress, describe

_IN_PLACE = "use earlytom_compile.compile(model), whose generate() and forward() encode the video themselves"


def why_no_encoder(view: GraphView, found: FoundEncoders) -> NotApplicable:
    """The reason, to be raised."""
    seen = pictures(view)
    misses = [miss for miss in found.misses if any(view.flow.is_from(miss.attention, picture) for picture in seen)]
    if any(_is_of_packed_frames(view, miss.attention) for miss in found.misses):
        return NotApplicable(
            "all frames of all videos stand in one sequence [positions, channels], cut into frames by lengths that "
            "only the values of a tensor tell, so that no axis holds the frames",
            f"Instead of compiling the model or its tower, {_IN_PLACE}, and encode_videos() the tower alone",
        )
    if misses:
        return _of_miss(view, misses[0], seen)
    if seen:
        return _of_unknown(view, seen)
    if _has_foreign_features(view):
        return NotApplicable(
            "the video was encoded before this graph began, as generate() of transformers does outside forward(), and "
            "its features come as an input",
            f"Instead of compiling forward() or generate(), {_IN_PLACE}",
        )
    if caches(view):
        return NothingToCompress("this graph goes on behind a prompt: a step of decoding", "There is nothing to do")
    return NotApplicable(
        "this graph has no vision encoder and no picture among its inputs: a text-only call, or a model without one",
        f"A call without a video needs no compression; if there was one, {_IN_PLACE}",
    )


def _of_miss(view: GraphView, miss: Miss, seen: Sequence[Node]) -> NotApplicable:
    unknown = _first_unknown(view.flow.before(miss.attention), view, seen) if miss.at is miss.attention else None
    if unknown is not None:
        return _unknown(unknown, miss.taken_for.replace("attention of", "what makes the queries, keys and values of"))
    why = ": it mixes frames or tokens, or no axis rule covers it" if miss.at is not miss.attention else ""
    return NotApplicable(
        f"no vision encoder was understood: {describe(miss.at)} was taken for {miss.taken_for}, and is not{why}",
        _cure(miss.at),
    )


def _of_unknown(view: GraphView, seen: Sequence[Node]) -> NotApplicable:
    unknown = _first_unknown(view.flow.nodes, view, seen)
    if unknown is not None:
        return _unknown(unknown, "the attention of an encoder block or a part of one")
    reached = [n for n in view.flow.nodes if n.op != "output" and any(view.flow.is_from(n, each) for each in seen)]
    weights = next((n for n in reached if op_name(n) in ("softmax", "einsum", "baddbmm")), None)
    if weights is not None:
        return NotApplicable(
            f"no vision encoder was understood: {describe(weights)} was taken for a part of an attention that is "
            "spelled in an unknown way",
            "Known are scaled_dot_product_attention, matmul or bmm with softmax and matmul, and flex_attention without "
            "a score or mask of its own; earlytom_compile.register_attention(name, arguments) declares an operator",
        )
    return NotApplicable(
        "no vision encoder was understood: the pictures of this graph go through no attention; the last operator they "
        f"reach is {describe(reached[-1])}",
        'A graph break lies before it (TORCH_LOGS="graph_breaks" shows it), or the encoder has no attention blocks, '
        "whose frames cannot be merged",
    )


def _first_unknown(nodes: Sequence[Node], view: GraphView, seen: Sequence[Node]) -> Node | None:
    """The first operator that a picture reaches and that nobody has a rule for."""
    for node in nodes:
        name = op_name(node)
        known = name in RULES or MARK in node.meta or value_of(node) is None
        if node.op.startswith("call") and not known and any(view.flow.is_from(node, each) for each in seen):
            return node
    return None


def _unknown(node: Node, taken_for: str) -> NotApplicable:
    return NotApplicable(
        f"no vision encoder was understood: {describe(node)} is an operator that is not known, or that mixes "
        f"positions; it was taken for {taken_for}",
        _cure(node),
    )


def _cure(node: Node) -> str:
    if "::" in op_name(node):
        return (
            "If the operator is attention, earlytom_compile.register_attention(name, arguments) declares it (known: "
            f"{', '.join(attention_operators())}); if it computes every token from itself alone, "
            "earlytom_compile.register_position_wise(name) does"
        )
    return "docs/adding-a-model.md says what a block must be; other models run uncompressed"


def _is_of_packed_frames(view: GraphView, attention: Node) -> bool:
    """Whether an attention without a mask is computed from one sequence that has no axis of batches, or begins a graph
    with a piece of one."""
    query, key = (shape_of(argument(attention, place, name)) or () for place, name in enumerate(("query", "key")))
    if len(query) != 4 or len(key) != 4 or not is_bidirectional(attention):
        return False
    if not (statically_known_true(query[0] == 1) and statically_known_true(query[2] == key[2])):
        return False
    linears = [node for node in view.flow.before(attention) if op_name(node) == "linear"]
    return all(len(shape_of(argument(node, 0, "input")) or ()) == 2 for node in linears)


def _has_foreign_features(view: GraphView) -> bool:
    """Whether rows that are an input of the graph are put in the place of prompt tokens."""
    for node in view.flow.nodes:
        if op_name(node) == "masked_scatter":
            rows = argument(node, 2, "source")
            if isinstance(rows, Node) and any(
                each.op == "placeholder" and not is_weight(each) for each in view.flow.before(rows)
            ):
                return True
    return False
