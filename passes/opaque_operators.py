"""Operators that the axis rules do not know: a packed or quantised linear of another library, say.

    register_position_wise("bitsandbytes::int8_linear")      # declared: computes [..., N] of [..., D] one by one
    mark_position_wise(graph_module, example_inputs)          # or found out, by a probe with the model's own weights

The axis inference (axes.py) takes what is marked for a function of the last axis, and so do the finders.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from earlytom_compile.passes.axes import OURS, op_name
from earlytom_compile.passes.axis_call import MARK, RULES
from earlytom_compile.passes.axis_rules_indexing import is_weight
from earlytom_compile.passes.dataflow import Dataflow
from earlytom_compile.passes.patterns import shape_of, value_of
from earlytom_compile.passes.probe import Probe

_DECLARED: set[str] = set()


def register_position_wise(operator: str) -> None:
    """Declare that ``operator`` (``"namespace::name"``) computes [..., N] of its one activation [..., D] and of
    weights, each position from itself alone. Raises :class:`ValueError` for what is no such name."""
    if operator.count("::") != 1 or not all(operator.split("::")):
        raise ValueError(f"register_position_wise({operator!r}): must be 'namespace::name', as torch.ops has it.")
    _DECLARED.add(operator)


def mark_position_wise(graph_module: GraphModule, example_inputs: Sequence[Any]) -> int:
    """Mark the unknown operators that are position-wise, in their ``meta``; returns how many there are."""
    graph = graph_module.graph
    unknown = [node for node in graph.nodes if _is_unknown(node)]
    if not unknown:
        return 0
    activations = activations_of(graph_module)
    probe = Probe(graph_module, example_inputs, weights_of(graph_module))
    found: dict[Any, bool] = {}
    marked = 0
    for node in unknown:
        sources = [arg for arg in node.all_input_nodes if arg in activations and shape_of(arg) is not None]
        lead = [shape[:-1] if (shape := shape_of(x)) else None for x in (node, *sources)]
        if len(sources) != 1 or not lead[0] or list(map(str, lead[0])) != list(map(str, lead[1] or ())):
            continue
        told = map_arg((node.args, node.kwargs), lambda read: str(shape_of(read) or value_of(read)))
        kind = (node.target, str(told))
        if kind not in found:  # layers differ in their weights, and not in what is done with them
            found[kind] = op_name(node) in _DECLARED or probe.is_position_wise(node, sources[0])
        if found[kind]:
            node.meta[MARK] = sources[0]
            marked += 1
    return marked


def activations_of(graph_module: GraphModule) -> set[Node]:
    """All that is computed from what a call gives, weights and buffers excluded."""
    flow = Dataflow(graph_module.graph)
    inputs = [node for node in flow.nodes if node.op == "placeholder" and _is_data(node)]
    return {*inputs, *(node for source in inputs for node in flow.behind(source))}


def weights_of(graph_module: GraphModule) -> set[Node]:
    """The graph inputs that are parameters and buffers."""
    return {node for node in graph_module.graph.nodes if node.op == "placeholder" and is_weight(node)}


def _is_data(node: Node) -> bool:
    return isinstance(value_of(node), torch.Tensor) and not is_weight(node)


def _is_unknown(node: Node) -> bool:
    if not node.op.startswith("call") or not isinstance(value_of(node), torch.Tensor):
        return False
    name = op_name(node)
    return name not in RULES and not name.startswith(f"{OURS}::")


def read_instead(node: Node, old: Node, new: Node) -> None:
    """Let ``node`` read ``new`` for ``old``, in its mark too."""
    node.replace_input_with(old, new)
    if node.meta.get(MARK) is old:
        node.meta[MARK] = new
