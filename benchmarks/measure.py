"""Times of several arms, taken in turn so that whatever else the machine does meets all of them alike.

round 1: transformers, inductor, earlytom 0.1, ...     the first round compiles and is told apart
round 2: transformers, inductor, earlytom 0.1, ...
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache

import earlytom_compile
from earlytom_compile.benchmarks.arms import Arm, First
from earlytom_compile.benchmarks.breakdown import LLM, TOKENS, VISION, Breakdown
from earlytom_compile.benchmarks.failures import attempt
from earlytom_compile.benchmarks.floor import Floor
from earlytom_compile.benchmarks.stage_marks import stage_marks, stages_of_weights
from earlytom_compile.integrations.caches import cache_name
from earlytom_compile.reused import patches_of

Progress = Callable[[str], None]


@dataclass
class Result:
    """What was measured of one arm; times in seconds, memory in bytes."""

    name: str
    retain_ratio: float
    cold: float = 0.0  # the first call, compilation included
    compilation: float = 0.0  # what Dynamo and its backends took of the calls before the timed ones
    ttft: list[float] = field(default_factory=list)
    encoder: list[float] = field(default_factory=list)  # of the same calls, the vision encoder; where that can be told
    decode: list[float] = field(default_factory=list)  # seconds a token of every row
    rows: int = 1
    beside: int = 0  # positions of the prompt that are no tokens of the video's frames; 0: nobody noted it
    cache_tokens: int = 0  # prompt positions in the cache
    layer_tokens: list[int] = field(default_factory=list)  # the same of each layer of the language model
    peak_memory: int | None = None  # None where the device does not tell
    recompiles: int = 0  # graphs compiled after the first call
    frames: list[list[int]] = field(default_factory=list)  # of each video: at first, then after each merge layer
    kept: list[int] = field(default_factory=list)  # of each video, tokens behind the encoder
    merge_layers: list[int] = field(default_factory=list)
    # Of each video: all, those that were computed, and its distinct frames.
    patches: list[list[int]] = field(default_factory=list)
    full_layers: list[int] = field(default_factory=list)  # which compute all of them
    breakdown: Breakdown | None = None  # of a call of its own, under a profiler
    floor: Floor | None = None
    failure: str | None = None  # why there was no memory for it; then nothing else counts

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Result":
        """What ``dataclasses.asdict`` made a dictionary of, which may have more in it by now."""
        known = {field.name: content[field.name] for field in fields(cls) if field.name in content}
        for name, kind in (("breakdown", Breakdown), ("floor", Floor)):
            if known.get(name) is not None:
                known[name] = kind(**known[name])
        return cls(**known)

    @property
    def median(self) -> float:
        """Seconds to the first token."""
        return statistics.median(self.ttft)

    @property
    def encoder_median(self) -> float | None:
        """Seconds of the vision encoder."""
        return statistics.median(self.encoder) if self.encoder else None

    @property
    def rounds(self) -> int:
        """How often it was timed."""
        return len(self.ttft)

    @property
    def decode_rate(self) -> float | None:
        """Tokens a second of all rows together."""
        return self.rows / statistics.median(self.decode) if self.decode else None

    @property
    def times_floor(self) -> float | None:
        """How many times the floor the median is."""
        return self.median / self.floor.seconds if self.floor else None

    @property
    def retention(self) -> float | None:
        """Share of the frames left after the last merge layer, over all videos; None for arms that do not merge."""
        if not self.frames:
            return None
        return sum(video[-1] for video in self.frames) / sum(video[0] for video in self.frames)

    @property
    def starts(self) -> dict[int, int]:
        """``cache_tokens``, and where layers have fewer from some layer on, those too: by the first such layer."""
        steps = [layer for layer, (one, next_) in enumerate(pairwise(self.layer_tokens), 1) if one != next_]
        return {0: self.cache_tokens, **{layer: self.layer_tokens[layer] for layer in steps}}

    @property
    def computed(self) -> float | None:
        """Share of the patches that were computed, over all videos; None for arms that compute all."""
        if not self.patches:
            return None
        return sum(video[1] for video in self.patches) / sum(video[0] for video in self.patches)


def measure(
    model: Any,
    arms: Iterable[Arm],
    *,
    repeats: int,
    decode_tokens: int,
    progress: Progress = lambda text: None,
    caches: str | None = None,
    earlier: Sequence[Result] = (),
    save: Callable[[list[Result]], None] = lambda results: None,
) -> list[Result]:
    """Call every arm ``2 + repeats`` times, in turn; ``model`` decodes for all of them, without compilation.

    ``caches`` is a folder where every arm compiles with caches of its own, empty at first, so that none finds what
    another one or an earlier run compiled; None: with those there are. It must last as long as the arms.

    An arm that runs out of memory has failed, and the others go on.

    ``save`` gets all results so far after each arm's part of a round. Given back as ``earlier``, they are added to: the
    first calls are made again, since nothing compiled outlives a process, and the rounds that are missing.
    """
    arms = list(arms)
    device, stage_of = model.device, stages_of_weights(model.model)
    before = {result.name: result for result in earlier}
    results = [before.get(arm.name) or Result(arm.name, arm.retain_ratio) for arm in arms]
    # Every arm compiles the same functions for itself, and Dynamo counts them together.
    with torch.inference_mode(), torch._dynamo.config.patch(recompile_limit=256):
        for arm, result in zip(arms, results, strict=True):
            progress(f"{arm.name}: first call")
            with _empty_caches(caches):
                result.failure = attempt(partial(_warm_up, arm, result, device))
            save(results)
        for number in range(repeats):
            for arm, result in zip(arms, results, strict=True):
                if result.failure is None and result.rounds <= number:
                    progress(f"round {number + 1} of {repeats}: {arm.name}")
                    result.failure = attempt(partial(_measure_once, model, arm, result, decode_tokens, stage_of))
                    save(results)
    return results


def _empty_caches(folder: str | None) -> AbstractContextManager[None]:
    # The files stay until all is measured: what was compiled may read them later.
    return nullcontext() if folder is None else fresh_cache(dir=folder, delete=False)


def _warm_up(arm: Arm, result: Result, device: torch.device) -> None:
    """The first two calls. Their caches go with this function: nobody else's memory should have them in it."""
    compiled = compile_seconds()
    result.cold = timed(arm.first_token, device)[0]
    graphs = _graphs()
    _, (token, cache) = timed(arm.first_token, device)
    result.recompiles = _graphs() - graphs
    result.compilation = compile_seconds() - compiled
    result.rows, result.beside, result.cache_tokens = len(token), arm.beside, cache.get_seq_length()
    result.layer_tokens = [_positions(layer, result.cache_tokens) for layer in getattr(cache, "layers", ())]
    if arm.compresses:
        report = earlytom_compile.report(arm.model).to_dict()
        kept = [video["tokens"][1] for video in report["videos"]]
        if result.cache_tokens != arm.beside + max(kept, default=0):
            return  # this call kept all tokens; what is told is of another arm, which has the same weights
        result.frames = [video["frames"] for video in report["videos"]]
        result.kept = kept
        result.merge_layers = report["merge_layers"]
        counts = patches_of(report)
        result.patches = [[each.every, each.total, each.distinct or len(each.by_frame)] for each in counts]
        result.full_layers = report["full_layers"]


