"""Dynamo graphs to work on: traced without being compiled, changed by a test, run on the inputs they were traced with.

traced = trace(model, x)
axis = shrink(traced, traced.node("x"), dim=0, to=3)
retarget_axes(traced.module, [axis])
assert_close(traced.run(), model(x[:3]))
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodDescriptorType, WrapperDescriptorType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from earlytom_compile.passes.retarget_axes import ResizedAxis


@dataclass
class Traced:
    """One graph, and the flat inputs it takes."""

    module: GraphModule
    inputs: tuple[Any, ...]

    def node(self, name: str) -> Node:
        """The node whose name ends in ``name``, as placeholders do (``l_x_``)."""
        found = [n for n in self.module.graph.nodes if n.name == name or n.name.strip("_").endswith(f"_{name}")]
        assert found, f"{name} is none of {[n.name for n in self.module.graph.nodes]}"
        return found[0]

    def called(self, name: str) -> list[Node]:
        """Calls of an op, by the last part of its name."""
        return [
            n
            for n in self.module.graph.nodes
            if n.op.startswith("call") and (n.target == name or getattr(n.target, "__name__", "") == name)
        ]

    def run(self) -> Any:
        """What the (changed) graph computes; a single result is not in a tuple."""
        with torch.no_grad():
            results = self.module(*self.inputs)
        return results[0] if len(results) == 1 else results

    def code(self) -> str:
        return str(self.module.graph)


def trace(function: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any) -> Traced:
    """Traces a call that must give one graph."""
    modules: list[GraphModule] = []
    calls: list[tuple[Any, ...]] = []

    def backend(module: GraphModule, _: Any) -> Callable[..., Any]:
        modules.append(module)

        def run(*inputs: Any) -> Any:
            calls.append(inputs)
            return module.forward(*inputs)

        return run

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*args, **kwargs)
    assert len(modules) == len(calls) == 1, f"{len(modules)} graphs"
    return Traced(modules[0], calls[0])


def shrink(
    traced: Traced,
    node: Node,
    dim: int,
    to: int,
    name: str = "axis",
    as_node: bool = False,
) -> ResizedAxis:
    """Cuts an axis of ``node`` to its first ``to`` positions for everything that reads it, literals excepted.

    ``as_node``: the new size is known while running only.
    """
    graph, users = traced.module.graph, list(node.users)
    first = next(n for n in graph.nodes if n.op != "placeholder")
    with graph.inserting_before(first if node.op == "placeholder" else node.next):
        cut = graph.call_function(torch.ops.aten.narrow.default, (node, dim, 0, to))
    cut.meta["example_value"] = node.meta["example_value"]
    for user in users:
        user.replace_input_with(node, cut)
    if not as_node:
        return ResizedAxis(cut, dim, name, to)
    with graph.inserting_after(cut):
        size = graph.call_function(torch.ops.aten.sym_size.int, (cut, dim))
    return ResizedAxis(cut, dim, name, size)


class Recorder(TorchFunctionMode):
    """Records PyTorch calls as Dynamo would write them down, in a millisecond: for tests of many small graphs."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.graph = Graph()
        self.nodes: dict[int, Node] = {}
        self.kept: list[Tensor] = []
        for i, tensor in enumerate(inputs):
            self._remember(tensor, self.graph.placeholder(f"x{i}"))

    def _remember(self, result: Any, node: Node) -> None:
        node.meta["example_value"] = result
        if isinstance(result, Tensor):
            self.nodes[id(result)] = node
            self.kept.append(result)
        elif isinstance(result, (tuple, list)):
            for i, part in enumerate(result):
                self._remember(part, self.graph.call_function(operator.getitem, (node, i)))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.__name__ == "__get__" and isinstance(result, Tensor):
            args, func = (*args[:1], func.__self__.__name__), getattr
        elif func.__name__ in ("__get__", "size", "dim"):  # sizes become literals
            return result
        inputs = tree_map(lambda x: self.nodes.get(id(x), x), (args, kwargs or {}))
        method = isinstance(func, (MethodDescriptorType, WrapperDescriptorType)) or func.__name__.startswith("__")
        name = {"__getitem__": operator.getitem}.get(func.__name__)
        if method and name is None:
            node = self.graph.call_method(func.__name__, *inputs)
        else:
            node = self.graph.call_function(name or func, *inputs)
        self._remember(result, node)
        return result


def record(function: Callable[..., Any], *inputs: Tensor) -> Traced:
    """The graph of one run of ``function``, static as Dynamo's."""
    recorder = Recorder(*inputs)
    with torch.no_grad(), recorder:
        result = function(*inputs)
    results = result if isinstance(result, tuple) else (result,)
    recorder.graph.output(tuple(recorder.nodes[id(r)] for r in results))
    return Traced(GraphModule(nn.Module(), recorder.graph), inputs)
