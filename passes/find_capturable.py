"""Which compiled pieces a CUDA graph can replay: those between two waits for the host, as runs.

    before | layer 0 ... layer 6 | merge | layer 7 ... layer 20 | layer 21 | merge | ...     pieces of split_stages
             `----- a run -----'           `----- a run ------'   scores                     (operators of ours: no run)

A graph replays fixed sizes on fixed memory. So a run holds no operator of ours, makes no size that depends on the
data, writes to none of its inputs and hands none out. Where its number of frames is known at run time only, it
must also be frame-wise: every operator computes each frame (axis 0) from that frame alone, so that frames added to
fill up a graph's buffers change nothing in the others.
"""

from collections.abc import Container, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from earlytom_compile.passes.graph_order import writes
from earlytom_compile.passes.patterns import ACTIVATIONS, MOVES, NORMS, memory_of, op_name, value_of
from earlytom_compile.passes.split_stages import Piece, gather_pieces

_ELEMENTWISE = frozenset(("add", "sub", "mul", "truediv", "div", "neg", "pow", "rsqrt", "iadd", "isub", "imul"))
# Computing across frames would take the number of frames as an argument, or have it on another axis than the first.
_FRAME_WISE = _ELEMENTWISE | ACTIVATIONS | NORMS | {"linear", "chunk", "split"}
_SIZES = frozenset(("size", "sym_size", "sym_size.int"))
_WITHOUT_WAITING = frozenset(("earlytom.reuse_attention.default",))
"""Operators of ours in the middle of a layer, which read nothing on the host on a GPU."""


@dataclass
class Run:
    """Pieces in a row that one graph can replay."""

    device: torch.device
    frames: sympy.Symbol | None  # the size of axis 0 that is known at run time only, None if every size is
    pieces: list[Piece] = field(default_factory=list)

    @property
    def where(self) -> str:
        """The part of the model, for messages."""
        return _place([piece.where for piece in self.pieces])


@dataclass(frozen=True)
class Signature:
    """What a run reads and makes."""

    inputs: tuple[str, ...]
    """One of each argument: a ``"weight"`` or buffer of the model, which stays where it is; ``"frames"``, a tensor with
    a frame on each place of axis 0; another ``"tensor"``; the ``"count"`` of frames; another ``"number"``."""
    framed_outputs: tuple[bool, ...]


def find_runs(pieces: Sequence[Piece], compiled: Container[str]) -> tuple[list[Run], list[str]]:
    """(runs of pieces that a graph can replay, why compiled pieces without operators of ours are in none)."""
    runs, reasons, follows = list[Run](), dict[str, list[str]](), False
    for piece in pieces:
        reason = reason_not_to_capture(piece) if piece.name in compiled else ""
        if reason is None:
            device, frames = next(_tensors(_values(piece))).device, next(iter(_unknown_sizes(piece)), None)
            if not (follows and (runs[-1].device, runs[-1].frames) == (device, frames)):
                runs.append(Run(device, frames))
            runs[-1].pieces.append(piece)
        elif reason:
            reasons.setdefault(reason, []).append(piece.where)
        follows = reason is None
    return runs, [f"no CUDA graph of {_place(where)}: {reason}" for reason, where in reasons.items()]


def reason_not_to_capture(piece: Piece) -> str | None:
    """None if a graph can replay the piece; empty if it cannot and nobody would expect it."""
    nodes = list(piece.graph_module.graph.nodes)
    ours = {str(node.target) for node in nodes if str(node.target).startswith("earlytom.")}
    if ours - _WITHOUT_WAITING:
        return ""
    if any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in nodes):
        return "it holds higher-order operators"
    values = _values(piece)
    if any(_is_wrapped(value) for value in values):
        return "it holds tensors that stand for others"
    if len({value.device for value in _tensors(values)}) != 1:
        return "its tensors are on several devices"
    inputs = {memory_of(node) for node in nodes if node.op == "placeholder"} - {None}
    if not inputs.isdisjoint(memory_of(target) for node in nodes if writes(node) for target in _targets(node)):
        return "it writes to its inputs, such as a static cache"
    (output,) = (node for node in nodes if node.op == "output")
    if not all(memory_of(node) and memory_of(node) not in inputs for node in output.all_input_nodes):
        return "it hands out sizes or its inputs"
    sizes = _unknown_sizes(piece)
    if ours and sizes:
        return "how many patches it computes depends on the video; encode_ratio=... fixes their number"
    if free_unbacked_symbols(values) - sizes:
        return "it makes a size that depends on the data"
    if sizes and not (len(sizes) == 1 and all(is_frame_wise(node, *sizes) for node in nodes)):
        return "it is not known to compute each frame from that frame alone"
    return None


