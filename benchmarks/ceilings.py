"""What a machine can do at best, measured on it: the rates that times are compared with.

    ceilings(Clock("cuda"), torch.bfloat16, "cuda")   ->   {"copy": bytes/s, "matmul": FLOP/s}

The fastest of several runs, of a copy larger than any cache and of a large square matrix product.
"""

import time
from collections.abc import Callable

import torch

_RUNS = 10


class Clock:
    """Times calls on one device. On a GPU it reads a large block before each, about half a millisecond on an H200,
    so that the launches of a call are in the queue when it starts: they cost nothing between other work either."""

    def __init__(self, device: torch.device | str) -> None:
        self.on_gpu = torch.device(device).type == "cuda"
        self.cache = torch.cuda.get_device_properties(device).L2_cache_size if self.on_gpu else 0
        self.ahead = torch.zeros(1 << 29 if self.on_gpu else 0, device=device)

    def seconds(self, call: Callable[[], object]) -> float:
        """Of one call."""
        if not self.on_gpu:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.ahead.amax()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def ceilings(clock: Clock, dtype: torch.dtype, device: torch.device | str) -> dict[str, float]:
    """Bytes per second of a large copy, read and written; operations per second of a large matrix product."""
    length, side = (1 << 30, 8192) if clock.on_gpu else (1 << 26, 1024)
    block = torch.ones(length, dtype=torch.uint8, device=device)  # written: untouched memory reads from the cache
    target, matrix = torch.empty_like(block), torch.randn(side, side, device=device).to(dtype)
    calls = {"copy": lambda: target.copy_(block), "matmul": lambda: matrix @ matrix}
    for call in calls.values():
        call()
    seconds = {name: min(clock.seconds(call) for _ in range(_RUNS)) for name, call in calls.items()}
    return {"copy": 2 * length / seconds["copy"], "matmul": 2 * side**3 / seconds["matmul"]}
