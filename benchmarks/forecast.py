"""About how long a benchmark takes, said before it begins.

    forecast_of(arms, piece, repeats=5, decode_tokens=8, ...)   ->   Forecast(calls=152.0, compilation=60.0)
    told(forecast, piece)                                       ->   "about 4 minutes, 28% of it compilation ..."

Calls are counted and one of them is timed; how long compilation takes is a guess.

Guesses are the constants below. Machines differ, so that half or twice as long is no surprise.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from earlytom_compile.benchmarks.arms import Arm, is_ours
from earlytom_compile.benchmarks.failures import attempt
from earlytom_compile.benchmarks.measure import decode, timed
from earlytom_compile.benchmarks.workload import Inputs
from earlytom_compile.integrations.caches import cache_of

# As `earlytom bench` measured them on 2 cores of an AMD EPYC, with empty caches (docs/benchmarks.md).
WHOLE, WHOLE_LAYER = 10.0, 0.85
"""Seconds that Inductor takes for a graph that it gets as a whole, and for each layer in it."""
STAGED = 25.0
"""Seconds for one layer of each kind, which is what ``lowering="staged"`` compiles, and for the header before it."""
TRACED_LAYER = 0.2
"""Seconds in which Dynamo traces one layer."""
COMPRESSED = 0.45
"""A compressed call, in calls with all tokens."""
_PROFILED = 1.5  # a call under the profiler, in calls
_WARM_UP = 2
_FAR_OFF = 2.0  # times: what people should be told


@dataclass(frozen=True)
class Piece:
    """Seconds to the first token with all tokens, not compiled, and of each token behind it."""

    first: float
    token: float

    def scaled(self, share: float) -> float:
        """A first token of a call that has that share of the work."""
        return share * self.first


@dataclass(frozen=True)
class Forecast:
    """Seconds of calls, which were counted and of which one was timed, and of compilation, which is a guess."""

    calls: float
    compilation: float

    @property
    def seconds(self) -> float:
        """Of both."""
        return self.calls + self.compilation


def measured_piece(model: Any, inputs: Inputs) -> Piece | None:
    """Time one call; None where there is no memory for it."""
    found: list[Piece] = []
    with torch.inference_mode():
        attempt(partial(_measure, model, inputs, found))
    return found[0] if found else None


def _measure(model: Any, inputs: Inputs, found: list[Piece]) -> None:
    first, output = timed(lambda: model(**inputs, logits_to_keep=1), model.device)
    token = output.logits[:, -1:].argmax(-1)
    seconds, _ = timed(lambda: decode(model, (token, cache_of(output)), 1), model.device)
    found.append(Piece(first, seconds))


def share_of_work(arm: Arm, frames: int) -> float:
    """A call of ``arm``, in calls with all tokens of ``frames`` frames."""
    return COMPRESSED if arm.compresses else arm.frames / frames


def compilation(name: str, layers: int, lowering: str) -> float:
    """Seconds that the first call of what is called ``name`` takes longer than a later one."""
    ours = is_ours(name)
    if name.startswith("transformers") or name.startswith("average pooling"):  # the latter is compiled already
        return 0.0
    if ours and lowering == "eager":
        return TRACED_LAYER * layers
    return TRACED_LAYER * layers + STAGED if ours and lowering == "staged" else WHOLE + WHOLE_LAYER * layers


def forecast_of(
    arms: Iterable[Arm], piece: Piece, *, frames: int, repeats: int, decode_tokens: int, layers: int, lowering: str
) -> Forecast:
    """Of ``measure`` and ``profile_arms`` with these arms, for a model of so many layers."""
    calls = compiling = 0.0
    for arm in arms:
        compiling += compilation(arm.name, layers, lowering)
        calls += piece.scaled(share_of_work(arm, frames)) * (_WARM_UP + repeats + _PROFILED)
        calls += repeats * decode_tokens * piece.token
    return Forecast(calls, compiling)


def corrected(forecast: Forecast, layers: int, lowering: str, first_calls: Mapping[str, float]) -> float | None:
    """Seconds that are left, by what first calls took (of those so far, by the arm's name) that compiled.

    None before one has, and where it took about what was guessed.
    """
    guessed = {name: compilation(name, layers, lowering) for name in first_calls}
    compiled = [name for name, seconds in guessed.items() if seconds]
    if not compiled:
        return None
    times = sum(first_calls[name] for name in compiled) / sum(guessed[name] for name in compiled)
    left = forecast.calls + max(forecast.compilation - sum(guessed.values()), 0.0) * times
    return left if not 1 / _FAR_OFF < times < _FAR_OFF else None


def forecast_of_load(
    names: Iterable[str], piece: Piece, *, requests: int, rounds: int, new_tokens: int, layers: int, lowering: str
) -> Forecast:
    """Of ``measure_load`` with servers of these names and so many requests a round, one after the other.

    An upper bound where several requests at once cost less than as many calls.
    """
    calls = compiling = 0.0
    for name in names:
        share = COMPRESSED if is_ours(name) else 1.0
        request = piece.scaled(share) + new_tokens * piece.token
        compiling += compilation(name, layers, lowering)
        calls += (1 + rounds) * requests * request
    return Forecast(calls, compiling)


def told(forecast: Forecast, piece: Piece) -> str:
    """How long all takes, and what is known of that."""
    share = round(100 * forecast.compilation / forecast.seconds)
    guess = f", {share}% of it compilation (a guess: twice as long is no surprise)" if share else ""
    return f"{in_words(forecast.seconds)}{guess}; one call takes {piece.first:.2g} s before it is compiled"


def in_words(seconds: float) -> str:
    """As people say it: no more digits than are known."""
    if seconds < 60:
        return "less than a minute"
    if seconds < 5400:
        minutes = round(seconds / 60)
        return "about a minute" if minutes == 1 else f"about {minutes} minutes"
    return f"about {seconds / 3600:.1f} hours"
