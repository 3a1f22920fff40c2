"""Sizes that were put together first are sizes like others.

Before: ``size = torch.Size([frames, 17, 32]); x.reshape(size)``      ``x.size()[:-2] + (32,)`` in the model
After:  ``x.reshape([frames, 17, 32])``
"""

from functools import partial
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg


def canonicalize_sizes(graph: Graph) -> int:
    """Rewrite every match in place; returns how many there were."""
    found = [node for node in graph.nodes if node.op == "call_function" and node.target is torch.Size]
    for node in found:
        for user in list(node.users):
            user.args, user.kwargs = map_arg((user.args, user.kwargs), partial(_unpacked, node))
        graph.erase_node(node)
    return len(found)


def _unpacked(size: Node, read: Node) -> Any:
    return size.args[0] if read is size else read
