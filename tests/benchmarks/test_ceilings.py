"""Ceilings are the best of what was timed, in bytes and operations per second."""

import pytest
import torch

from earlytom_compile.benchmarks.ceilings import Clock, ceilings


class Scripted(Clock):
    """Says the first calls, the copies, took 2 seconds or more and the products 4 or more; runs them all."""

    def __init__(self):
        super().__init__("cpu")
        self.calls = []

    def seconds(self, call):
        result = call()
        kind = "matmul" if result.dtype == torch.float64 else "copy"
        self.calls.append((kind, result))
        return {"copy": 2.0, "matmul": 4.0}[kind] + len(self.calls) % 3


def test_ceilings_are_work_over_the_fastest_time():
    clock = Scripted()
    rates = ceilings(clock, torch.float64, "cpu")
    copied = next(result for kind, result in clock.calls if kind == "copy")
    product = next(result for kind, result in clock.calls if kind == "matmul")
    assert rates == {"copy": 2 * copied.nbytes / 2.0, "matmul": 2 * product.shape[0] ** 3 / 4.0}
    assert copied.nbytes >= 1 << 26 and bool((copied[:: 1 << 12] == 1).all())


def test_real_ceilings_are_within_what_machines_do():
    rates = ceilings(Clock("cpu"), torch.float32, "cpu")
    assert 1e8 < rates["copy"] < 1e13 and 1e8 < rates["matmul"] < 1e15


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_a_clock_takes_a_device_or_its_name(device):
    clock = Clock(device)
    assert not clock.on_gpu and clock.seconds(lambda: None) >= 0 and clock.ahead.numel() == 0
