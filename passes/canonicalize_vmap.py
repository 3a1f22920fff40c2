"""A mask that ``vmap`` makes of one pair of positions at a time is made of all of them at once.

Before: ``q = _add_batch_dim(queries, 0, 1); k = _add_batch_dim(keys, 0, 2); seen = k.le(q)           # all of them []``
        ``mask = _remove_batch_dim(_remove_batch_dim(seen, 2, S, 0), 1, S, 0)                         # [S, S]``
After:  ``q = queries[:, None]; k = keys[None, :]; mask = k.le(q).expand(S, S)``

This is how transformers 4.53 to 4.55 write the mask of a language model. What ``vmap`` hides, such as that the mask
lies along the prompt, is in the data flow then. Left alone where it is more than functions of single numbers.
"""

from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from earlytom_compile.passes.patterns import insert, op_name, shape_of, value_of

_ENTER, _LEAVE = "_vmap_increment_nesting", "_vmap_decrement_nesting"
_ADD, _REMOVE = "_add_batch_dim", "_remove_batch_dim"
_BORDERS = frozenset([_ENTER, _LEAVE, "lazy_load_decompositions"])
_SCALARS = frozenset(["new_ones", "new_zeros", "new_full"])
_OF_NUMBERS = frozenset(
    ["le", "lt", "ge", "gt", "eq", "ne", "and", "or", "xor", "invert", "logical_and", "logical_or", "logical_not"]
    + ["add", "sub", "mul", "floordiv", "floor_divide", "mod", "remainder", "where", "to"]
)
"""Functions of numbers that stand in the same place."""


def canonicalize_vmap(graph: Graph) -> int:
    """Rewrite every nest of ``vmap`` in place that is understood; returns how many there were."""
    nests = [nest for nest in _nests(graph) if _is_understood(nest)]
    for nest in nests:
        _rewrite(graph, nest)
    return len(nests)


def _nests(graph: Graph) -> list[list[Node]]:
    """From where the outermost ``vmap`` begins to where it ends."""
    nests, depth = list[list[Node]](), 0
    for node in graph.nodes:
        if op_name(node) == _ENTER:
            depth += 1
            if depth == 1:
                nests.append([])
        if depth:
            nests[-1].append(node)
        if op_name(node) == _LEAVE:
            depth -= 1
    return nests


def _depth(nest: Sequence[Node]) -> int:
    return sum(op_name(node) == _ENTER for node in nest)


def _is_understood(nest: Sequence[Node]) -> bool:
    """Whether everything in it is a function of single numbers, and nothing but results leaves it."""
    inside, depth = set(nest), _depth(nest)
    results = [node for node in nest if not inside.issuperset(node.users)]
    return (
        op_name(nest[-1]) == _LEAVE
        and all(len(_removed(node)) == depth for node in results)
        and all(_is_of_numbers(node, inside, depth) for node in nest)
    )


def _is_of_numbers(node: Node, inside: set[Node], depth: int) -> bool:
    name, value = op_name(node), value_of(node)
    if name in _BORDERS:
        return True
    if name == _ADD:
        source, axis, level = node.args
        plain = source not in inside and len(shape_of(source) or ()) == 1
        return bool(plain and axis == 0 and level in range(1, depth + 1))
    if name == _REMOVE:
        return bool(node.args[3] == 0) and all(op_name(user) == _REMOVE for user in node.users if user in inside)
    if not isinstance(value, torch.Tensor) or value.dim():
        return False
    if name == "index":  # numbers out of a tensor that is the same for all
        table, places = node.args
        alone = table not in inside and None not in places  # type: ignore[operator]
        return bool(alone and len(shape_of(table) or ()) == len(places))  # type: ignore[arg-type]
    return name.strip("_") in _OF_NUMBERS or name in _SCALARS


def _removed(node: Node) -> list[Node]:
    """The ends of one ``vmap`` within another that make ``node``, outermost first."""
    ends = list[Node]()
    while op_name(node) == _REMOVE and node.args[1] == len(ends) + 1:
        ends.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return ends


def _rewrite(graph: Graph, nest: Sequence[Node]) -> None:
    """Each ``vmap`` is an axis, the outermost the first."""
    inside, depth = set(nest), _depth(nest)
    new = dict[Node, Node]()
    with graph.inserting_before(nest[0]):
        for node in nest:
            name = op_name(node)
            if name == _ADD:
                source, _, level = node.args
                axes = [slice(None) if axis == level else None for axis in range(1, depth + 1)]
                new[node] = _made(graph, getitem, source, tuple(axes))
            elif name == _REMOVE and not inside.issuperset(node.users):
                ends = _removed(node)
                body = new[ends[-1].args[0]]  # type: ignore[index]
                whole = _made(graph, "expand", body, *(end.args[2] for end in ends))
                node.replace_all_uses_with(whole, lambda user: user not in inside)
            elif name == "index":
                table, places = node.args
                new[node] = _made(graph, getitem, table, map_arg(tuple(places), lambda x: new.get(x, x)))  # type: ignore
            elif name != _REMOVE and name not in _BORDERS:
                args, kwargs = map_arg((node.args, node.kwargs), lambda read: new.get(read, read))
                new[node] = _made(graph, node.target, *args, **kwargs)  # type: ignore[arg-type]
    for node in reversed(nest):
        graph.erase_node(node)


def _made(graph: Graph, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Node:
    """Insert a call, with what it makes of what was recorded of its arguments."""
    values, named = map_arg((args, kwargs), value_of)
    function = getattr(torch.Tensor, target) if isinstance(target, str) else target
    return insert(graph, target, *args, like=function(*values, **named), **kwargs)
