"""Requests a second and waiting times when several clients ask at once: a closed loop over one queue.

    clients   each sends its next request the moment its last one is answered
    queue     first come, first served
    worker    answers up to ``max_batch`` requests at a time, in one batched generate()

    3 clients, batches of 2:   queue a b c -> answers a b -> queue c a b -> answers c a -> queue b c a -> ...

Clients and worker are no threads. Clients only wait, so who is in which batch follows from the order of the queue and
not from times: all models answer the same batches, in every round, and no time goes into switching threads.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from transformers.generation.streamers import BaseStreamer

import earlytom_compile
from earlytom_compile.benchmarks.arms import twin_of
from earlytom_compile.benchmarks.failures import attempt
from earlytom_compile.benchmarks.workload import Inputs, make_inputs
from earlytom_compile.families.registry import family_of
from earlytom_compile.integrations.prefill import CompiledPrefill
from earlytom_compile.reused import patches_of, share_computed

REQUESTS_EACH = 2
"""Requests of one client in a round."""
PERCENTILES = (50, 90, 99)
_PADDING = 0  # masked, so which token it is does not matter

Clock = Callable[[], float]
Answer = list[int]
"""New tokens of one request."""


@dataclass(frozen=True)
class Request:
    """The ``number``-th request of a client, in the queue since ``arrived`` (seconds of the clock)."""

    client: int
    number: int
    arrived: float


Serve = Callable[[Sequence[Request]], tuple[float, Sequence[Answer]]]
"""Answers a batch: the time at which its first tokens were there, and an answer for each request."""


@dataclass(frozen=True)
class Answered:
    """A request with its answer, and when the first and the last token of that were there."""

    request: Request
    answer: Answer
    first_token: float
    done: float
    batch: int  # requests answered in the same call

    @property
    def ttft(self) -> float:
        """Seconds from entering the queue to the first token."""
        return self.first_token - self.request.arrived

    @property
    def latency(self) -> float:
        """Seconds from entering the queue to the whole answer."""
        return self.done - self.request.arrived


def closed_loop(serve: Serve, *, clients: int, each: int, max_batch: int, clock: Clock) -> list[Answered]:
    """``each`` requests of every client, in the order of their answers.

    What ``serve`` raises comes out as it is, with a note about which requests it was to answer.
    """
    start = clock()
    queue = deque(Request(client, 0, start) for client in range(clients))
    answered: list[Answered] = []
    while queue:
        batch = [queue.popleft() for _ in range(min(max_batch, len(queue)))]
        try:
            first_token, answers = serve(batch)
        except Exception as error:
            error.add_note(
                f"while answering {len(batch)} requests in one call, {len(answered)} of {clients * each} "
                f"requests of {clients} clients already answered"
            )
            raise
        done = clock()
        for request, answer in zip(batch, answers, strict=True):
            answered.append(Answered(request, answer, first_token, done, len(batch)))
            if request.number + 1 < each:
                queue.append(Request(request.client, request.number + 1, done))
    return answered


@dataclass(frozen=True)
class Server:
    """A model that answers batches; ``model`` is what the report of its last call belongs to, if it compresses."""

    name: str
    generate: Callable[..., torch.Tensor]
    retain_ratio: float = 1.0
    model: Any = None

    def answer(self, prompts: Sequence[Inputs], new_tokens: int, clock: Clock) -> tuple[float, list[Answer]]:
        """(time of the first tokens, ``new_tokens`` greedy tokens for each prompt), in one call."""
        inputs, streamer = left_padded(prompts), _FirstTokens(clock)
        output = self.generate(
            **inputs,
            streamer=streamer,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=_PADDING,
        )
        answers = output[:, inputs["input_ids"].shape[1] :].tolist()  # waits for the device
        assert streamer.arrived is not None
        return streamer.arrived, answers


class _FirstTokens(BaseStreamer):
    """Remembers when the first tokens were on the host; transformers hands over the prompt before them."""

    def __init__(self, clock: Clock) -> None:
        self.arrived: float | None = None
        self._clock = clock
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """The prompts [R, S], then one token of every row at a time [R]."""
        if self._prompt_seen and self.arrived is None:
            self.arrived = self._clock()
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is left to be done."""


def make_servers(model: Any, ratios: Sequence[float], options: dict[str, Any]) -> Iterator[Server]:
    """All tokens as transformers runs them and compiled, then EarlyTom at each ratio; all share their weights.

    Of the compiled ones, Inductor compiles the vision encoder and the language model's pass over the prompt: what
    differs between them is the compression. All get the same ``mode``. Nothing is compiled before the first call.
    """
    yield Server("transformers", model.generate)
    yield Server("inductor", _compiled_generate(model, options.get("mode")))
    for ratio in ratios:
        twin: Any = earlytom_compile.compile(twin_of(model), **{**options, "retain_ratio": ratio})
        yield Server(f"earlytom {ratio:g}", twin.generate, ratio, twin)


def server_names(ratios: Sequence[float]) -> list[str]:
    """Names of :func:`make_servers`, before there is a model."""
    return ["transformers", "inductor", *(f"earlytom {ratio:g}" for ratio in ratios)]


def _compiled_generate(model: Any, mode: str | None) -> Callable[..., torch.Tensor]:
    twin = twin_of(model)
    # Each batch size gets code of its own: the fastest it can be, and there are few.
    family_of(twin).vision_tower(twin).compile(dynamic=False, mode=mode)
    prefill = CompiledPrefill(twin.model.language_model, mode=mode)

    def generate(**inputs: Any) -> torch.Tensor:
        with prefill.active(inputs["attention_mask"]):
            return twin.generate(**inputs)

    return generate


