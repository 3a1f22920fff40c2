"""What every layer takes of one mask for itself is taken once.

Before: ``sdpa(q0, k0, v0, attn_mask=mask[..., :S])      sdpa(q1, k1, v1, attn_mask=mask[..., :S])``      # [R, 1, S, T]
After:  ``part = mask[..., :S]; sdpa(q0, k0, v0, attn_mask=part)      sdpa(q1, k1, v1, attn_mask=part)``

This is how transformers before 4.53 write the mask of a language model, which has room for more keys than there are.
"""

from operator import getitem

import torch
from torch.fx import Graph, Node

from earlytom_compile.passes.graph_order import writes
from earlytom_compile.passes.patterns import argument, memory_of, op_name, value_of


def canonicalize_masks(graph: Graph) -> int:
    """Rewrite every match in place; returns how many parts had been taken before."""
    first, taken = dict[tuple[Node, str], Node](), 0
    writers = {memory_of(read): node for node in graph.nodes if writes(node) for read in node.all_input_nodes}
    for node in list(graph.nodes):
        if not _is_part_of_mask(node):
            continue
        needed = node.all_input_nodes
        if (writer := writers.get(memory_of(node))) is not None:
            needed.append(writer)
        if max(needed) > node:  # written to between the layers
            continue
        part = first.setdefault((needed[0], str(node.args[1])), node)
        if part is node:
            max(needed).append(node)  # outside of the layer, which is like the others then
        else:
            node.replace_all_uses_with(part)
            graph.erase_node(node)
            taken += 1
    return taken


def _is_part_of_mask(node: Node) -> bool:
    if node.target is not getitem or not isinstance(value_of(node), torch.Tensor):
        return False
    readers = [user for user in node.users if op_name(user) == "scaled_dot_product_attention"]
    return bool(readers) and all(argument(user, 3, "attn_mask") is node for user in readers)
