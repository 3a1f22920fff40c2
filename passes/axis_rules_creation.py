"""What ops that make tensors out of nothing but sizes say about axes.

arange(81) -> [81]                                      81 is spelled here, whatever it turns out to be
zeros(8, 9)                                             8 and 9 are
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from earlytom_compile.passes.axis_call import Call, Dims, NoRule, Path, TensorAxes, rule


def _spelled(call: Call, position: int) -> Dims:
    """One axis for each size in the arguments."""
    return tuple(call.free(size, path) for size, (_, path) in zip(call.out, call.literals(position), strict=True))


@rule("zeros", "ones", "empty", "rand", "randn")
def created(call: Call, *_: Any, **__: Any) -> Dims:
    return _spelled(call, 0)


@rule("full")
def full(call: Call, size: Sequence[Any], fill_value: Any, **_: Any) -> Dims:
    base = ("kwargs", "size") if "size" in call.node.kwargs else ("args", 0)
    if not isinstance(size, (tuple, list)):
        raise NoRule("the sizes are not listed")
    return tuple(call.free(n, (*base, i)) for i, n in enumerate(call.out))


@rule("new_zeros", "new_ones", "new_empty")
def created_like(call: Call, input: Any, *_: Any, **__: Any) -> Dims:
    return _spelled(call, 1)


@rule("new_full")
def new_full(call: Call, input: Any, size: Sequence[Any], fill_value: Any, **_: Any) -> Dims:
    base = ("kwargs", "size") if "size" in call.node.kwargs else ("args", 1)
    if not isinstance(size, (tuple, list)):
        raise NoRule("the sizes are not listed")
    return tuple(call.free(n, (*base, i)) for i, n in enumerate(call.out))


@rule("arange")
def arange(call: Call, *_: Any, **__: Any) -> TensorAxes:
    """``arange(n)`` lists the positions of an axis; from another start, or by steps, it is an axis of its own."""
    args, kwargs = call.node.args, call.node.kwargs
    names = ("end",) if len(args) == 1 else ("start", "end", "step")
    given: dict[str, tuple[Any, Path]] = {
        name: (value, ("args", i)) for i, (name, value) in enumerate(zip(names, args, strict=False))
    }
    given |= {name: (kwargs[name], ("kwargs", name)) for name in ("start", "end", "step") if name in kwargs}
    end, path = given.get("end", (None, ()))
    from_zero = given.get("start", (0, ()))[0] == 0 and given.get("step", (1, ()))[0] == 1
    if not from_zero or not isinstance(end, (int, Node)) or not call.size_of(end).same(call.out[0]):
        return TensorAxes((call.pinned(call.out[0]),))
    dim = call.free(call.out[0], path)
    return TensorAxes((dim,), dim)


@rule("eye")
def eye(call: Call, n: Any, m: Any = None, **_: Any) -> Dims:
    rows = call.free(call.out[0], ("args", 0))
    return (rows, rows if m is None else call.free(call.out[1], ("args", 1)))


@rule("tensor", "as_tensor", "scalar_tensor", "linspace")
def constant(call: Call, *_: Any, **__: Any) -> Dims:
    return tuple(call.pinned(size) for size in call.out)
