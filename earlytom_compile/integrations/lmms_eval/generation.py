"""The generation arguments of a task -> those of ``generate()``, and where an answer ends.

{"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "until": ["\\n\\n"]}
-> Decoding(until=("\\n\\n",), arguments={"max_new_tokens": 16, "do_sample": False, ...})
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria

from ...errors import EarlyTomConfigError

log = logging.getLogger(__name__)

MAX_NEW_TOKENS = 1024
"""Where a task does not say, as for lmms-eval's own models."""
_SAMPLING = ("temperature", "top_p", "top_k")
_TAKEN = ("max_new_tokens", "do_sample", *_SAMPLING, "num_beams", "repetition_penalty", "until")
_LEFT_OUT = ("image_aspect_ratio",)
"""What tasks say to other models, and this one's processor decides."""


@dataclass(frozen=True)
class Decoding:
    """``until``: texts that end an answer and are no part of it; ``arguments``: those of ``generate()``."""

    until: tuple[str, ...]
    arguments: dict[str, Any]

    def cut(self, text: str) -> str:
        """An answer up to the first of :attr:`until`, without spaces around it."""
        ends = [place for stop in self.until if (place := text.find(stop)) >= 0]
        return text[: min(ends, default=len(text))].strip()


def read_decoding(given: Mapping[str, Any]) -> Decoding:
    """Check the arguments of a task.

    Greedy unless ``do_sample`` is not False and ``temperature`` is above 0 (absent, it is 1 beside ``do_sample: true``
    and 0 otherwise), as lmms-eval's models do. Raises :class:`EarlyTomConfigError` for an argument that is not known:
    without it the answers would be others than the task asks for.
    """
    for name in given:
        if name in _LEFT_OUT:
            log.warning("%s=%r of the task is left out: the checkpoint's own processor decides", name, given[name])
        elif name not in _TAKEN:
            raise EarlyTomConfigError(
                f"the task's generation_kwargs have {name}={given[name]!r}, which is not known here; there are "
                f"{', '.join(_TAKEN)}. Leave it out of the task, or set it with --gen_kwargs."
            )
    stops = given.get("until") or ()
    temperature = given.get("temperature")
    if temperature is None:
        temperature = 1.0 if given.get("do_sample") else 0.0
    sampled = given.get("do_sample") is not False and temperature > 0
    arguments: dict[str, Any] = {
        "max_new_tokens": int(given.get("max_new_tokens") or MAX_NEW_TOKENS),
        "do_sample": sampled,
        "num_beams": int(given.get("num_beams") or 1),
        # None: neither what the checkpoint's generation_config says, nor a warning that greedy decoding ignores it.
        **{name: None for name in _SAMPLING},
    }
    if sampled:
        arguments |= {"temperature": float(temperature), "top_p": given.get("top_p"), "top_k": given.get("top_k")}
    if given.get("repetition_penalty") is not None:
        arguments["repetition_penalty"] = float(given["repetition_penalty"])
    return Decoding((stops,) if isinstance(stops, str) else tuple(stop for stop in stops if stop), arguments)


def batches(arguments: Sequence[Mapping[str, Any]], size: int) -> Iterator[list[int]]:
    """Places of requests that go into one call: with equal generation ``arguments``, at most ``size``, in order.

    In their own order, so that questions about one video stay together and it is read once.
    """
    alike: dict[str, list[int]] = {}
    for place, each in enumerate(arguments):
        alike.setdefault(json.dumps(each, sort_keys=True, default=repr), []).append(place)
    for places in alike.values():
        for first in range(0, len(places), size):
            yield places[first : first + size]


class FirstToken(StoppingCriteria):
    """Stops nothing; notes when every row of a call has its first token, the device waited for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        _wait_for(device)
        self._start = time.perf_counter()
        self.seconds: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Called with ``input_ids`` [R, S] after each token."""
        if self.seconds is None:
            self.seconds = self.total()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def total(self) -> float:
        """Seconds since this was made."""
        _wait_for(self._device)
        return time.perf_counter() - self._start


class StopTexts(StoppingCriteria):
    """Stops a row as soon as its new text has one of ``texts`` in it."""

    def __init__(self, texts: Sequence[str], decode: Callable[[list[list[int]]], list[str]]) -> None:
        self._texts, self._decode = texts, decode
        self._prompt: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """bool [R] for ``input_ids`` [R, S], which may begin with a prompt or not."""
        if self._prompt is None:
            self._prompt = input_ids.shape[1] - 1  # first called behind the first new token
        answers = self._decode(input_ids[:, self._prompt :].tolist())
        stopped = [any(text in answer for text in self._texts) for answer in answers]
        return torch.tensor(stopped, dtype=torch.bool, device=input_ids.device)


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