def make_prompts(model: Any, clients: int, *, frames: int, prompt_length: int, **look: Any) -> list[Inputs]:
    """A video and a prompt for each client, on the model's device, which it sends with every request.

    Prompts have from half of ``prompt_length`` to all of it in words, different ones for neighbours; ``look`` is what
    else :func:`make_inputs` takes for videos.
    """
    lengths = (prompt_length - client % (prompt_length // 2 + 1) for client in range(clients))
    return [
        make_inputs(model, frames=frames, prompt_length=length, seed=client, **look)
        for client, length in enumerate(lengths)
    ]


def left_padded(prompts: Sequence[Inputs]) -> Inputs:
    """One batch of single-row inputs."""
    length = max(prompt["input_ids"].shape[1] for prompt in prompts)

    def rows(name: str, value: int) -> torch.Tensor:
        return torch.cat([pad(prompt[name], (length - prompt[name].shape[1], 0), value=value) for prompt in prompts])

    padding = {"input_ids": _PADDING, "attention_mask": 0, "mm_token_type_ids": 0}
    return {
        name: rows(name, padding[name]) if name in padding else torch.cat([prompt[name] for prompt in prompts])
        for name in prompts[0]
    }


@dataclass
class LoadResult:
    """What was measured of one server with ``concurrency`` clients; times in seconds."""

    name: str
    retain_ratio: float
    concurrency: int
    rounds: list[float] = field(default_factory=list)  # from the first request to the last answer
    ttft: list[float] = field(default_factory=list)  # of every request
    latency: list[float] = field(default_factory=list)  # of every request
    batches: list[int] = field(default_factory=list)  # of every request: how many were answered in the same call
    recompiles: int = 0  # graphs compiled after the first round
    frames: list[list[int]] = field(default_factory=list)  # of each video: at first, then after each merge layer
    computed: float | None = None  # share of the patches of a call's videos; None where none are reused
    failure: str | None = None

    @property
    def rates(self) -> list[float]:
        """Requests a second of every round."""
        return [self.concurrency * REQUESTS_EACH / seconds for seconds in self.rounds]

    @property
    def rate(self) -> float | None:
        """Requests a second in the median round; None after a failure."""
        return None if self.failure else statistics.median(self.rates)

    @property
    def batch(self) -> float:
        """Requests answered in one call, on average."""
        return len(self.batches) / sum(1 / size for size in self.batches)

    @property
    def retention(self) -> float | None:
        """Share of the frames left after the last merge layer, over all videos; None where none merge."""
        if not self.frames:
            return None
        return sum(video[-1] for video in self.frames) / sum(video[0] for video in self.frames)


def percentiles(seconds: Sequence[float]) -> list[float]:
    """Those of :data:`PERCENTILES`."""
    return np.percentile(seconds, PERCENTILES).tolist()


def measure_load(
    servers: Iterable[Server],
    prompts: Sequence[Inputs],
    *,
    max_batch: int,
    rounds: int,
    new_tokens: int,
    progress: Callable[[str], None] = lambda text: None,
    clock: Clock = time.perf_counter,
) -> list[LoadResult]:
    """One client for each of ``prompts``; the servers take turns, ``1 + rounds`` times, and the first does not count.

    A server that runs out of memory has failed, and the others go on.
    """
    servers = list(servers)
    results = [LoadResult(server.name, server.retain_ratio, len(prompts)) for server in servers]
    # Every server compiles the same functions for itself, and Dynamo counts them together.
    with torch.inference_mode(), torch._dynamo.config.patch(recompile_limit=256):
        for number in range(1 + rounds):
            for server, result in zip(servers, results, strict=True):
                if result.failure is None:
                    what = f"round {number} of {rounds}" if number else "warm-up"
                    progress(f"{len(prompts)} clients, {what}: {server.name}")
                    result.failure = _round(server, prompts, max_batch, new_tokens, clock, result, warm_up=not number)
    return results


def _round(
    server: Server,
    prompts: Sequence[Inputs],
    max_batch: int,
    new_tokens: int,
    clock: Clock,
    result: LoadResult,
    warm_up: bool,
) -> str | None:
    """Add one round to ``result``, or tell why there was no memory for it."""

    def serve(batch: Sequence[Request]) -> tuple[float, Sequence[Answer]]:
        served = server.answer([prompts[request.client] for request in batch], new_tokens, clock)
        if warm_up and server.model is not None:
            report = earlytom_compile.report(server.model).to_dict()
            result.frames += [video["frames"] for video in report["videos"]]
            result.computed = share_computed(patches_of(report))
        return served

    graphs, start, answered = _graphs(), clock(), list[Answered]()
    sizes = {"clients": len(prompts), "each": REQUESTS_EACH, "max_batch": max_batch}
    try:
        failure = attempt(lambda: answered.extend(closed_loop(serve, **sizes, clock=clock)))
    except Exception as error:
        error.add_note(f"in the load benchmark of {server.name}")
        raise
    if failure is None and not warm_up:
        result.rounds.append(answered[-1].done - start)
        result.ttft += [answer.ttft for answer in answered]
        result.latency += [answer.latency for answer in answered]
        result.batches += [answer.batch for answer in answered]
        result.recompiles += _graphs() - graphs
    return failure


def _graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
