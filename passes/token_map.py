"""How the P tokens of a frame come from its S patches, so that what is known of patches can be told of tokens.

[T, 729, D] -> 27 x 27 -> bilinear pooling -> 14 x 14        by the model's own pooling
[T, 1 + 576, D] -> without the class token -> 24 x 24 -> 12 x 12
[T, 256, D] -> 16 x 16 -> pixel shuffle, or a 2 x 2 merger -> 8 x 8      the mean of the patches a token is made of
[T, 256, D] -> 64 learned queries                            no map: a token is made of all patches
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, Node

from earlytom_compile.passes.axes import op_name
from earlytom_compile.passes.axis_algebra import Dim
from earlytom_compile.passes.find_vision_encoder import GraphView
from earlytom_compile.passes.patterns import insert, shape_of, value_of
from earlytom_compile.passes.probe import Probe, Unknown

POOLS = frozenset(("interpolate", "avg_pool2d", "max_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"))


_REARRANGING = frozenset(("flip", "roll", "gather", "index_select", "sort", "topk", "scatter", "take_along_dim"))
"""Ops that put tokens in another order."""


@dataclass(frozen=True)
class TokenMap:
    """Tokens [P] of patches [S]: patches ``first`` and following are a grid, and it is pooled."""

    first: int
    grid: tuple[int, int]
    pool: Node | None
    """The model's own 2-D pooling; None: the mean over ``factors``."""
    factors: tuple[int, int] = (1, 1)
    shape: tuple[int, int] = (0, 0)
    """(h, w) of the tokens."""
    order: Node | None = None
    """int64 [P]: by which they are put into another order behind the pooling, as that of windows is undone."""

    def carry_keys(self, graph: Graph, keys: Node) -> Node:
        """[N, S, d] -> [N, P, d], each of the d by itself as importance is."""
        width = insert(graph, torch.ops.aten.sym_size.int, keys, 2)
        by_channel = insert(graph, "flatten", insert(graph, "transpose", keys, 1, 2), 0, 1)  # [N * d, S]
        carried = insert(graph, "unflatten", self.carry(graph, by_channel), 0, (-1, width))
        return insert(graph, "transpose", carried, 1, 2)

    def carry(self, graph: Graph, importance: Node) -> Node:
        """[N, S] -> [N, P], inserted at the graph's insertion point."""
        pooled = self._pooled(graph, importance)
        return pooled if self.order is None else insert(graph, "index_select", pooled, 1, self.order)

    def _pooled(self, graph: Graph, importance: Node) -> Node:
        patches = math.prod(self.grid)
        if self.first or patches != _size(importance):
            importance = insert(graph, "narrow", importance, 1, self.first, patches)
        if self.pool is None and self.factors == (1, 1):
            return importance
        image = insert(graph, "view", importance, -1, 1, *self.grid)
        if self.pool is None:
            pooled = insert(graph, torch.nn.functional.avg_pool2d, image, self.factors)
        else:
            arguments: tuple[Any, ...] = (image, *self.pool.args[1:])
            pooled = insert(graph, self.pool.target, *arguments, **self.pool.kwargs)  # type: ignore[arg-type]
        return insert(graph, "flatten", pooled, 1)

    def apply(
        self,
        importance: torch.Tensor,
        arguments: Sequence[Any] = (),
        options: Mapping[str, Any] | None = None,
        order: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The same on numbers; ``arguments`` and ``options`` are those of the model's own pooling."""
        image = importance.narrow(1, self.first, math.prod(self.grid)).unflatten(1, (1, *self.grid))
        if self.pool is None:
            pooled = torch.nn.functional.avg_pool2d(image, self.factors).flatten(1)
        else:
            pooled = self.pool.target(image, *arguments, **(options or {})).flatten(1)  # type: ignore[operator]
        return pooled if order is None else pooled.index_select(1, order)


def _size(importance: Node) -> int | None:
    shape = shape_of(importance)
    return int(shape[1]) if shape is not None else None


def find_token_map(view: GraphView, hidden: Node, features: Node, frame_axes: int, probe: Probe) -> TokenMap | None:
    """The map from the encoder's output ``hidden`` [T, S, D] to ``features`` [(V, F or T,) ..., C], whose first
    ``frame_axes`` axes are those of the frames; None if there is none, or none that can be told."""
    for found in _candidates(view, hidden, features, frame_axes):
        disagrees = probe.disagrees(hidden, features, frame_axes, partial(_carried, found, probe))
        if disagrees is False or (disagrees is None and _says_so(view, hidden, features, found)):
            return found
    return None


def _says_so(view: GraphView, hidden: Node, features: Node, found: TokenMap) -> bool:
    """Whether the operators themselves prove a map that cannot be tried, for want of weights, say."""
    if found.order is not None:
        return False
    if found.pool is None:
        whole = found.factors == (1, 1) and found.first == 0
        return whole and view.first_mixing(hidden, (0, 1), features) is None
    rearranged = any(map(rearranges, view.flow.between(hidden, features)))
    return not rearranged and view.first_mixing(found.pool, (0, 2, 3), features) is None


def rearranges(node: Node) -> bool:
    """Whether an operator may put tokens in another order."""
    if op_name(node) == "getitem":  # by positions, not by slices
        return any(isinstance(value_of(read), torch.Tensor) for read in node.all_input_nodes[1:])
    return op_name(node) in _REARRANGING


def _carried(found: TokenMap, probe: Probe, importance: torch.Tensor) -> torch.Tensor:
    pool, order = found.pool, None if found.order is None else probe.constant(found.order)
    if pool is None:
        return found.apply(importance, order=order)
    if any(isinstance(arg, Node) for arg in (*pool.args[1:], *pool.kwargs.values())):
        raise Unknown("the pooling takes sizes that are computed")
    return found.apply(importance, pool.args[1:], pool.kwargs, order)


def _candidates(view: GraphView, hidden: Node, features: Node, frame_axes: int) -> Iterator[TokenMap]:
    region = view.flow.between(hidden, features)
    tokens: list[int] = [int(size) for size in shape_of(features)[frame_axes:-1]]  # type: ignore[index]
    order = _order(view, region, math.prod(tokens))
    for found in _candidates_in_order(view, region, hidden, features, frame_axes):
        yield replace(found, order=order)


def _order(view: GraphView, region: list[Node], tokens: int) -> Node | None:
    """The positions by which a tensor of P ``tokens``, [T, P, C], is put into another order: ``x[:, order]``."""
    for node in region:
        index = node.args[1] if op_name(node) == "getitem" and len(node.args) > 1 else None
        if isinstance(index, tuple) and len(index) == 2 and index[0] == slice(None) and isinstance(index[1], Node):
            order = index[1]
            if shape_of(order) == (tokens,) and not any(view.flow.is_from(order, each) for each in view.pictures):
                return order
    return None


def _candidates_in_order(
    view: GraphView, region: list[Node], hidden: Node, features: Node, frame_axes: int
) -> Iterator[TokenMap]:
    tokens, first = _patches(view, region, view.dims(hidden)[1])
    patches = int(tokens.size.expr)
    own = [int(size) for size in shape_of(features)[frame_axes:-1]]  # type: ignore[index]
    count = math.prod(own)
    pools = [node for node in region if op_name(node) in POOLS and len(shape_of(node) or ()) == 4]
    if len(pools) == 1:
        height, width = (int(size) for size in shape_of(pools[0].args[0])[2:])  # type: ignore[index]
        shape = tuple(int(size) for size in shape_of(pools[0])[2:])  # type: ignore[index]
        if height * width == patches and math.prod(shape) == count:
            yield TokenMap(first, (height, width), pools[0], shape=shape)  # type: ignore[arg-type]
    grid = _grid(view, hidden, patches)
    if count == patches:
        yield TokenMap(first, grid, None, shape=grid)
    for factors in _factors(grid, count) if count < patches else ():
        yield TokenMap(first, grid, None, factors, (grid[0] // factors[0], grid[1] // factors[1]))
    if grid != (1, patches) and count < patches and patches % count == 0:  # a row of blocks, a token each
        yield TokenMap(first, (1, patches), None, (1, patches // count), (1, count))


def _patches(view: GraphView, region: list[Node], tokens: Dim) -> tuple[Dim, int]:
    """The axis of those tokens that go on, and the place of the first: a class token is cut off by a slice."""
    first = 0
    for node in region:
        if op_name(node) != "getitem" or not isinstance(node.args[1], (tuple, slice)):
            continue
        dims, out = view.dims(node.args[0]), view.dims(node)
        index: tuple[Any, ...] = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        if tokens not in dims or len(dims) != len(out) or not all(isinstance(part, slice) for part in index):
            continue
        at = dims.index(tokens)
        part = index[at] if at < len(index) else slice(None)
        if out[at] is not tokens:
            first += part.indices(int(tokens.size.expr))[0] if all(_is_plain(x) for x in (part.start, part.stop)) else 0
            tokens = out[at]
    return tokens, first


def _is_plain(bound: Any) -> bool:
    return bound is None or isinstance(bound, int)


def _grid(view: GraphView, hidden: Node, patches: int) -> tuple[int, int]:
    """(h, w) of the patches: as the convolution that made them, or square, or a row."""
    for node in view.flow.before(hidden):
        shape = shape_of(node) or ()
        if op_name(node) in ("conv2d", "conv3d") and len(shape) >= 4 and int(shape[-1]) * int(shape[-2]) == patches:
            return int(shape[-2]), int(shape[-1])
    side = math.isqrt(patches)
    return (side, side) if side * side == patches else (1, patches)


def _factors(grid: tuple[int, int], count: int) -> list[tuple[int, int]]:
    """Ways to shrink a grid by whole factors to so many tokens, the nearest to a square first."""
    height, width = grid
    found = [
        (a, b)
        for a in range(1, height + 1)
        for b in range(1, width + 1)
        if height % a == 0 and width % b == 0 and (height // a) * (width // b) == count
    ]
    return sorted(found, key=lambda factor: abs(factor[0] - factor[1]))
