"""Runs parts of a graph on numbers, with the weights that the model has, to learn what cannot be read off it.

    probe = Probe(graph_module, example_inputs)
    probe.is_position_wise(node)                   # an operator that nobody has heard of, such as a packed linear
    probe.disagrees(hidden, features, 1, carried)  # whether tokens are made of other patches than somebody thinks

A probe changes one position of random numbers and looks where the result changes. It is evidence and no proof, but an
operator that mixes positions would have to leave all others as they are, bit for bit nearly, for numbers that were
drawn for it, one of them a hundred times as large as the rest.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg
from torch.utils._python_dispatch import _disable_current_modes

from earlytom_compile.passes.dataflow import Dataflow
from earlytom_compile.passes.graph_order import writes
from earlytom_compile.passes.patterns import value_of

log = logging.getLogger(__name__)
_LARGE = 100.0  # times a usual number: what a scale taken over several positions would show at once
_MAGNITUDES = (1.0, 1e-3, 10.0)
_TRIES = 2
_FEW_FRAMES = 3


class Unknown(Exception):
    """A part of the graph cannot be run: its weights are not there, or it fails."""


class Probe:
    """One graph and the inputs it was traced with, of which only weights and sizes are used."""

    def __init__(
        self,
        graph_module: GraphModule,
        example_inputs: Sequence[Any],
        weights: set[Node],
        frames: sympy.Symbol | None = None,
    ) -> None:
        """``frames`` is the number of frames where that is a symbol: a few will do."""
        self._interpreter = Interpreter(graph_module)
        placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        given = dict(zip(placeholders, example_inputs, strict=False))
        self._known: dict[Node, Any] = {node: given[node] for node in weights if node in given}
        self._flow = Dataflow(graph_module.graph)
        self._frames = frames
        self._generator = torch.Generator().manual_seed(0)

    def is_position_wise(self, node: Node, source: Node) -> bool:
        """Whether ``node``, which reads the activations ``source`` [..., D], makes [..., N] of them one by one."""
        try:
            for magnitude in _MAGNITUDES:  # a scale that is clamped somewhere shows elsewhere
                x = magnitude * self.random(source)
                before = self.run(source, node, x)
                if not isinstance(before, Tensor) or before.shape[:-1] != x.shape[:-1]:
                    return False
                first = magnitude == _MAGNITUDES[0]  # what all others may look at, as at a class token
                place = tuple(0 if first else self._below(size) for size in x.shape[:-1])
                changed = x.clone()
                changed[place] = _LARGE * magnitude * self.random(source)[place]
                if not _differs_only_at(before, self.run(source, node, changed), place):
                    return False
            return True
        except Unknown as reason:
            log.debug("no probe of %s: %s", node.name, reason)
            return False

    def disagrees(
        self, hidden: Node, features: Node, frame_axes: int, carried: Callable[[Tensor], Tensor]
    ) -> bool | None:
        """Whether tokens of ``features`` [(V, F or T,) ..., C] are made of other patches of ``hidden`` [T, S, D] than
        ``carried`` [T, S] -> [T, P] says; None where that cannot be tried. One patch of each frame changes; of the
        tokens that ``carried`` says are made of it, some must change, and no others."""
        try:
            x = self.random(hidden)
            before = _by_frame(self.run(hidden, features, x), frame_axes)
            for _ in range(_TRIES):
                places = torch.tensor([self._below(x.shape[1]) for _ in range(x.shape[0])], device=x.device)
                frames = torch.arange(x.shape[0], device=x.device)
                changed = x.clone()
                changed[frames, places] = _LARGE * self.random(hidden)[frames, places]
                after = _by_frame(self.run(hidden, features, changed), frame_axes)
                one = x.new_zeros(x.shape[:2], dtype=torch.float32)
                one[frames, places] = 1.0
                allowed = carried(one) > 0
                different = _different(before, after)
                if different.shape != allowed.shape or bool((different & ~allowed).any()):
                    return True
                if bool((allowed.any(1) & ~different.any(1)).any()):
                    return True
            return False
        except Unknown as reason:
            log.debug("no probe of %s: %s", features.name, reason)
            return None

    def random(self, node: Node) -> Tensor:
        """Random numbers in the place of ``node``, of its size; raises :class:`Unknown`."""
        value = value_of(node)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise Unknown(f"{node.name} is no tensor of floating point")
        shape = [_number(size, self._frames) for size in value.shape]
        return torch.randn(shape, generator=self._generator).to(value.device, value.dtype)

    def _below(self, size: int) -> int:
        return int(torch.randint(size, (), generator=self._generator))

    @torch.no_grad()
    def run(self, source: Node, target: Node, x: Tensor) -> Any:
        """What ``target`` is where ``source`` is ``x``; raises :class:`Unknown`."""
        made: dict[Node, Any] = {source: x}
        with _disable_current_modes():
            for node in self._flow.before(target):
                if node not in made and (node is target or self._flow.is_from(node, source)):
                    made[node] = self._compute(node, made)
        return made[target]

    def _compute(self, node: Node, made: dict[Node, Any]) -> Any:
        def look_up(read: Node) -> Any:
            if read not in made:
                made[read] = self.constant(read)
            return made[read]

        if _writes_elsewhere(node):
            raise Unknown(f"{node.name} writes to what it reads")  # which may be a buffer of the model
        args, kwargs = map_arg((node.args, node.kwargs), look_up)
        try:
            return getattr(self._interpreter, node.op)(node.target, args, kwargs)
        except Exception as error:
            raise Unknown(f"{node.name}: {type(error).__name__}: {error}") from error

    def constant(self, node: Node) -> Any:
        """What does not depend on activations: a weight, a size, and what is computed from those."""
        if node in self._known:
            value = self._known[node]
            if isinstance(value, FakeTensor) or (isinstance(value, Tensor) and value.is_meta):
                raise Unknown(f"{node.name} has no numbers")
            return value
        recorded = value_of(node)
        if recorded is not None and not isinstance(recorded, (Tensor, tuple, list)):
            return _number(recorded, self._frames)
        if node.op == "placeholder":
            raise Unknown(f"{node.name} is no weight")
        self._known[node] = self._compute(node, {})
        return self._known[node]


def _writes_elsewhere(node: Node) -> bool:
    """Whether an operator may change one of its arguments, in ways that nobody takes back."""
    overload = getattr(node.target, "default", node.target) if not isinstance(node.target, str) else None
    schema = getattr(overload, "_schema", None)
    return writes(node) or (schema is not None and schema.is_mutable)


def _by_frame(features: Any, frame_axes: int) -> Tensor:
    if not isinstance(features, Tensor):
        raise Unknown("the features are no tensor")
    return features.flatten(0, frame_axes - 1).flatten(1, -2)


def _different(before: Tensor, after: Tensor) -> Tensor:
    """Which positions differ by more than rounding."""
    before, after = before.float(), after.float()
    return (before - after).abs().amax(-1) > 1e-4 * before.abs().amax().clamp_min(1e-6)


def _differs_only_at(before: Tensor, after: Tensor, place: tuple[int, ...]) -> bool:
    different = _different(before, after)
    moved = bool(different[place])
    different[place] = False
    return moved and not bool(different.any())


def _number(size: Any, frames: sympy.Symbol | None = None) -> Any:
    """A size as a number; where it follows from a number of frames that is a symbol, that for few frames."""
    if not isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return size
    if frames is not None and size.node.expr.free_symbols == {frames}:
        number = size.node.expr.subs(frames, _FEW_FRAMES)
        return bool(number) if isinstance(size, torch.SymBool) else int(number)
    if not size.node.has_hint():
        raise Unknown("a size is not known")
    return size.node.hint
