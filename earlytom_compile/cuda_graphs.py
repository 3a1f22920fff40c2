"""CUDA graphs of the compiled pieces between two waits for the host: one launch in the place of hundreds.

    frames [n, S, D] -> the first n of a static buffer [b, S, D] -> replay -> the first n frames of what it made

A graph replays fixed sizes, so frame counts are rounded up to one of a few, the bucket b; passes/find_capturable.py
sees to it that frames which fill a bucket change nothing in the others, and only the first n are handed on.

The first call of a size runs as it is. The second captures a graph and times it against plain calls; only a graph
that is faster is replayed from then on. What it makes is copied out before anything else can be replayed, so results
are the caller's own. Replays share one pool of memory and belong to one stream; calls on another, or while another
thread replays, run plainly.
"""

import logging
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule

from .errors import EarlyTomFallbackWarning
from .passes.find_capturable import Signature, find_runs, gather
from .passes.split_stages import Piece
from .reporting import GraphRecord, TimedGraph

log = logging.getLogger(__name__)
_BUCKETS = 8
"""Sizes a run of one video shape is captured for at most; less than an eighth of the video's frames is added."""
_MOST_GRAPHS = 16
"""Of one run: prompts of ever new lengths must not fill the memory."""
_TRIALS = 5


def bucket(count: int, most: int) -> int:
    """The least of at most 8 evenly spaced sizes up to ``most`` that holds ``count`` frames."""
    return min(-(-count // _step(most)) * _step(most), most)


def fewest_of_bucket(size: int, most: int) -> int:
    """The least count that ``bucket`` rounds up to ``size``."""
    return (size - 1) // _step(most) * _step(most) + 1


def _step(most: int) -> int:
    return max(1, -(-most // _BUCKETS))


class Device(Protocol):
    """What needs a GPU."""

    def reason_not_now(self) -> str | None:
        """Why no graph can be captured or replayed here and now, None if it can."""

    def capture(self, run: Callable[[], Sequence[Any]]) -> tuple[Sequence[Any], Callable[[], None]]:
        """Run once, then capture: (what each replay overwrites, replay). Raises RuntimeError if it cannot."""

    def seconds(self, call: Callable[[], Any]) -> float:
        """How long a call takes, until the device is done."""


class CudaDevice:
    """One GPU, with the memory that its graphs share."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._side = torch.cuda.Stream(device)
        self._stream: Any = None

    def reason_not_now(self) -> str | None:
        """Only the order of one stream keeps replays, which write to the same memory, apart."""
        stream = torch.cuda.current_stream(self._device)
        self._stream = stream if self._stream is None else self._stream
        if stream != self._stream:
            return "calls on another CUDA stream than the first one's run without CUDA graphs"
        if torch.cuda.is_current_stream_capturing():
            return "calls inside a CUDA graph of the caller's run without others"
        return None

    def capture(self, run: Callable[[], Sequence[Any]]) -> tuple[Sequence[Any], Callable[[], None]]:
        """Warm up and capture on a side stream; other threads may use the GPU meanwhile."""
        current = torch.cuda.current_stream(self._device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):  # torch.cuda.graph does not leave it when a capture fails
            run()  # what is loaded, tuned or allocated once must not happen in a capture
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"):
                outputs = run()
        current.wait_stream(self._side)
        return outputs, graph.replay

    def seconds(self, call: Callable[[], Any]) -> float:
        """Wall-clock time: a host that cannot launch fast enough is what graphs are for."""
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        call()
        torch.cuda.synchronize(self._device)
        return time.perf_counter() - start


@cache
def device_for(device: torch.device) -> Device | None:
    """None where there are no CUDA graphs."""
    return CudaDevice(device) if device.type == "cuda" else None


def replay_runs(
    stages: GraphModule, pieces: Sequence[Piece], compiled: set[str], frames: range, record: GraphRecord
) -> None:
    """Let graphs replay the pieces of ``stages`` that they can; ``frames`` are the counts that a run can get."""
    runs, reasons = find_runs(pieces, compiled)
    for reason in reasons:
        record.note(reason)
    for number, run in enumerate(runs):
        device = device_for(run.device)
        if device is None:
            record.note(f"no CUDA graphs on the device {run.device}")
            continue
        name = f"run_{number}"
        signature = gather(stages, run, name)
        plain = stages.get_submodule(name)
        stages.add_submodule(name, GraphedRun(plain, signature, frames, device, run.where, record))


@dataclass(frozen=True)
class _Graph:
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    replay: Callable[[], None]


_replaying = threading.Lock()


class GraphedRun(torch.nn.Module):
    """Calls ``run``, or replays a graph of it where that has measured faster; ``frames`` are the counts it can get."""

    def __init__(
        self,
        run: Callable[..., Sequence[Any]],
        signature: Signature,
        frames: range,
        device: Device,
        where: str,
        record: GraphRecord,
    ) -> None:
        super().__init__()
        self._run = run
        self._signature = signature
        kinds = list(enumerate(signature.inputs))
        self._weights_at = [i for i, kind in kinds if kind == "weight"]
        self._changing_at = [i for i, kind in kinds if kind != "weight"]
        self._tensors_at = [i for i, kind in kinds if kind in ("frames", "tensor")]
        self._frames_at = [i for i, kind in kinds if kind == "frames"]
        self._frames = frames
        self._device = device
        self._where = where
        self._record = record
        self._failed = False
        self._forget()

    def forward(self, *args: Any) -> Sequence[Any]:
        """As ``run``; results share no memory with those of other calls."""
        reason = None if self._failed else self._device.reason_not_now()
        if reason is not None:
            self._record.note(reason)
        if self._failed or reason is not None or not _replaying.acquire(blocking=False):
            return self._run(*args)
        try:
            graph = self._graph_for(args)
            return self._run(*args) if graph is None else self._replay(graph, args)
        finally:
            _replaying.release()

    def _forget(self, weights: tuple[int, ...] = ()) -> None:
        self._weights = weights
        self._graphs: dict[Any, _Graph | None] = {}  # None: not faster
        self._memory: dict[Any, list[Tensor]] = {}  # shared by graphs that differ in their number of frames only
        self._seen: deque[Any] = deque(maxlen=_MOST_GRAPHS)

    def _graph_for(self, args: tuple[Any, ...]) -> _Graph | None:
        """The graph to replay for ``args``, None to call ``run``."""
        weights = tuple(args[i].data_ptr() for i in self._weights_at)
        if weights != self._weights:
            self._forget(weights)  # updates in place are seen by a replay, weights in another place are not
        frames = self._frames_of(args)
        if self._frames_at and frames not in self._frames:
            return None
        layout = tuple(_layout(self._signature.inputs[i], args[i]) for i in self._changing_at)
        size = bucket(frames, self._frames[-1]) if frames else 0
        key = layout, size
        if key in self._graphs:
            return self._graphs[key]
        if len(self._graphs) == _MOST_GRAPHS:
            self._record.note(f"{self._where}: no CUDA graphs for more than {_MOST_GRAPHS} sizes")
        elif key in self._seen:
            self._try_to_capture(key, args)
        else:
            self._seen.append(key)
        return self._graphs.get(key)

    def _try_to_capture(self, key: tuple[Any, int], args: tuple[Any, ...]) -> None:
        """Keep a graph if one can be captured and is faster."""
        try:
            self._graphs[key] = self._capture(*key, args)
            if not self._is_faster(key, args):
                self._graphs[key] = None
                if not any(graph for (layout, _), graph in self._graphs.items() if layout == key[0]):
                    del self._memory[key[0]]
        except (RuntimeError, AssertionError) as error:
            self._failed = True
            self._forget()
            first = next(iter(str(error).splitlines()), "")
            reason = f"no CUDA graph of {self._where}: {type(error).__name__}: {first[:300]}"
            log.debug("%s", reason, exc_info=True)
            self._record.note(reason)
            warnings.warn(f"{reason}. The result is the same, slower.", EarlyTomFallbackWarning, stacklevel=2)

    def _capture(self, layout: Any, size: int, args: tuple[Any, ...]) -> _Graph:
        if layout not in self._memory:
            self._memory[layout] = [
                _static(args[i], self._frames[-1] if i in self._frames_at else None) for i in self._tensors_at
            ]
        static = self._in_place(args, self._memory[layout], size)
        inputs = [static[i] for i in self._tensors_at]
        self._fill(inputs, args)
        outputs, replay = self._device.capture(lambda: self._run(*static))
        for output, framed in zip(outputs, self._signature.framed_outputs, strict=True):
            if framed:
                _require_frames_outermost(output)
        return _Graph(inputs, outputs, replay)

    def _is_faster(self, key: tuple[Any, int], args: tuple[Any, ...]) -> bool:
        """Whether a replay takes less than the plain call with the fewest frames that it would stand in for."""
        (_, size), graph = key, self._graphs[key]
        assert graph is not None
        least = max(fewest_of_bucket(size, self._frames[-1]), self._frames[0]) if size else 0
        fewest = self._in_place(args, graph.inputs, least)
        plain = min(self._device.seconds(lambda: self._run(*fewest)) for _ in range(_TRIALS))
        replayed = min(self._device.seconds(lambda: self._replay(self._graph_for(args), args)) for _ in range(_TRIALS))
        what = f"{size} frames" if size else next((str(list(x.shape)) for x in graph.inputs), "")
        self._record.cuda_graphs.append(TimedGraph(f"{self._where}, {what}", replayed, plain))
        return replayed < plain

    def _replay(self, graph: _Graph | None, args: tuple[Any, ...]) -> list[Tensor]:
        assert graph is not None
        self._fill(graph.inputs, args)
        graph.replay()
        count, framed = self._frames_of(args), self._signature.framed_outputs
        wanted = [x[:count] if cut else x for x, cut in zip(graph.outputs, framed, strict=True)]
        results = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in wanted]
        torch._foreach_copy_(results, wanted)  # the next replay, of any graph, may write where these are
        return results

    def _frames_of(self, args: Sequence[Any]) -> int:
        """How many frames there are, 0 where that is a fixed size."""
        return len(args[self._frames_at[0]]) if self._frames_at else 0

    def _fill(self, buffers: Sequence[Tensor], args: Sequence[Any]) -> None:
        for buffer, i in zip(buffers, self._tensors_at, strict=True):
            _fill(buffer, args[i])

    def _in_place(self, args: Sequence[Any], buffers: Sequence[Tensor], size: int) -> list[Any]:
        """``args`` with ``buffers`` in the place of tensors that change, and ``size`` frames of them."""
        buffer = iter(buffers)
        put: dict[str, Callable[[Any], Any]] = {
            "frames": lambda _: next(buffer)[:size],
            "tensor": lambda _: next(buffer),
            "count": lambda _: size,
        }
        return [put.get(kind, lambda x: x)(x) for kind, x in zip(self._signature.inputs, args, strict=True)]


def _layout(kind: str, x: Any) -> Any:
    """What must be equal for the same graph, but for the number of frames."""
    if kind == "number":
        return x
    if kind == "frames":
        return x.shape[1:], x.stride()
    return (x.shape, x.stride()) if kind == "tensor" else None


def _static(like: Tensor, frames: int | None) -> Tensor:
    """Memory that stays, laid out as ``like``, with room for as many ``frames``."""
    shape = like.shape
    if frames is not None:
        _require_frames_outermost(like)
        shape = torch.Size((frames, *shape[1:]))
    with torch.inference_mode(False):  # so that calls in and out of inference mode may write to it
        return torch.empty_strided(shape, like.stride(), dtype=like.dtype, device=like.device).zero_()


def _fill(buffer: Tensor, x: Tensor) -> None:
    (buffer[: len(x)] if x.dim() else buffer).copy_(x)


def _require_frames_outermost(x: Tensor) -> None:
    frame = 1 + sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
    if x.stride(0) < frame:
        raise RuntimeError(f"frames are not the outermost axis of {tuple(x.shape)} with strides {x.stride()}")
