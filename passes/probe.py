"""Runs parts of a graph on numbers, with the weights that the model has, to learn what cannot be read off it.

    probe = Probe(graph_module, example_inputs)
    probe.is_position_wise(node)                   # an operator that nobody has heard of, such as a packed linear
    probe.is_local(hidden, features, (27, 27), (2, 2), ...)     # whether a token is made of the patches under it

A probe changes one position of random numbers and looks where the result changes. It is evidence and no proof, but an
operator that mixes positions would have to leave all others as they are, bit for bit nearly, for numbers that were
drawn for it, one of them a hundred times as large as the rest.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg
from torch.utils._python_dispatch import _disable_current_modes

from earlytom_compile.passes.dataflow import Dataflow
from earlytom_compile.passes.patterns import value_of

log = logging.getLogger(__name__)
_LARGE = 100.0  # times a usual number: what a scale taken over several positions would show at once
_TRIES = 3


class Unknown(Exception):
    """A part of the graph cannot be run: its weights are not there, or it fails."""


class Probe:
    """One graph and the inputs it was traced with, of which only weights and sizes are used."""

    def __init__(self, graph_module: GraphModule, example_inputs: Sequence[Any], weights: set[Node]) -> None:
        self._interpreter = Interpreter(graph_module)
        placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        given = dict(zip(placeholders, example_inputs, strict=False))
        self._known: dict[Node, Any] = {node: given[node] for node in weights if node in given}
        self._flow = Dataflow(graph_module.graph)
        self._generator = torch.Generator().manual_seed(0)

    def is_position_wise(self, node: Node, source: Node) -> bool:
        """Whether ``node``, which reads the activations ``source`` [..., D], makes [..., N] of them one by one."""
        try:
            x = self._random(source)
            lead = x.shape[:-1]
            before = self._run(source, node, x)
            if not isinstance(before, Tensor) or before.shape[:-1] != lead:
                return False
            for _ in range(_TRIES):
                place = tuple(self._below(size) for size in lead)
                changed = x.clone()
                changed[place] = _LARGE * self._random(source)[place]
                after = self._run(source, node, changed)
                if not _differs_only_at(before, after, [place]):
                    return False
            return True
        except Unknown as reason:
            log.debug("no probe of %s: %s", node.name, reason)
            return False

    def is_local(
        self, hidden: Node, features: Node, first: int, grid: tuple[int, int], factors: tuple[int, int], frame_axes: int
    ) -> bool:
        """Whether token (i, j) of each frame of ``features`` [(V, F,) ..., C] is made of the patches (a*i ..., b*j ...)
        of ``hidden`` [T, S, D] alone, whose patches of ``grid`` begin at place ``first``; ``factors`` are (a, b), and
        ``frame_axes`` how many axes of ``features`` are those of the frames."""
        try:
            x = self._random(hidden)
            before = _by_frame(self._run(hidden, features, x), frame_axes)
            for _ in range(_TRIES):
                frame, row, column = self._below(x.shape[0]), self._below(grid[0]), self._below(grid[1])
                changed = x.clone()
                changed[frame, first + row * grid[1] + column] = self._random(hidden)[frame, 0]
                after = _by_frame(self._run(hidden, features, changed), frame_axes)
                token = (row // factors[0]) * (grid[1] // factors[1]) + column // factors[1]
                if not _differs_only_at(before, after, [(frame, token)]):
                    return False
            return True
        except Unknown as reason:
            log.debug("no probe of %s: %s", features.name, reason)
            return False

    def _random(self, node: Node) -> Tensor:
        value = value_of(node)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise Unknown(f"{node.name} is no tensor of floating point")
        shape = [_number(size) for size in value.shape]
        return torch.randn(shape, generator=self._generator).to(value.device, value.dtype)

    def _below(self, size: int) -> int:
        return int(torch.randint(size, (), generator=self._generator))

    @torch.no_grad()
    def _run(self, source: Node, target: Node, x: Tensor) -> Any:
        made: dict[Node, Any] = {source: x}
        with _disable_current_modes():
            for node in self._flow.before(target):
                if node not in made and (node is target or self._flow.is_from(node, source)):
                    made[node] = self._compute(node, made)
        return made[target]

    def _compute(self, node: Node, made: dict[Node, Any]) -> Any:
        def look_up(read: Node) -> Any:
            if read not in made:
                made[read] = self._constant(read)
            return made[read]

        args, kwargs = map_arg((node.args, node.kwargs), look_up)
        try:
            return getattr(self._interpreter, node.op)(node.target, args, kwargs)
        except Exception as error:
            raise Unknown(f"{node.name}: {type(error).__name__}: {error}") from error

    def _constant(self, node: Node) -> Any:
        """What does not depend on activations: a weight, a size, and what is computed from those."""
        if node in self._known:
            value = self._known[node]
            if isinstance(value, FakeTensor) or (isinstance(value, Tensor) and value.is_meta):
                raise Unknown(f"{node.name} has no numbers")
            return value
        recorded = value_of(node)
        if recorded is not None and not isinstance(recorded, (Tensor, tuple, list)):
            return _number(recorded)
        if node.op == "placeholder":
            raise Unknown(f"{node.name} is no weight")
        self._known[node] = self._compute(node, {})
        return self._known[node]


def _by_frame(features: Any, frame_axes: int) -> Tensor:
    if not isinstance(features, Tensor):
        raise Unknown("the features are no tensor")
    return features.flatten(0, frame_axes - 1).flatten(1, -2)


def _differs_only_at(before: Tensor, after: Tensor, places: list[tuple[int, ...]]) -> bool:
    """True if the results agree everywhere but at ``places``, and differ there."""
    before, after = before.float(), after.float()
    scale = before.abs().amax().clamp_min(1e-6)
    different = (before - after).abs().amax(-1) > 1e-4 * scale
    moved = all(bool(different[place]) for place in places)
    for place in places:
        different[place] = False
    return moved and not bool(different.any())


def _number(size: Any) -> Any:
    if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        if not size.node.has_hint():
            raise Unknown("a size is not known")
        return size.node.hint
    return size
