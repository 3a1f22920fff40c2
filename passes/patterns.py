"""Reading a Dynamo graph: what an op is called, and how to look past ops that only move data.

q = linear.view(8, 36, -1, 8).transpose(1, 2)      # peel(q) is `linear`
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

MOVES = frozenset(
    [
        "view",
        "reshape",
        "transpose",
        "permute",
        "contiguous",
        "flatten",
        "unflatten",
        "to",
        "float",
        "type_as",
        "clone",
        "detach",
        "dropout",
        "unsqueeze",
        "squeeze",
        "expand",
        "expand_as",
        "repeat",
        "swapaxes",
    ]
)
"""Ops that return the same numbers in another shape, layout or dtype."""

CASTS = frozenset(["to", "float", "half", "bfloat16", "type_as", "contiguous", "clone", "detach", "dropout"])

ACTIVATIONS = frozenset(["gelu", "relu", "silu", "sigmoid", "tanh", "quick_gelu", "mish", "hardswish"])

NORMS = frozenset(["layer_norm", "rms_norm"])

_SHAPE_READERS = frozenset(["size", "sym_size", "sym_size.int", "dim", "numel", "stride"])


def op_name(node: Any) -> str:
    """``"linear"`` for every spelling of linear: ``F.linear``, ``torch._C._nn.linear``, a method; else ``""``."""
    if not isinstance(node, Node):
        return ""
    if node.op == "call_method":
        # torch 2.11 writes `ids == token` as the method __eq__.
        return str(node.target).removeprefix("__").removesuffix("__")
    if node.op == "call_function":
        return getattr(node.target, "__name__", "").removesuffix(".default")
    return ""


def value_of(node: Node) -> Any:
    """The fake tensor (or symint) Dynamo recorded for ``node``."""
    return node.meta.get("example_value")


def shape_of(node: Any) -> tuple[Any, ...] | None:
    """The recorded shape, ints or SymInts; None if ``node`` is no tensor."""
    value = value_of(node) if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def memory_of(node: Any) -> int | None:
    """Equal for tensors that share memory."""
    value = value_of(node) if isinstance(node, Node) else None
    if not isinstance(value, torch.Tensor) or torch._C._functorch.is_functorch_wrapped_tensor(value):
        return None
    return value.untyped_storage()._cdata


def peel(node: Any, through: frozenset[str] = MOVES) -> Any:
    """Follow ``node`` up past ops in ``through`` to the op that made the numbers."""
    while op_name(node) in through:
        node = node.args[0]
    return node


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def einsum_letters(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """The letters of each operand's axes and of the result's. Those that ``...`` stands for are digits, the last of
    them 0, since they are broadcast."""
    given, _, result = equation.replace(" ", "").partition("->")
    terms = given.split(",")
    hidden = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    digits = ["9876543210"[10 - count :] if "..." in term else "" for term, count in zip(terms, hidden, strict=True)]
    spelled = [term.replace("...", those) for term, those in zip(terms, digits, strict=True)]
    return spelled, result.replace("...", max(digits, key=len))


def other_operand(node: Node, operand: Node) -> Any:
    """The other argument of a two-argument op, or None if ``operand`` is not exactly one of them."""
    if len(node.args) < 2 or (node.args[0] is operand) == (node.args[1] is operand):
        return None
    return node.args[1] if node.args[0] is operand else node.args[0]


def readers(node: Node, *names: str) -> list[Node]:
    """Ops that compute with the numbers of ``node`` (not those that ask for its shape, not the graph's output);
    only those called one of ``names`` if any are given."""
    computing = (user for user in node.users if user.op != "output" and op_name(user) not in _SHAPE_READERS)
    return [user for user in computing if not names or op_name(user) in names]


def module_path(node: Node) -> str:
    """Name of the innermost module that ran ``node``, for messages only: ``model.vision_tower.layers.3``."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return re.sub(r"^L\['\w+'\]\.?", "", path).replace("._modules", "").replace("['", ".").replace("']", "").lstrip(".")


def insert(graph: Graph, target: Callable[..., Any] | str, *args: Any, like: Any = None, **kwargs: Any) -> Node:
    """Add a call at the graph's insertion point; ``like`` is recorded as its example value."""
    if isinstance(target, str):
        node = graph.call_method(target, args, kwargs)
    else:
        node = graph.call_function(target, args, kwargs)
    if like is not None:
        node.meta["example_value"] = like
    return node
