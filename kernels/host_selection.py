"""Static frames' tokens chosen on the CPU while the device chooses those of dynamic frames (System co-design).

::

    device stream   dynamic frames: rank and copy ............  wait  copy static frames' rows
    side stream     importance -> pinned memory                  rows -> device
    CPU thread                     runs and argmax of static frames

Choosing is branches and tiny sorts, which leave a GPU idle; what crosses the bus is small. The importance of all
frames crosses it, since the host does not yet know which are static: their flags come by the same copies. With
``released`` the device's part waits for the host itself, which reads there how many tokens stay before it launches
anything. The result is that of the device, which takes NaN for the least importance where it does not refuse it;
counts that mean nothing, which the device may only mark, are refused.
"""

import math
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from earlytom_compile.kernels.select_tokens import keep_tokens, read_videos

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""``features``, ``importance``, ``dynamic`` and ``counts`` of ``select_tokens``."""
Quotas = Callable[[list[list[bool]]], list[list[int]]]
"""Tokens that each frame of each video keeps, from the frames' dynamic flags."""
Selected = tuple[Tensor, ...]
"""Tokens [..., D], where they came from int64 [..., 2 or 3], and what else the operator returns."""
_TRIALS = 5

_workers = ThreadPoolExecutor(max_workers=1, thread_name_prefix="earlytom-static")
_fastest: dict[tuple[Any, ...], str] = {}


def select_at(
    place: str, inputs: Inputs, amount: Hashable, quotas: Quotas, on_device: Callable[..., Selected]
) -> Selected:
    """What ``on_device`` returns, the tokens of static frames selected where ``place`` says.

    ``amount`` is what decides how many tokens stay, apart from the inputs; with ``only_dynamic=True`` ``on_device``
    leaves the rows of static frames as they come.
    """
    choices: dict[str, Callable[[], Selected]] = {
        "device": on_device,
        "host": partial(select, inputs, quotas, partial(on_device, only_dynamic=True)),
    }
    return fastest(inputs[0], amount, choices) if place == "auto" else choices[place]()


def select(inputs: Inputs, quotas: Quotas, select_dynamic: Callable[[], Selected]) -> Selected:
    """What ``select_dynamic`` returns, with the rows of static frames filled by the CPU."""
    features, device = inputs[0], inputs[0].device
    streams: Any = torch.get_device_module(device)
    side = _side_stream(device)
    side.wait_stream(streams.current_stream(device))
    with streams.stream(side):
        importance, dynamic, counts = (_to_host(x) for x in inputs[1:])
        copied = side.record_event()
    rows = _workers.submit(_static_rows, importance, dynamic, counts, quotas, copied)
    selected = select_dynamic()  # enqueued while the CPU works
    with streams.stream(side):
        place, frame, where = (x.to(device, non_blocking=True) for x in rows.result())
    streams.current_stream(device).wait_stream(side)
    for x in (place, frame, where):
        if device.type != "cpu":
            x.record_stream(streams.current_stream(device))
    tokens, kept = selected[:2]
    tokens.flatten(0, -2).index_copy_(0, place, features[frame, where[:, 2]])
    kept.flatten(0, -2).index_copy_(0, place, where[:, -kept.shape[-1] :])
    return selected


def fastest(features: Tensor, amount: Hashable, choices: Mapping[str, Callable[[], Selected]]) -> Selected:
    """The result of the quicker choice; which one that is for this shape is measured at its first call."""
    shape = features.device, *features.shape[1:], amount
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
    importance: Tensor, dynamic: Tensor, counts: Tensor, quotas: Quotas, copied: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """int64, on the CPU: rows of the result that static frames fill [M], the frame of all that each comes from [M],
    and its (video, frame within the video, token) [M, 3]."""
    if copied is not None:  # the CPU's own streams have no events
        copied.synchronize()
    importance = torch.where(importance.isnan(), -math.inf, importance)
    videos = read_videos(importance, dynamic, counts, "select_tokens")
    every_quota = torch.tensor(sum(quotas(videos), []))
    within = torch.tensor([(video, frame) for video, flags in enumerate(videos) for frame in range(len(flags))])
    static = (~dynamic).nonzero().flatten()
    wanted = every_quota[static]
    nth, token = keep_tokens(importance[static], dynamic[static], wanted.tolist())
    frame = static[nth]
    # Every frame fills its quota in order, so where a frame's rows begin is a running sum.
    begins, begins_static = every_quota.cumsum(0) - every_quota, wanted.cumsum(0) - wanted
    place = begins[frame] + torch.arange(len(frame)) - begins_static[nth]
    where = torch.cat([within[frame], token[:, None]], dim=1)
    return _pinned(place, dynamic), _pinned(frame, dynamic), _pinned(where, dynamic)


def _pinned(x: Tensor, like: Tensor) -> Tensor:
    return x.pin_memory() if like.is_pinned() else x
