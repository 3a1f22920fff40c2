"""Static frames' tokens chosen on the CPU while the device chooses those of dynamic frames (System co-design).

::

    device stream   dynamic frames: rank and copy ............  wait  copy static frames' rows
    side stream     importance -> pinned memory                  rows -> device
    CPU thread                     runs and argmax of static frames

Choosing is branches and tiny sorts, which leave a GPU idle; what crosses the bus is small. The result is that of
the device, which takes NaN for the least importance; counts that mean nothing, which the device marks, are refused.
"""

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .select_tokens import check_budget, keep_tokens, paper_quotas, read_videos

Selected = tuple[Tensor, Tensor]
_TRIALS = 5

_workers = ThreadPoolExecutor(max_workers=1, thread_name_prefix="earlytom-static")
_fastest: dict[tuple[Any, ...], str] = {}


def select(
    features: Tensor,
    importance: Tensor,
    dynamic: Tensor,
    counts: Tensor,
    budget: int,
    select_dynamic: Callable[[], Selected],
) -> Selected:
    """As ``select_tokens``; ``select_dynamic`` gives its results with the rows of static frames left as they come."""
    device = features.device
    streams: Any = torch.get_device_module(device)
    side = _side_stream(device)
    side.wait_stream(streams.current_stream(device))
    with streams.stream(side):
        copies = _to_host(importance), _to_host(dynamic), _to_host(counts)
        copied = side.record_event()
    rows = _workers.submit(_static_rows, *copies, budget, features.shape[1], copied)
    tokens, kept = select_dynamic()  # enqueued while the CPU works
    with streams.stream(side):
        place, source, where = (x.to(device, non_blocking=True) for x in rows.result())
    streams.current_stream(device).wait_stream(side)
    for x in (place, source, where):
        if device.type != "cpu":
            x.record_stream(streams.current_stream(device))
    tokens.flatten(0, 1).index_copy_(0, place, features.flatten(0, 1).index_select(0, source))
    kept.flatten(0, 1).index_copy_(0, place, where)
    return tokens, kept


def fastest(features: Tensor, budget: int, choices: Mapping[str, Callable[[], Selected]]) -> Selected:
    """The result of the quicker choice; which one that is for this shape is measured at its first call."""
    shape = features.device, *features.shape[1:], budget
    if shape not in _fastest:
        streams: Any = torch.get_device_module(features.device)
        seconds = {name: min(_timed(choice, streams) for _ in range(_TRIALS)) for name, choice in choices.items()}
        _fastest[shape] = min(seconds, key=lambda name: seconds[name])
    return choices[_fastest[shape]]()


def _timed(choice: Callable[[], Selected], streams: Any) -> float:
    streams.synchronize()
    start = time.perf_counter()
    choice()
    streams.synchronize()
    return time.perf_counter() - start


@cache
def _side_stream(device: torch.device) -> Any:
    streams: Any = torch.get_device_module(device)
    return streams.Stream() if device.type == "cpu" else streams.Stream(device)


def _to_host(x: Tensor) -> Tensor:
    if x.device.type == "cpu":
        return x
    pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return pinned.copy_(x, non_blocking=True)


def _static_rows(
    importance: Tensor, dynamic: Tensor, counts: Tensor, budget: int, tokens: int, copied: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """int64, on the CPU: rows of the result that static frames fill [M], the tokens of all frames that go there [M],
    and their (frame within its video, token) [M, 2]."""
    if copied is not None:  # the CPU's own streams have no events
        copied.synchronize()
    importance = torch.where(importance.isnan(), -math.inf, importance)
    videos = read_videos(importance, dynamic, counts, "select_tokens")
    quotas, firsts = list[int](), list[int]()
    for frames in videos:
        check_budget(budget, len(frames), tokens)
        firsts += [len(quotas)] * len(frames)
        quotas += paper_quotas(frames, budget)
    static = (~dynamic).nonzero().flatten()
    wanted = [quotas[frame] for frame in static.tolist()]
    nth, token = keep_tokens(importance[static], dynamic[static], wanted)
    frame = static[nth]
    # Every frame fills its quota in order, so where a frame's rows begin is a running sum.
    begins = torch.tensor([0, *quotas]).cumsum(0)
    begins_static = torch.tensor([0, *wanted]).cumsum(0)
    place = begins[frame] + torch.arange(len(frame)) - begins_static[nth]
    where = torch.stack([frame - torch.tensor(firsts)[frame], token], dim=1)
    return tuple(_pinned(x, dynamic) for x in (place, frame * tokens + token, where))  # type: ignore[return-value]


def _pinned(x: Tensor, like: Tensor) -> Tensor:
    return x.pin_memory() if like.is_pinned() else x