def _values(piece: Piece) -> list[Any]:
    return [value for node in piece.graph_module.graph.nodes for value in _leaves(value_of(node))]


def _unknown_sizes(piece: Piece) -> Set[sympy.Symbol]:
    """Those of its inputs that are known at run time only."""
    return free_unbacked_symbols(list(_leaves(piece.inputs)))


def _is_wrapped(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (
        is_traceable_wrapper_subclass(value) or torch._C._functorch.is_functorch_wrapped_tensor(value)
    )


def _targets(node: Node) -> Iterable[Any]:
    """What ``node``, which writes, may write to; a custom operator to any of its arguments."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.all_input_nodes
    return (*node.args[:1], node.kwargs.get("out"))


def is_frame_wise(node: Node, frames: sympy.Symbol) -> bool:
    """Whether every frame (axis 0, of size ``frames``) of what ``node`` makes depends on no other frame."""
    name, made = op_name(node), [value for value in _leaves(value_of(node)) if _mentions(value, frames)]
    read = [x for source in node.all_input_nodes for x in _leaves(value_of(source)) if _mentions(x, frames)]
    if node.op in ("placeholder", "output"):
        return all(_counts_axis_0(value, frames) for value in made)
    if not any(isinstance(value, torch.Tensor) for value in (*made, *read)):
        return True  # a size, or the same for all frames
    if name in _SIZES:
        return True
    if not made or not all(isinstance(value, torch.Tensor) and _counts_axis_0(value, frames) for value in made):
        return False
    if name in MOVES:
        return True  # elements keep their order or whole axes swap: what is still on axis 0 is still a frame
    if not all(isinstance(value, torch.Tensor) for value in read):
        return False  # computes with the number of frames
    if name in ("scaled_dot_product_attention", "window_attention"):
        return all(value.dim() > 2 for value in read)  # between those of the last two axes
    if name == "getitem":
        return not isinstance(value_of(node.all_input_nodes[0]), torch.Tensor)  # one of the parts that chunk makes
    return name in _FRAME_WISE


def gather(stages: GraphModule, run: Run, name: str) -> Signature:
    """Put the pieces of ``run`` into one submodule of the graph that calls them, called ``name``."""
    read, made = gather_pieces(stages, run.pieces, name)
    framed = tuple(run.frames is not None and _mentions(value_of(node), run.frames) for node in made)
    return Signature(tuple(_kind(node, run.frames) for node in read), framed)


def _place(where: Sequence[str]) -> str:
    return f"{where[0]} and {len(where) - 1} more" if len(where) > 1 else where[0]


def _kind(node: Node, frames: sympy.Symbol | None) -> str:
    value = value_of(node)
    static = "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})
    if node.op == "get_attr" or static or isinstance(value, torch.nn.Parameter):
        return "weight"
    framed = frames is not None and _mentions(value, frames)
    if isinstance(value, torch.Tensor):
        return "frames" if framed else "tensor"
    return "count" if framed else "number"


def _mentions(value: Any, frames: sympy.Symbol) -> bool:
    return frames in free_unbacked_symbols(list(_leaves(value)))


def _counts_axis_0(value: Any, frames: sympy.Symbol) -> bool:
    """Whether ``frames`` is the size of the first axis and of nothing else, or the value itself."""
    first, *others = value.shape if isinstance(value, torch.Tensor) else [value]
    return isinstance(first, torch.SymInt) and first.node.expr == frames and not _mentions(others, frames)


def _leaves(value: Any) -> Iterator[Any]:
    """The tensors and numbers in a value, which may be several."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, (torch.Tensor, *torch.types.py_sym_types)):
        yield value


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    return (value for value in values if isinstance(value, torch.Tensor))
