"""``vllm serve`` under load, with all video tokens and with fewer: requests a second and waiting times.

    python -m earlytom_compile.benchmarks.serving_load --clients 1,8,32 --rounds 2
    python -m earlytom_compile.benchmarks.serving_load --model path/or/hub-id --frames 32 -- --max-model-len 16384

One server at a time: full, compressed, full, compressed, ... Each is started as docs/serving.md says, warmed up, and
asked by ``vllm bench serve``: so many clients at once, each of which sends its next request when its last one is
answered. Both servers get the same requests in the same order. Each request has a video file of its own, and a server
sees it once: decoding and all else that serving takes is part of the times, and nothing comes out of a cache.

What stands behind ``--`` goes to both servers. Exit code 1: with some number of clients the compressed one answered
fewer requests a second, or its median first token came later.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from earlytom_compile.benchmarks import markdown
from earlytom_compile.benchmarks.environment import environment
from earlytom_compile.benchmarks.load import PERCENTILES, percentiles
from earlytom_compile.benchmarks.serving_workload import QUESTION, write_checkpoint, write_requests
from earlytom_compile.benchmarks.vllm_server import VllmServer, vllm_command
from earlytom_compile.errors import EarlyTomConfigError, EarlyTomError
from earlytom_compile.integrations.vllm import vllm_version
from earlytom_compile.integrations.vllm.options import of_server
from earlytom_compile.words import counted

FULL, COMPRESSED = "full", "compressed"
WARM_UP = 8
"""Requests before those that count: one alone, then the others at once."""
LONGEST_S = 7200
"""Seconds that the requests of one number of clients may take."""
_HEADINGS = ("clients", "server", "prompt tokens", "requests/s", "range", "speed", "TTFT p50/p90/p99 ms")


@dataclass
class Served:
    """What one kind of server did for ``clients`` clients; seconds."""

    server: str
    clients: int
    requests: int  # in a round
    prompt_tokens: int = 0  # of a request, as the server counts them
    rounds: list[float] = field(default_factory=list)  # from the first request to the last answer
    ttft: list[float] = field(default_factory=list)  # of every request

    @property
    def rates(self) -> list[float]:
        """Requests a second of every round."""
        return [self.requests / seconds for seconds in self.rounds]

    @property
    def rate(self) -> float:
        """Requests a second in the median round."""
        return statistics.median(self.rates)


@dataclass(frozen=True)
class Requests:
    """Those of one number of clients."""

    clients: int
    file: Path
    count: int


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    model: str
    options: dict[str, Any]
    frames: int
    new_tokens: int
    rounds: int
    flags: tuple[str, ...]  # of both servers
    folder: Path  # of videos, requests and logs
    warm_up: list[Path]
    levels: list[Requests]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and say whether anything was lost."""
    given, flags = _parsed(list(sys.argv[1:] if arguments is None else arguments))
    with tempfile.TemporaryDirectory() as folder:
        try:
            plan = _plan(given, flags, Path(folder))
            results = measure(plan)
        except EarlyTomError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    about = {
        **environment(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "vllm": vllm_version(),
    }
    title = (
        f"{given.model or given.shape}, videos of {plan.frames} sampled frames, {plan.new_tokens} new tokens, "
        f"{json.dumps(plan.options)}, {counted(plan.rounds, 'round')}"
    )
    text = "\n".join([*markdown.heading(about), *markdown.table(title, _HEADINGS, rows(results))])
    lost = losses(results)
    print(text)
    print(f"compression loses with {', '.join(map(str, lost))} clients" if lost else "compression gains at every load")
    if given.markdown:
        given.markdown.write_text(text, encoding="utf-8")
    if given.json:
        content = {**about, "percentiles": PERCENTILES, "results": [dataclasses.asdict(each) for each in results]}
        given.json.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return int(bool(lost))


def _parsed(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and the flags for the servers behind ``--``."""
    own = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", metavar="PATH_OR_HUB_ID", help="instead of random weights")
    parser.add_argument("--shape", default="cpu-small", metavar="NAME", help="of random weights (%(default)s)")
    parser.add_argument("--options", default='{"retain_ratio": 0.1}', metavar="JSON", help="(%(default)s)")
    parser.add_argument("--frames", type=int, default=16, help="sampled of each video (%(default)s)")
    parser.add_argument("--clients", default="1,8,32", help="at once, comma-separated (%(default)s)")
    parser.add_argument("--requests", type=int, default=16, help="in a round; at least two a client (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="of both servers in turn (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=8, help="of each answer (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    return parser.parse_args(arguments[:own]), arguments[own + 1 :]


def _plan(given: argparse.Namespace, flags: list[str], folder: Path) -> Plan:
    """With its model and requests written to ``folder``."""
    try:
        options = json.loads(given.options)
        clients = [int(each) for each in given.clients.split(",")]
    except ValueError as error:
        raise EarlyTomConfigError(f"--options is JSON and --clients numbers with commas between: {error}") from None
    of_server({"earlytom": options})
    random = () if given.model else ("--dtype", "float32", "--max-model-len", "4096")
    model = given.model or str(write_checkpoint(given.shape, folder / "model"))
    videos, first, levels = folder / "videos", WARM_UP, []
    warm_up = write_requests(folder / "warm-up.json", videos=videos, first=0, count=WARM_UP, frames=given.frames)
    for number in clients:
        file, count = folder / f"{number}.json", max(given.requests, 2 * number)
        write_requests(file, videos=videos, first=first, count=count, frames=given.frames)
        levels.append(Requests(number, file, count))
        first += count
    always = (
        *("--limit-mm-per-prompt", '{"video": 1, "image": 0}'),
        *("--media-io-kwargs", json.dumps({"video": {"num_frames": given.frames}})),
        *("--allowed-local-media-path", str(folder)),
    )
    return Plan(
        model=model,
        options=options,
        frames=given.frames,
        new_tokens=given.new_tokens,
        rounds=given.rounds,
        flags=(*random, *always, *flags),
        folder=folder,
        warm_up=warm_up,
        levels=levels,
    )


def measure(plan: Plan) -> list[Served]:
    """Servers in turn; by clients, then full before compressed.

    Raises :class:`EarlyTomError` with the end of the log where a server does not start, and where a request fails."""
    results = [Served(server, level.clients, level.count) for level in plan.levels for server in (FULL, COMPRESSED)]
    for number in range(plan.rounds):
        for server, flags in (
            (FULL, ()),
            (COMPRESSED, ("--mm-processor-kwargs", json.dumps({"earlytom": plan.options}))),
        ):
            _say(f"round {number + 1} of {plan.rounds}, {server}: starting the server")
            log = plan.folder / f"{server}-{number}.log"
            with VllmServer(plan.model, *plan.flags, *flags, log=log) as running:
                tokens = _warm_up(running, plan)
                for level, result in zip(plan.levels, [each for each in results if each.server == server], strict=True):
                    _say(f"round {number + 1} of {plan.rounds}, {server}: {level.clients} clients")
                    result.prompt_tokens = tokens
                    _add(result, _benchmark(running, plan, level))
    return results


def _warm_up(server: VllmServer, plan: Plan) -> int:
    """What is compiled or measured at first use is not part of any time. Returns the tokens of a prompt."""

    def ask(video: Path) -> int:
        content = [{"type": "video_url", "video_url": {"url": f"file://{video}"}}, {"type": "text", "text": QUESTION}]
        body = {"model": plan.model, "messages": [{"role": "user", "content": content}], "max_tokens": plan.new_tokens}
        request = urllib.request.Request(
            f"{server.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=LONGEST_S) as answer:
            return int(json.load(answer)["usage"]["prompt_tokens"])

    tokens = ask(plan.warm_up[0])
    with ThreadPoolExecutor(len(plan.warm_up)) as clients:
        list(clients.map(ask, plan.warm_up[1:]))
    return tokens


def _benchmark(server: VllmServer, plan: Plan, level: Requests) -> dict[str, Any]:
    """What ``vllm bench serve`` writes."""
    command = vllm_command(
        *("bench", "serve", "--backend", "openai-chat", "--base-url", server.url, "--endpoint", "/v1/chat/completions"),
        *("--model", plan.model, "--dataset-name", "sharegpt", "--dataset-path", str(level.file), "--disable-shuffle"),
        *("--num-prompts", str(level.count), "--max-concurrency", str(level.clients)),
        *("--sharegpt-output-len", str(plan.new_tokens), "--ignore-eos", "--disable-tqdm"),
        *("--save-result", "--save-detailed", "--result-dir", str(plan.folder), "--result-filename", "result.json"),
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_S, check=False)
    if done.returncode:
        raise EarlyTomError(f"vllm bench serve failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads((plan.folder / "result.json").read_text(encoding="utf-8"))
    if failed := [error for error in result["errors"] if error]:
        raise EarlyTomError(f"{len(failed)} of {level.count} requests failed, such as by\n{failed[0][-2000:]}")
    return result


def _add(result: Served, measured: dict[str, Any]) -> None:
    if measured["completed"] != result.requests:
        raise EarlyTomError(f"{measured['completed']} of {result.requests} requests were answered.")
    result.rounds.append(measured["duration"])
    result.ttft += measured["ttfts"]


def rows(results: Sequence[Served]) -> Iterator[tuple[str, ...]]:
    """Cells of the table, full before compressed for each number of clients."""
    full = {result.clients: result.rate for result in results if result.server == FULL}
    for result in results:
        yield (
            str(result.clients),
            result.server,
            str(result.prompt_tokens),
            f"{result.rate:.3g}",
            f"{min(result.rates):.3g} to {max(result.rates):.3g}",
            f"{result.rate / full[result.clients]:.2f}x",
            " / ".join(f"{1e3 * seconds:.0f}" for seconds in percentiles(result.ttft)),
        )


def losses(results: Sequence[Served]) -> list[int]:
    """Numbers of clients at which compression answers fewer requests a second or has the later median first token."""
    full = {result.clients: result for result in results if result.server == FULL}
    return [
        result.clients
        for result in results
        if result.rate < full[result.clients].rate
        or statistics.median(result.ttft) > statistics.median(full[result.clients].ttft)
    ]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
