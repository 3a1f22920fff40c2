"""``earlytom eval --toy``: what compression costs in answers, on a small model that really answers.

Draw the videos of a split -> ask about each, with all tokens and with what each method leaves -> table.
"""

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console

from ..benchmarks.environment import environment
from ..errors import EarlyTomConfigError
from .loading import load_checkpoint, progress_bars
from .outputs import check_outputs

_FILE_WIDTH = 130  # columns, where nobody watches


def execute(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Evaluate every method at every ratio; print and write what came out."""
    _check(arguments)
    try:
        from ..toyworld import evaluate, report
        from ..toyworld.model import WEIGHTS
    except ImportError as error:
        raise EarlyTomConfigError(f"{error}: pip install '.[toy]' in the repository brings what it needs.") from error
    transformers.utils.logging.disable_progress_bar()
    progress_on, console = Console(stderr=True), Console(highlight=False)
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH, highlight=False)
    model: Any = load_checkpoint(str(arguments.model or WEIGHTS), device=arguments.device).model
    arms = evaluate.arms(arguments.retain_ratios)
    results = []
    with progress_bars(progress_on) as progress:
        task = progress.add_task("drawing videos", total=arguments.videos)
        questions = evaluate.load_questions(
            arguments.split, arguments.first, arguments.videos, lambda: progress.advance(task)
        )
        for name, ratio in arms:
            task = progress.add_task(name if ratio is None else f"{name}, {ratio:.0%}", total=arguments.videos)
            answered = functools.partial(progress.advance, task)
            results.append(evaluate.evaluate(model, questions, name, ratio, options, answered))
    console.print(report.table(results, questions))
    about = {**environment(model.device), "split": arguments.split, "first video": arguments.first}
    if arguments.json:
        content = report.to_dict(results, questions, about)
        Path(arguments.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if arguments.markdown:
        Path(arguments.markdown).write_text(report.to_markdown(results, questions, about), encoding="utf-8")
    if arguments.plot:
        for path in report.write_plots(results, Path(arguments.plot)):
            console.print(f"wrote {path}")


def _check(arguments: argparse.Namespace) -> None:
    if not arguments.toy:
        raise EarlyTomConfigError("only the toy world can be evaluated so far: earlytom eval --toy.")
    if arguments.videos < 1 or arguments.first < 0:
        raise EarlyTomConfigError(
            f"videos={arguments.videos}, first={arguments.first}: at least 1 video, counted from 0."
        )
    wrong = [ratio for ratio in arguments.retain_ratios if not 0 < ratio <= 1]
    if wrong:
        raise EarlyTomConfigError(f"retain_ratios: {wrong[0]} must be in (0, 1].")
    check_outputs(arguments)
