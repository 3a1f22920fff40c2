"""A tensor that is split into one part is that part.

Before: ``(video,) = torch.split(features, 8)        # one video of 8 frames in a list of videos``
After:  ``video = features``

A list of videos of which there is one is how some models leave their encoder. PyTorch cannot split by a size that is
known at run time only, as the number of merged frames is.
"""

from operator import getitem

from torch.fx import Graph

from earlytom_compile.passes.axes import op_name
from earlytom_compile.passes.patterns import value_of

_SPLITS = frozenset(("split", "chunk", "tensor_split", "split_with_sizes", "unsafe_split", "unsafe_chunk"))


def canonicalize_splits(graph: Graph) -> int:
    """Rewrite every match in place; returns how many there were."""
    rewritten = 0
    for node in list(graph.nodes):
        parts = value_of(node)
        if op_name(node) not in _SPLITS or not isinstance(parts, (tuple, list)) or len(parts) != 1 or not node.args:
            continue
        if all(user.target is getitem and user.args[1] in (0, -1) for user in node.users):
            for part in list(node.users):
                part.replace_all_uses_with(node.args[0])
                graph.erase_node(part)
            graph.erase_node(node)
            rewritten += 1
    return rewritten
