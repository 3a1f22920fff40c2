"""Whoever waits longer than two seconds is told for what; on a terminal by bars, elsewhere by lines."""

import io
import logging
from types import SimpleNamespace

import pytest
from rich.console import Console

from earlytom_compile.cli import main as cli
from earlytom_compile.cli import progress


class Clock:
    """Timers that go off when a test says how late it is."""

    def __init__(self):
        self.now, self.timers = 0.0, []

    def timer(self, seconds, tell):
        clock = self

        class Timer:
            daemon = False

            def start(self):
                assert self.daemon
                clock.timers.append((clock.now + seconds, tell))

        return Timer()

    def wait(self, seconds):
        until = self.now + seconds
        while due := sorted((timer for timer in self.timers if timer[0] <= until), key=lambda timer: timer[0]):
            self.timers.remove(due[0])
            self.now = due[0][0]
            due[0][1]()
        self.now = until


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.threading, "Timer", clock.timer)
    return clock


def test_a_step_that_takes_long_has_a_line_and_one_that_does_not_has_none(clock):
    said = io.StringIO()
    with progress.progress_bars(Console(file=said)) as bars:
        task = bars.add_task("quick", total=None)
        clock.wait(1.9)
        bars.update(task, description="slow [one]")
        bars.update(task, advance=1)  # the same step
        clock.wait(2.1)
        bars.add_task("last", total=None)
    clock.wait(10)
    assert said.getvalue() == "slow [one] ...\n"


def test_a_step_that_takes_very_long_is_told_again(clock):
    said = io.StringIO()
    with progress.progress_bars(Console(file=said)) as bars:
        bars.add_task("loading", total=None)
        clock.wait(125)
    assert said.getvalue() == "loading ...\nloading ... (62 s)\nloading ... (122 s)\n"


def test_a_quiet_console_stays_so(clock):
    said = io.StringIO()
    with progress.progress_bars(Console(file=said, quiet=True)) as bars:
        bars.add_task("slow", total=None)
        clock.wait(5)
    assert said.getvalue() == ""


def test_a_terminal_gets_a_bar_and_no_lines(clock):
    said = io.StringIO()
    with progress.progress_bars(Console(file=said, force_terminal=True)) as bars:
        bars.add_task("slow", total=None)
        clock.wait(5)
    assert "slow" in said.getvalue() and "slow ..." not in said.getvalue()


def test_what_raises_tells_nothing_later(clock):
    said = io.StringIO()
    with pytest.raises(ValueError), progress.progress_bars(Console(file=said)) as bars:
        bars.add_task("slow", total=None)
        raise ValueError
    clock.wait(5)
    assert said.getvalue() == ""


def test_a_command_does_not_say_that_there_is_no_gpu_and_a_program_still_does(monkeypatch):
    said, logger = [], logging.getLogger("torch.utils.cpp_extension")
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    monkeypatch.setattr(logger, "handlers", [handler])

    def execute(arguments, options):
        logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/tmp/x")
        logger.warning("something else")

    monkeypatch.setattr(cli, "_command", lambda arguments: SimpleNamespace(execute=execute))
    assert cli.main(["flops"]) == 0 and said == ["something else"]
    execute(None, None)
    assert len(said) == 3
