"""Find the graph input that the frames of a vision encoder come from, and what else could be a picture.

pixels [V, F, 3, H, W] -> view [V*F, 3, H, W] -> patches -> h [V*F, S, D]      T = V*F, followed back by its axis
"""

from torch.fx import Node

from earlytom_compile.passes.axes import op_name
from earlytom_compile.passes.axis_algebra import Dim
from earlytom_compile.passes.axis_rules_indexing import is_weight
from earlytom_compile.passes.find_vision_encoder import Encoder, GraphView
from earlytom_compile.passes.patterns import MOVES, argument, shape_of
from earlytom_compile.passes.reasons import NotApplicable, describe


def find_pixels(view: GraphView, encoder: Encoder) -> tuple[Node, int, Dim]:
    """(the graph input that the encoder's frames come from, which of its axes they are, the axis T = V * F)."""
    first = encoder.blocks[0].input
    batch = view.dims(first)[0]
    inputs = [node for node in view.flow.before(first) if node.op == "placeholder" and not is_weight(node)]
    pixels = [node for node in inputs if node in view.pictures]
    products = [r for r in view.axes.space.relations if r.kind == "product" and r.whole.root is batch]
    halves = [[part.root for part in relation.parts] for relation in products]
    for node in pixels:
        dims = view.dims(node)
        one = batch.size.is_(1) and dims[0].size.is_(1)
        if len(dims) < 5 and (dims[0] is batch or one):
            return node, 0, batch
        if len(dims) < 5:
            continue
        single = dims[1].size.is_(1) and (one or dims[0] is batch)  # one frame a video
        if dims[1] is batch or single or list(dims[:2]) in halves:
            return node, 1, batch
    shapes = ", ".join(f"{node.target} {tuple(map(str, shape_of(node) or ()))}" for node in inputs) or "none"
    raise NotApplicable(
        f"the frames of the vision encoder {encoder.name} cannot be followed back to a graph input [videos, frames, "
        f"channels, height, width] (inputs it is computed from: {shapes}); "
        f"{_first_unfollowed(view, pixels, first, batch)}",
        "Images are never compressed; for other models see docs/adding-a-model.md",
    )


def _first_unfollowed(view: GraphView, pixels: list[Node], first: Node, batch: Dim) -> str:
    for source in pixels:
        for node in view.flow.between(source, first):
            if batch in view.dims(node):
                return f"they begin at {describe(node)}"
    return "no operator on the way has them as an axis"


def pictures(view: GraphView) -> list[Node]:
    """The graph inputs that could be videos or images; keys and values of a cache have as many axes."""
    return [node for node in view.pictures if not _is_cache(node)]


def caches(view: GraphView) -> list[Node]:
    """The graph inputs that are keys and values of earlier positions."""
    return [node for node in view.pictures if _is_cache(node)]


def _is_cache(node: Node) -> bool:
    """Whether an attention takes it as keys or values, with nothing computed in between."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        for user in set(current.users) - seen:
            if op_name(user) == "scaled_dot_product_attention":
                return current in (argument(user, 1, "key"), argument(user, 2, "value"))
            if op_name(user) in MOVES | {"cat", "getitem", "index_copy", "index_select"}:
                seen.add(user)
                pending.append(user)
    return False
