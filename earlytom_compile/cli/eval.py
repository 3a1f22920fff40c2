"""``earlytom eval``: what compression costs in answers; with ``--toy``, on a small model that really answers.

Draw the videos of a split -> ask about each, with all tokens and with what each method leaves -> table.

``--tasks``, a checkpoint of one's own and benchmarks of lmms-eval, is in :mod:`.eval_tasks`; ``--fidelity``, features
of a vision encoder without any question, in :mod:`.eval_fidelity`.
"""

import argparse
import functools
import json
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from ..benchmarks.environment import environment
from ..benchmarks.forecast import compilation, in_words
from ..config import bad_option
from ..errors import EarlyTomConfigError
from ..words import counted
from . import eval_fidelity, eval_tasks
from .loading import open_checkpoint, progress_bars, require_layers
from .options import read_settings
from .outputs import output_console, write_text
from .resume import check_resume, saved_content, stopped

_FILE_WIDTH = 160  # columns, where nobody watches
_NOT_OF_METHODS = ("preset", "lowering", "mode", "compile_llm", "static_selection", "strict")
"""Options of ``compile()``, which the toy world's methods do without: they are plain PyTorch."""
_KINDS = ("toy", "tasks", "fidelity")
_NOT_WITH_ALL: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("methods", "videos", "split", "first", "try_", "encoded", "noise"), ("toy",)),
    **dict.fromkeys(("batch_size", "limit", "include_path", "model_args", *_NOT_OF_METHODS), ("tasks",)),
    **dict.fromkeys(eval_fidelity.OPTIONS, ("fidelity",)),
    **dict.fromkeys(("frames", "dtype"), ("tasks", "fidelity")),
    **dict.fromkeys(("retain_ratios", "variant"), ("toy", "tasks")),
    "plot": ("toy", "fidelity"),
}
"""Options that mean nothing to some kinds of evaluation, and the kinds to which they mean something."""
_PIECE = 20  # videos that are timed to say how long all take


