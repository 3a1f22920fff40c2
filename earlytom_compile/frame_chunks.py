"""A long video goes through the layers between two merges in chunks of its frames.

    frames [300, S, D] -> 7 x [43, S, D], each through all layers of the run -> [300, S, D]

What a layer needs beside its result, several times as much, is there for one chunk at a time. The chunks are as long as
keeps a processor busy, and a video that is no longer goes through as a whole.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .passes.find_frame_runs import FrameRun, Share, share_of
from .passes.manager import Rewrite
from .passes.patterns import value_of
from .passes.split_stages import gather_pieces

PLACES_AT_ONCE = {"cpu": 8_192}
"""Frames times places of each that go through a layer at once, by the type of the device (docs/long-videos.md)."""
_ELSEWHERE = 32_768
_FEWEST = 2
"""Frames of a chunk, since code that was compiled for any number may rely on there being more than one."""


@dataclass(frozen=True)
class Framed:
    """Which sizes of a graph, known at run time only, count frames, and the places of each in the encoder's layers."""

    counts: frozenset[sympy.Symbol]
    places: int


NO_FRAMES = Framed(frozenset(), 1)


def framed_of(state: Rewrite) -> Framed:
    """Frames are counted at first, after each merge, and without those that repeat another."""
    assert state.path is not None and state.video is not None
    nodes, plan = [axis.size for axis in state.video.axes], state.reused
    if plan is not None and plan.frames is not None:
        nodes.append(plan.frames[1])
    whole, axis = (state.path.encoder.blocks[0].output, 1) if plan is None else (plan.source, 2)
    values = [state.path.frames, *(value_of(node) for node in nodes if isinstance(node, Node))]
    sizes = [value.node.expr for value in values if isinstance(value, torch.SymInt)]
    return Framed(frozenset(size for size in sizes if size.is_Symbol), int(value_of(whole).shape[axis]))


def run_in_chunks(stages: GraphModule, runs: Sequence[FrameRun], places: int) -> None:
    """Let long videos, of ``places`` places a frame, go through each of ``runs``, pieces of ``stages``, in chunks."""
    for number, run in enumerate(runs):
        name = f"frames_{number}"
        read, made = gather_pieces(stages, run.pieces, name)
        inputs, outputs = ([share_of(value_of(node), run.frames) for node in nodes] for nodes in (read, made))
        shares = [share.each for share in (*inputs, *outputs) if _is_framed(share)]
        device = next(value_of(node).device.type for node, share in zip(read, inputs, strict=True) if _is_framed(share))
        at_once = PLACES_AT_ONCE.get(device, _ELSEWHERE) // (places * min(shares))
        stages.add_submodule(name, ChunkedRun(stages.get_submodule(name), inputs, outputs, at_once))


def _is_framed(share: Share | None) -> TypeGuard[Share]:
    """Whether it is that of a tensor."""
    return share is not None and share.axis is not None


class ChunkedRun(torch.nn.Module):
    """Calls ``run`` with so many frames ``at_once``, at least 2; ``inputs`` and ``outputs`` say what of each of its
    arguments and results belongs to a frame, None for what all share."""

    def __init__(
        self,
        run: Callable[..., Sequence[Any]],
        inputs: Sequence[Share | None],
        outputs: Sequence[Share | None],
        at_once: int,
    ) -> None:
        super().__init__()
        self._run = run
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)
        self._at_once = max(_FEWEST, at_once)

    def forward(self, *args: Any) -> Sequence[Any]:
        """As ``run``."""
        frames = self._frames_of(args)
        chunks = list(_chunks(frames, self._at_once))
        if len(chunks) == 1:
            return self._run(*args)
        results: list[Any] = []
        for begin, end in chunks:
            made = self._run(*[_take(x, share, begin, end) for x, share in zip(args, self._inputs, strict=True)])
            if not results:
                results = [_room(x, share, end, frames) for x, share in zip(made, self._outputs, strict=True)]
            for result, x, share in zip(results, made, self._outputs, strict=True):
                if _is_framed(share):
                    _of_frames(result, share, begin, end).copy_(x)
            del made, x  # before the next chunk needs its memory
        return results

    def _frames_of(self, args: Sequence[Any]) -> int:
        at, share = next((i, share) for i, share in enumerate(self._inputs) if _is_framed(share))
        return int(args[at].shape[share.axis]) // share.each  # type: ignore[index]


def _chunks(frames: int, at_once: int) -> Iterator[tuple[int, int]]:
    """Begin and end of chunks whose lengths differ by 1 at most; they may have one more than ``at_once`` where one of
    them would have less than 2 otherwise."""
    number = max(1, min(-(-frames // at_once), frames // _FEWEST))
    for chunk in range(number):
        yield frames * chunk // number, frames * (chunk + 1) // number


def _take(x: Any, share: Share | None, begin: int, end: int) -> Any:
    if share is None:
        return x
    return (end - begin) * share.each if share.axis is None else _of_frames(x, share, begin, end)


def _of_frames(x: Tensor, share: Share, begin: int, end: int) -> Tensor:
    """A view, laid out as the whole would be if it had no more frames."""
    assert share.axis is not None
    part = x.narrow(share.axis, begin * share.each, (end - begin) * share.each)
    length, stride = part.shape[share.axis], part.stride()[share.axis :]
    return part.as_strided(part.shape, (*[length * stride[0]] * share.axis, *stride))


def _room(x: Any, share: Share | None, chunk: int, frames: int) -> Any:
    """For what comes of all frames, laid out as ``x``, which came of the first ``chunk``, if its frames lie apart."""
    if share is None:
        return x
    if share.axis is None:
        return x // chunk * frames
    length, stride = frames * share.each, x.stride()[share.axis :]
    shape = (*x.shape[: share.axis], length, *x.shape[share.axis + 1 :])
    inner = sum((size - 1) * step for size, step in zip(x.shape[share.axis + 1 :], stride[1:], strict=True))
    if stride[0] <= inner:
        return x.new_empty(shape)
    return torch.empty_strided(shape, (*[length * stride[0]] * share.axis, *stride), dtype=x.dtype, device=x.device)
