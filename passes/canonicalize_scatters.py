"""What is scattered into a prompt is rows.

Before: ``embeds.masked_scatter(mask, features)      # [V * F, P, C], frames and tokens never made one axis``
After:  ``rows = features.flatten(0, -2); embeds.masked_scatter(mask, rows)      # [V * F * P, C]``

masked_scatter takes the numbers of its source in their order and never asks for the shape, so some models leave it as
it comes from the projector. The place where frames and their tokens become one axis is then nowhere in the graph.

Only for what is computed from pixels ``[V, F, C, H, W]``. Images ``[N, C, H, W]`` reach the prompt in the same way, and
in rows nothing would tell several of them from the frames of one video.
"""

import torch
from torch.fx import Graph, Node

from earlytom_compile.passes.axis_rules_indexing import is_weight
from earlytom_compile.passes.dataflow import Dataflow
from earlytom_compile.passes.patterns import argument, insert, op_name, shape_of, value_of


def canonicalize_scatters(graph: Graph) -> int:
    """Rewrite every match in place; returns how many there were."""
    found = [(node, source) for node in graph.nodes if (source := _scattered_by(node)) is not None]
    if not found:
        return 0
    flow, videos = Dataflow(graph), [node for node in graph.nodes if _may_be_videos(node)]
    rewritten = 0
    for node, source in found:
        if any(flow.is_from(source, pixels) for pixels in videos):
            with graph.inserting_before(node):
                rows = insert(graph, "flatten", source, 0, -2, like=value_of(source).flatten(0, -2))
            node.replace_input_with(source, rows)
            rewritten += 1
    return rewritten


def _scattered_by(node: Node) -> Node | None:
    """The source of a masked_scatter that is no rows [N, C] yet."""
    source = argument(node, 2, "source") if op_name(node) == "masked_scatter" else None
    return source if isinstance(source, Node) and len(shape_of(source) or ()) > 2 else None


def _may_be_videos(node: Node) -> bool:
    value = value_of(node)
    is_input = node.op == "placeholder" and isinstance(value, torch.Tensor) and not is_weight(node)
    return is_input and value.dim() == 5 and value.is_floating_point()
