"""``earlytom bench --concurrency 1,8,32``: the same models with several clients at once, in place of single calls."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..benchmarks.arms import choose
from ..benchmarks.forecast import forecast_of_load, measured_piece, told
from ..benchmarks.load import REQUESTS_EACH, Server, make_prompts, make_servers, measure_load
from ..benchmarks.load_results import Load, load_table, load_to_dict, load_to_markdown, write_load_plots
from ..benchmarks.workload import Inputs
from ..errors import EarlyTomConfigError
from ..words import counted
from .bench_session import Session
from .outputs import write_text
from .resume import stopped


def check_load(arguments: argparse.Namespace) -> None:
    """Raise :class:`EarlyTomConfigError` for what cannot be measured."""
    if min(arguments.concurrency) < 1:
        raise EarlyTomConfigError(f"concurrency={min(arguments.concurrency)}: must be at least 1 client.")
    if arguments.max_batch < 1:
        raise EarlyTomConfigError(f"max_batch={arguments.max_batch}: must be at least 1.")
    if arguments.batch != 1:
        raise EarlyTomConfigError(
            f"batch={arguments.batch} with --concurrency: the queue makes the batches; limit them with --max-batch."
        )


def measure_loads(session: Session, frame_counts: Sequence[int]) -> None:
    """Measure every number of clients, print and write what came out; what was measured before is only shown."""
    arguments = session.arguments
    servers = choose(make_servers(session.model, arguments.retain_ratios, session.options), arguments.arms)
    known = {(load.frames, load.concurrency): load for load in map(Load.from_dict, session.saved.get("loads", ()))}
    loads: list[Load] = []
    plots: list[Path] = []
    cases = [(frames, clients) for frames in frame_counts for clients in dict.fromkeys(arguments.concurrency)]
    try:
        for frames, clients in cases:
            if clients == arguments.concurrency[0]:
                prompts = make_prompts(session.model, max(arguments.concurrency), frames=frames, **session.look(frames))
                if any(case not in known for case in cases if case[0] == frames):
                    _say_how_long(session, servers, prompts[0], frames)
            loads.append(known.get((frames, clients)) or _measure(session, servers, prompts[:clients], frames))
            session.console.print(load_table(loads[-1]))
            # What the file has from before stays in it, whatever this run comes to.
            others = [load for load in known.values() if load not in loads]
            session.write_json(lambda about: load_to_dict([*loads, *others], about), last=len(loads) == len(cases))  # noqa: B023
            plots = _write_documents(session, loads)
    except KeyboardInterrupt:
        raise stopped(arguments, counted(len(loads), "finished table") if loads else "") from None
    for plot in plots:
        session.console.print(f"wrote {plot}")


def _measure(session: Session, servers: Sequence[Server], prompts: Sequence[Inputs], frames: int) -> Load:
    """One client for each of ``prompts``."""
    arguments = session.arguments
    new_tokens = 1 + arguments.decode_tokens
    with session.bars(f"{len(prompts)} clients") as progress:
        results = measure_load(
            servers,
            prompts,
            max_batch=arguments.max_batch,
            rounds=arguments.repeats,
            new_tokens=new_tokens,
            progress=progress,
        )
    return Load(frames, arguments.prompt_length, new_tokens, arguments.max_batch, len(prompts), results)


def _say_how_long(session: Session, servers: Sequence[Server], prompt: Inputs, frames: int) -> None:
    with session.bars("one call to see how long all takes"):
        piece = measured_piece(session.model, prompt)
    if piece is None:
        return
    arguments = session.arguments
    forecast = forecast_of_load(
        [server.name for server in servers],
        piece,
        requests=REQUESTS_EACH * sum(arguments.concurrency),
        rounds=arguments.repeats,
        new_tokens=1 + arguments.decode_tokens,
        layers=session.layers,
        lowering=session.options.get("lowering", "staged"),
    )
    session.say(f"{frames} frames: {counted(len(servers), 'model')}, at most {told(forecast, piece)}")


def _write_documents(session: Session, loads: list[Load]) -> list[Path]:
    """What was asked for, over what was there; returns the plots."""
    arguments = session.arguments
    if arguments.markdown:
        write_text(arguments.markdown, load_to_markdown(loads, session.told()))
    return write_load_plots(loads, Path(arguments.plot)) if arguments.plot else []