def execute(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Evaluate what is asked for; print and write what came out."""
    _check(arguments)
    if arguments.fidelity:
        eval_fidelity.execute(arguments, options)
    elif arguments.tasks:
        eval_tasks.execute(arguments, options)
    else:
        not_here = (*_NOT_OF_METHODS, "variant")  # which says what rows there are
        _execute_toy(arguments, {name: value for name, value in options.items() if name not in not_here})


def _execute_toy(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Every method at every ratio."""
    try:
        from ..toyworld import evaluate, report
        from ..toyworld.model import WEIGHTS
    except ImportError as error:
        raise EarlyTomConfigError(f"{error}: pip install '.[toy]' in the repository brings what it needs.") from error
    progress_on, console = Console(stderr=True), output_console(arguments, width=_FILE_WIDTH)
    settings = [read_settings(text) for text in arguments.try_]
    arms = evaluate.arms(arguments.retain_ratios, _methods(arguments), settings)
    _refuse_what_does_nothing(arguments, options, arms)
    name = str(arguments.model or WEIGHTS)
    checkpoint = open_checkpoint(name, device=arguments.device)
    for arm in arms:
        require_layers(checkpoint.config, evaluate.options_of(arm, options))
    about = {**environment(checkpoint.device), **_asked(arguments, options)}
    saved = saved_content(arguments, about, progress_on)
    known = {row.arm: row for row in map(evaluate.Result.from_dict, saved.get("results", ()))}
    model: Any = checkpoint.load(progress_on).model
    results: list[Any] = []

    def write(last: bool = False) -> None:
        if arguments.json and (last or arguments.json != "-"):
            # What the file has from before stays in it, whatever this run comes to.
            done = {row.arm for row in results}
            rows = [*results, *(row for arm, row in known.items() if arm not in done)]
            write_text(arguments.json, json.dumps(report.to_dict(rows, questions, about), indent=2) + "\n")

    try:
        with progress_bars(progress_on) as progress:
            task = progress.add_task("drawing videos", total=arguments.videos)
            questions = evaluate.load_questions(
                arguments.split,
                arguments.first,
                arguments.videos,
                lambda: progress.advance(task),
                encoded=arguments.encoded,
                noise=arguments.noise,
            )
            progress.add_task(f"timing {_PIECE} videos", total=None)
            _say_how_long(model, questions, [arm for arm in arms if arm not in known], progress_on)
            for arm in arms:
                if arm in known:
                    results.append(known[arm])
                    continue
                ratio = "" if arm.retain_ratio is None else f", {arm.retain_ratio:.0%}"
                task = progress.add_task(report.label(arm) + ratio, total=arguments.videos)
                answered = functools.partial(progress.advance, task)
                results.append(evaluate.evaluate(model, questions, arm, options, answered))
                write()
    except KeyboardInterrupt:
        rows = f"{len(results)} of {counted(len(arms), 'row')}" if results else ""
        raise stopped(arguments, rows) from None
    console.print(report.table(results, questions))
    write(last=True)
    if arguments.markdown:
        write_text(arguments.markdown, report.to_markdown(results, questions, about))
    if arguments.plot:
        for path in report.write_plots(results, Path(arguments.plot)):
            console.print(f"wrote {path}")


def _asked(arguments: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    """What an answer depends on beside the machine and the row."""
    return {
        "split": arguments.split,
        "first video": arguments.first,
        "videos": arguments.videos,
        "encoded": arguments.encoded,
        "noise": arguments.noise,
        "model": arguments.model or "the one that comes along",
        "options": options,
    }


def _say_how_long(model: Any, questions: Any, arms: list[Any], progress_on: Console) -> None:
    """A few videos are asked about with all tokens, which costs about what other rows do."""
    from ..toyworld import evaluate

    few = questions.first(_PIECE)
    everything = evaluate.Arm(evaluate.ALL_TOKENS)
    evaluate.evaluate(model, questions.first(1), everything)  # the first call is no measure
    start = time.perf_counter()
    evaluate.evaluate(model, few, everything)
    row = (time.perf_counter() - start) / len(few.asked) * len(questions.asked)
    layers = model.config.vision_config.num_hidden_layers
    compiled = sum(arm.method in evaluate.INSTALLED for arm in arms)
    seconds = row * len(arms) + compiled * compilation("earlytom", layers, "eager")
    progress_on.print(
        f"{counted(len(arms), 'row')}, {counted(len(questions.asked), 'video')}: {in_words(seconds)} (measured with "
        f"{len(few.asked)} of them)",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _check(arguments: argparse.Namespace) -> None:
    chosen = [kind for kind in _KINDS if getattr(arguments, kind)]
    if len(chosen) != 1:
        raise EarlyTomConfigError(
            "give one of --toy (the toy world that comes along), --tasks (benchmarks of lmms-eval, with --model) and "
            "--fidelity (features of a vision encoder)."
        )
    if arguments.video and not arguments.fidelity:
        raise EarlyTomConfigError(
            f"video={arguments.video[0]!r}: right answers are known for the videos that eval draws or a benchmark has. "
            "What compression changes in answers about your own, earlytom run --compare shows for one and earlytom "
            "compare for many; what it changes in features of them, earlytom eval --fidelity."
        )
    for name, kinds in _NOT_WITH_ALL.items():
        if name in arguments.given and chosen[0] not in kinds:
            them = " and ".join(f"--{kind}" for kind in kinds)
            raise EarlyTomConfigError(f"{name}={getattr(arguments, name)!r}: that goes with {them}; leave it out.")
    wrong = [ratio for ratio in arguments.retain_ratios if not 0 < ratio <= 1]
    if wrong:
        raise EarlyTomConfigError(f"retain_ratios: {wrong[0]} must be in (0, 1].")
    if arguments.toy:
        _check_toy(arguments)
    check_resume(arguments)


def _check_toy(arguments: argparse.Namespace) -> None:
    if arguments.videos < 1 or arguments.first < 0:
        raise EarlyTomConfigError(
            f"videos={arguments.videos}, first={arguments.first}: at least 1 video, counted from 0."
        )
    if not 0 <= arguments.noise < math.inf:
        raise bad_option("noise", arguments.noise, "a number that is not negative, such as 0.05")
    if "variant" in arguments.given and arguments.methods:
        raise EarlyTomConfigError(
            f"variant={arguments.variant!r} with --methods: give one, such as --methods 'earlytom {arguments.variant}'."
        )


def _methods(arguments: argparse.Namespace) -> tuple[str, ...] | None:
    return (f"earlytom {arguments.variant}",) if "variant" in arguments.given else arguments.methods


def _refuse_what_does_nothing(arguments: argparse.Namespace, options: dict[str, Any], arms: list[Any]) -> None:
    """Raise :class:`EarlyTomConfigError` for options that no chosen method takes."""
    from ..toyworld.methods import taken

    names = ", ".join(dict.fromkeys(arm.method for arm in arms))
    if "retain_ratios" in arguments.given and all(arm.retain_ratio is None for arm in arms):
        raise EarlyTomConfigError(f"retain_ratios: none of these has a ratio: {names}.")
    for option in options:
        if not any(option in taken(arm.method, options) for arm in arms):
            raise EarlyTomConfigError(f"{option}={options[option]!r}: none of these takes it: {names}.")
