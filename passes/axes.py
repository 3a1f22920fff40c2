"""Finds which dimensions of a Dynamo graph are the same axis, by following the data and never the numbers.

    ids [1, 81] -> embedding -> [1, 81, 48] ---- q [1, 4, 81, 12]     so arange's 81 and the mask's
    arange(81) -> cos [1, 81, 12] -> [1, 1, 81, 12] --*               are the prompt;
    mask [1, 81] -> mask[(rows, arange(81))] --- sdpa                 a hidden size of 81 is not

It is type inference: every dimension is an unknown, every op an equation (``axis_rules``), and equations are
solved by unification, so knowledge flows backwards as well as forwards. Ops without a rule end the inference
and are remembered: they matter only if an axis that changes reaches them.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from earlytom_compile.passes import (  # noqa: F401  (register their rules)
    axis_rules,
    axis_rules_creation,
    axis_rules_indexing,
    axis_rules_layout,
)
from earlytom_compile.passes.axis_algebra import AxisSpace, Dim, Size
from earlytom_compile.passes.axis_call import (
    MARK,
    RULES,
    Call,
    NoRule,
    Obstacle,
    Outputs,
    Path,
    ScalarValue,
    Site,
    TensorAxes,
    Value,
    leaves,
)
from earlytom_compile.passes.axis_rules_indexing import is_weight
from earlytom_compile.passes.reasons import describe

OURS = "earlytom"
"""Namespace of the ops that passes insert: they do what they say, whatever the sizes."""


DIVISIONS = ("div", "divide", "truediv", "true_divide", "floordiv", "floor_divide")
"""Ops whose integer operand is suspicious: ``x.sum(1) / 81`` is an average over an axis of 81."""


@dataclass(frozen=True)
class SizeAsValue:
    """``node`` computes with a number: one that a SymInt node holds, or an integer that it divides by."""

    node: Node
    number: Node | int


class AxisMap:
    """The axes of a graph. Get one from :meth:`infer`.

    Attributes:
        values: what is known of each node.
        sites: every argument that spells the size of an axis.
        obstacles: ops that are right only while certain axes keep their size.
        sizes_as_values: ops that use a size as a number, where no axis says what it means.
        space: the equations between axes.
    """

    def __init__(self) -> None:
        self.values: dict[Node, Value] = {}
        self.sites: list[Site] = []
        self.obstacles: list[Obstacle] = []
        self.sizes_as_values: list[SizeAsValue] = []
        self.space = AxisSpace()

    @classmethod
    def infer(
        cls,
        graph_module: GraphModule,
        resized: Mapping[Node, Sequence[int]] | None = None,
        skip: Container[Node] = (),
    ) -> AxisMap:
        """Infers the axes of a torch-IR graph whose nodes carry ``meta["example_value"]``.

        Nodes without a recorded value, and ``earlytom::`` ops, were inserted by a pass: they put no
        constraint on what they read, unless they stand for an op of the model and have its rule, and their arguments
        are nobody else's business. ``resized`` names tensor
        dimensions that start a new axis, unconnected to what the op reads; nodes in ``skip`` are not looked
        at. Never raises for an op it does not know.
        """
        axes = cls()
        for node in graph_module.graph.nodes:
            if node in skip:
                continue
            fresh = (resized or {}).get(node, ())
            axes.values[node] = axes._restart(node, axes._visit(node, graph_module), fresh)
            if fresh:
                axes.sites = [site for site in axes.sites if site.node is not node]
        axes.space.align()
        return axes

    @classmethod
    def of_values(cls, nodes: Sequence[Node], graph_module: GraphModule) -> AxisMap:
        """A map that knows ``nodes``, whose axes have nothing to do with each other, and can :meth:`follow` others."""
        axes = cls()
        for node in nodes:
            axes.values[node] = _leaf(node, graph_module) if node.op == "get_attr" else _as_recorded(node, {})
        return axes

    def follow(self, node: Node, graph_module: GraphModule) -> Value:
        """Infer one node more, all of whose arguments are known."""
        self.values[node] = self._visit(node, graph_module)
        return self.values[node]

    def dim(self, node: Node, i: int) -> Dim:
        """The axis at dimension ``i`` of the tensor ``node``; KeyError if it is no tensor of known shape."""
        value = self.values.get(node)
        if not isinstance(value, TensorAxes):
            raise KeyError(f"{node.name} is no tensor with a recorded shape")
        return value.dims[i].root

    def same(self, a: tuple[Node, int], b: tuple[Node, int]) -> bool:
        """Whether two tensor dimensions are the same axis."""
        return self.dim(*a) is self.dim(*b)

    def members(self, node: Node, i: int) -> list[tuple[Node, int]]:
        """All tensor dimensions on the axis of dimension ``i`` of ``node``, in graph order."""
        return self.members_by_axis()[self.dim(node, i)]

    def members_by_axis(self) -> dict[Dim, list[tuple[Node, int]]]:
        """Every axis with its tensor dimensions, in graph order."""
        found: dict[Dim, list[tuple[Node, int]]] = defaultdict(list)
        for node, value in self.values.items():
            if isinstance(value, TensorAxes):
                for i, dim in enumerate(value.dims):
                    found[dim.root].append((node, i))
        return found

    # One node

    def _visit(self, node: Node, graph_module: GraphModule) -> Value:
        if node.op in ("placeholder", "get_attr"):
            return _leaf(node, graph_module)
        if node.op == "output":
            self._note_sizes(node, ())
            return ScalarValue()
        name = op_name(node)
        if name == "setitem":
            return self._apply(node, name)
        if (name.startswith(f"{OURS}::") and name not in RULES) or "example_value" not in node.meta:
            return _as_recorded(node, self.values)
        source = node.args[0] if node.args else None
        read = self.values.get(source) if isinstance(source, Node) else None
        if name == "getitem" and isinstance(read, Outputs) and not isinstance(node.args[1], Node):
            part = read[node.args[1]]  # type: ignore[index]
            return Outputs(part) if isinstance(node.args[1], slice) else part
        if not _holds_tensor(node.meta["example_value"]):
            return self._number(node, name, read)
        return self._apply(node, name)

    def _apply(self, node: Node, name: str) -> Value:
        call = Call(node, name, self.space, self.values)
        relations = len(self.space.relations)
        try:
            function = RULES.get(name, _of_last_axis if MARK in node.meta else None)
            if function is None:
                raise NoRule
            value = _checked(node, _value(_bound(function, call, node)))
        except (NoRule, TypeError, ValueError, IndexError, AttributeError) as error:
            del self.space.relations[relations:]
            self._note_unknown(node, str(error) if isinstance(error, NoRule) else "")
            self._note_sizes(node, ())
            return _as_recorded(node, self.values)
        if node.op == "call_method" and str(node.target).endswith("_"):
            self._forget_positions(node.args[0])
        self.sites += call.sites
        self.obstacles += call.obstacles
        self._note_sizes(node, [site.path for site in call.sites])
        if name in DIVISIONS and len(node.args) > 1 and type(node.args[1]) is int:
            self.sizes_as_values.append(SizeAsValue(node, node.args[1]))
        return value

    def _note_unknown(self, node: Node, detail: str) -> None:
        known = map(self.values.get, node.all_input_nodes)
        dims = tuple(dim for value in known if isinstance(value, TensorAxes) for dim in value.dims)
        why = "enters an op that no axis rule covers" + (f" ({detail})" if detail else "") + ":"
        self.obstacles.append(Obstacle(node, dims, why))

    def _note_sizes(self, node: Node, spelled: Sequence[Path]) -> None:
        for path, number in leaves({"args": node.args, "kwargs": node.kwargs}):
            if isinstance(self.values.get(number), ScalarValue) and path not in spelled:
                self.sizes_as_values.append(SizeAsValue(node, number))

    def _forget_positions(self, tensor: Any) -> None:
        known = self.values.get(tensor)
        if isinstance(known, TensorAxes):
            self.values[tensor] = TensorAxes(known.dims)

    def _number(self, node: Node, name: str, read: Value) -> Value:
        """Sizes and what is computed from them; ``item`` reads a value, which no axis decides."""
        if isinstance(read, TensorAxes) and name in ("size", "sym_size", "getattr"):
            if isinstance(node.meta["example_value"], torch.Size):
                return Outputs(ScalarValue((dim,)) for dim in read.dims)
            which = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
            if isinstance(which, int):
                return ScalarValue((read.dims[which],))
        if isinstance(node.meta["example_value"], (type(None), torch.dtype, torch.device)) or name == "item":
            return ScalarValue()
        depends: list[Dim] = []
        for value in map(self.values.get, node.all_input_nodes):
            if isinstance(value, TensorAxes):
                depends += value.dims
            elif isinstance(value, ScalarValue):
                depends += value.depends
        return ScalarValue(tuple(depends))

    @staticmethod
    def _restart(node: Node, value: Value, fresh: Sequence[int]) -> Value:
        if not fresh:
            return value
        if not isinstance(value, TensorAxes):
            raise ValueError(f"{node.name} has no recorded shape: put the traced value into its meta['example_value']")
        wanted = {i % len(value.dims) for i in fresh}
        dims = tuple(Dim(dim.size) if i in wanted else dim for i, dim in enumerate(value.dims))
        return TensorAxes(dims, value.index_of)


def op_name(node: Node) -> str:
    """One name for all spellings of an op; ``namespace::name`` for ops that are not PyTorch's; "" if unknown.

    ``Tensor.add_``, ``operator.iadd``, ``torch.add`` and ``aten.add.Tensor`` are all ``add``.
    """
    if node.op == "call_method":
        return str(node.target).strip("_")
    target: Any = node.target
    if node.op != "call_function":
        return ""
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        full = target._schema.name if isinstance(target, torch._ops.OpOverload) else target._qualified_op_name
        namespace, _, name = full.partition("::")
        return name.strip("_") if namespace in ("aten", "prims") else f"{namespace}::{name}"
    owner = getattr(target, "__module__", None) or getattr(target, "__objclass__", torch).__module__
    name = getattr(target, "__name__", "")
    if owner in ("_operator", "operator"):
        name = name.strip("_")
        return name[1:] if name in _IN_PLACE_OPERATORS else name
    return name.strip("_") if owner.partition(".")[0] in ("torch", "math", "builtins") else ""


_IN_PLACE_OPERATORS = frozenset(
    [
        "iadd",
        "isub",
        "imul",
        "itruediv",
        "ifloordiv",
        "imod",
        "ipow",
        "iand",
        "ior",
        "ixor",
        "imatmul",
        "ilshift",
        "irshift",
    ]
)


def _bound(function: Any, call: Call, node: Node) -> Any:
    kwargs = {{"axis": "dim", "keepdims": "keepdim"}.get(key, key): value for key, value in node.kwargs.items()}
    inspect.signature(function).bind(call, *node.args, **kwargs)
    return function(call, *node.args, **kwargs)


def _of_last_axis(call: Call, *_: Any, **__: Any) -> Any:
    """An operator that nobody has a rule for, but which is known to leave all axes but the last alone."""
    return (*call.dims(call.node.meta[MARK])[:-1], call.pinned(call.out[-1]))


def _value(result: Any) -> Value:
    if isinstance(result, Outputs):
        return Outputs(_value(item) for item in result)
    if isinstance(result, TensorAxes):
        return result
    return ScalarValue() if result is None else TensorAxes(tuple(result))


def _checked(node: Node, value: Value) -> Value:
    """A rule that disagrees with the trace is no rule for this call."""
    recorded = node.meta.get("example_value")
    several = isinstance(value, Outputs)
    for part, tensor in zip(value, recorded, strict=True) if several else [(value, recorded)]:  # type: ignore[arg-type]
        if isinstance(part, TensorAxes):
            sizes = [Size.of(n) for n in tensor.shape]  # type: ignore[union-attr]
            hints = [(dim.size.hint, size.hint) for dim, size in zip(part.dims, sizes, strict=True)]
            if any(None not in pair and pair[0] != pair[1] for pair in hints):
                raise NoRule("the rule for it gives another shape than the trace")
    return value


def _as_recorded(node: Node, values: Mapping[Node, Value]) -> Value:
    """New axes of the recorded shape, whose sizes the op decides by itself."""

    def new(example: Any) -> Value:
        if isinstance(example, torch.Tensor):
            return TensorAxes(tuple(Dim(Size.of(n), f"a result of {describe(node)}") for n in example.shape))
        if isinstance(example, (tuple, list)):
            return Outputs(new(item) for item in example)
        return ScalarValue()

    if "example_value" in node.meta:
        return new(node.meta["example_value"])
    read = [values.get(source) for source in node.all_input_nodes]
    return ScalarValue() if read and all(isinstance(value, ScalarValue) for value in read) else None


def _leaf(node: Node, graph_module: GraphModule) -> Value:
    example = node.meta.get("example_value")
    if node.op == "get_attr" and not isinstance(example, torch.Tensor):
        example = graph_module
        for part in str(node.target).split("."):
            example = getattr(example, part, None)
    if not isinstance(example, torch.Tensor):
        return ScalarValue()
    kind = "the weight" if is_weight(node) else "the graph input"
    return TensorAxes(tuple(Dim(Size.of(n), f"{kind} {node.target}") for n in example.shape))


def _holds_tensor(example: Any) -> bool:
    if isinstance(example, (tuple, list)):
        return any(_holds_tensor(item) for item in example)
    return isinstance(example, torch.Tensor)
