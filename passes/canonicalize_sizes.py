"""Sizes that were put together first are sizes like others.

Before: ``size = torch.Size([frames, 17, 32]); x.reshape(size)``      ``x.size()[:-2] + (32,)`` in the model
After:  ``x.reshape([frames, 17, 32])``
"""

import torch
from torch.fx import Graph
from torch.fx.node import map_arg


def canonicalize_sizes(graph: Graph) -> int:
    """Rewrite every match in place; returns how many there were."""
    found = [node for node in graph.nodes if node.op == "call_function" and node.target is torch.Size]
    for node in found:
        (sizes,) = node.args
        for user in list(node.users):
            user.args, user.kwargs = map_arg(
                (user.args, user.kwargs), lambda read, node=node, sizes=sizes: sizes if read is node else read
            )
        graph.erase_node(node)
    return len(found)
