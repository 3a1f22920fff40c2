"""Sizes of which nothing is known, in the place of a graph's symbols, so that one compiled piece serves any number.

frames [s69, S, D] before a merge, [u2, S, D] behind it    ->    [u7, S, D] and [u8, S, D]: pieces of one kind
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._sympy.symbol import SymT, symbol_is_type

from .passes.patterns import value_of
from .passes.split_stages import Piece


def forget_sizes(pieces: Sequence[Piece], given: Mapping[int, Any]) -> set[str]:
    """Put sizes of which nothing is known in the place of Dynamo's symbols, in what the pieces are compiled for. Those
    that read the graph's own inputs keep theirs. Returns the names of the others."""
    sizes, names = UnknownSizes(least=1, keep_unbacked=True), set()
    for piece in pieces:
        if not is_free(piece, given):
            continue  # such as a convolution, whose layout PyTorch does not know for a size of which nothing is known
        names.add(piece.name)
        for node in piece.graph_module.graph.nodes:
            if node.op == "placeholder" and is_symbolic(value_of(node)):
                node.meta["example_value"] = sizes.put_into(value_of(node))
    return names


def is_free(piece: Piece, given: Mapping[int, Any]) -> bool:
    """Whether no input of the graph that has a symbol for a size is an input of the piece."""
    return not any(isinstance(x, torch.Tensor) and is_symbolic(x) and id(x) in given for x in piece.inputs)


class UnknownSizes:
    """Sizes of which nothing is known but that they are not below ``least``, in the place of a graph's symbols."""

    def __init__(self, least: int, keep_unbacked: bool = False) -> None:
        fake_mode = torch._guards.TracingContext.get().fake_mode
        assert fake_mode is not None and fake_mode.shape_env is not None
        self._fake_mode, self._shape_env = fake_mode, fake_mode.shape_env
        self._least, self._keep_unbacked = least, keep_unbacked
        self._unknown: dict[Any, Any] = {}

    @property
    def symbols(self) -> set[Any]:
        """Those that were put into something."""
        return set(self._unknown.values())

    def put_into(self, value: Any) -> Any:
        """A fake tensor like ``value``, or a size."""
        with self._fake_mode, self._shape_env.ignore_fresh_unbacked_symbols():
            if not isinstance(value, torch.Tensor):
                return self._of(value)
            layout = [[self._of(size) for size in sizes] for sizes in (value.shape, value.stride())]
            return torch.empty_strided(*layout, dtype=value.dtype, device=value.device)

    def _of(self, size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        shape_env, expression = self._shape_env, size.node.expr
        for symbol in expression.free_symbols - self._unknown.keys():
            unbacked = symbol_is_type(symbol, SymT.UNBACKED_INT)
            self._unknown[symbol] = symbol
            if not (unbacked and self._keep_unbacked):
                fresh = shape_env.create_unbacked_symint()
                torch._check(fresh >= self._least)
                self._unknown[symbol] = fresh.node.expr
                hint = shape_env.var_to_hint_override.get(symbol) if unbacked else shape_env.backed_var_to_val[symbol]
                if hint is not None:
                    shape_env.var_to_hint_override[fresh.node.expr] = int(hint)
        return shape_env.create_symintnode(expression.xreplace(self._unknown), hint=None)


def symbolic_sizes(value: Any) -> list[tuple[int | None, torch.SymInt]]:
    """The axes of a tensor whose sizes are known at run time only, and these; of a size itself, None and the size."""
    sizes = enumerate(value.shape) if isinstance(value, torch.Tensor) else [(None, value)]
    return [(axis, size) for axis, size in sizes if isinstance(size, torch.SymInt)]


def is_symbolic(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return any(isinstance(size, torch.SymInt) for size in (*value.shape, *value.stride()))
    return isinstance(value, torch.SymInt)