def _positions(layer: Any, prompt: int) -> int:
    """Of a layer's cache; one with linear attention keeps a state of all of the prompt."""
    return layer.get_seq_length() if hasattr(layer, "get_seq_length") else prompt


def _measure_once(model: Any, arm: Arm, result: Result, decode_tokens: int, stage_of: dict[int, str]) -> None:
    device, before = model.device, _graphs()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    watch = Stopwatch(device)
    with stage_marks(arm, stage_of, watch.mark):
        watch.start(VISION)
        first = arm.first_token()
        seconds = watch.stop()
    if on_gpu:
        result.peak_memory = max(result.peak_memory or 0, torch.cuda.max_memory_allocated(device))
    result.recompiles += _graphs() - before
    if decode_tokens:
        decoding, _ = timed(lambda: decode(model, first, decode_tokens), device)
        result.decode.append(decoding / decode_tokens)
    if watch.told({TOKENS, LLM}):  # else the stages were launched as one
        result.encoder.append(watch.seconds_of(VISION))
    result.ttft.append(seconds)  # last, so that whoever stops the program leaves no half of a round


def decode(model: Any, first: First, tokens: int) -> Tensor:
    """Greedy tokens [R, 1 + tokens] behind the first, with the model's own code."""
    token, cache = first
    said, name = [token], cache_name(model.forward)
    for _ in range(tokens):
        position = torch.full((len(token), 1), cache.get_seq_length(), device=token.device)
        logits = model(input_ids=said[-1], position_ids=position, **{name: cache}).logits
        said.append(logits[:, -1:].argmax(-1))
    return torch.cat(said, dim=1)


class Stopwatch:
    """Seconds of a call and of its stages, from CUDA events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []

    def start(self, stage: str = "") -> None:
        """Begin anew, with ``stage``, once the device has nothing to do."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._marks = []
        self.mark(stage)

    def mark(self, stage: str) -> None:
        """Another stage begins."""
        self._marks.append((stage, self._now()))

    def stop(self) -> float:
        """Seconds since the start."""
        self.mark("")
        end = self._marks[-1][1]
        if self._device.type == "cuda":
            end.synchronize()
        return self._between(self._marks[0][1], end)

    def told(self, stages: set[str]) -> bool:
        """Whether all of ``stages`` were seen to begin."""
        return stages <= {stage for stage, _ in self._marks}

    def seconds_of(self, stage: str) -> float:
        """All parts of it, each until the next mark; once it is stopped."""
        parts = pairwise(self._marks)
        return sum(self._between(begin, end) for (name, begin), (_, end) in parts if name == stage)

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1e3 if self._device.type == "cuda" else end - begin


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """(seconds, result) of one call."""
    watch = Stopwatch(device)
    watch.start()
    result = call()
    return watch.stop(), result


def speeds(results: Sequence[Result], against: str) -> dict[str, float]:
    """How many times faster than the arm called ``against`` each one's median is; nothing if there is none.

    Arms that failed, or that were not timed yet, are left out.
    """
    medians = {result.name: result.median for result in results if not result.failure and result.ttft}
    return {name: medians[against] / median for name, median in medians.items()} if against in medians else {}


def compile_seconds() -> float:
    """What Dynamo and its backends have taken in this process so far."""
    return torch._dynamo.utils.calculate_time_spent()["total_wall_time"]


def _graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
