"""``earlytom eval --tasks``: Table 1 of the paper, for a checkpoint and any benchmarks of lmms-eval.

    earlytom eval --tasks mvbench,videomme --retain-ratios 0.25,0.1 --model path/or/hub-id --json table.json

    look at the tasks -> load the model once -> every task with all tokens, then with each ratio -> table

One task with one ratio is what is saved, and gone on with. The full model always runs, by the same command: public
accuracies of one model differ by points between versions of a harness, so no other number can stand beside these.
"""

import argparse
import datetime
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from ..benchmarks.environment import environment
from ..benchmarks.forecast import in_words
from ..errors import EarlyTomConfigError, EarlyTomError
from ..shapes import ModelShape
from ..words import counted
from .eval_model import Subject, look_at_checkpoint, read_model_args
from .eval_plan import Evaluation, plan, with_variant
from .eval_report import Cell, Report
from .eval_score import questions_of, score_of
from .harness import Harness, require_lmms_eval
from .outputs import STANDARD_OUTPUT, output_console, write_text
from .progress import step
from .resume import saved_content, stopped

_BEGUN = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
_FILE_WIDTH = 150  # columns, where nobody watches


def execute(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Evaluate everything that is not saved yet; print and write what came out."""
    _check(arguments)
    _refuse_to_overwrite(arguments)
    version = require_lmms_eval()
    progress_on, console = Console(stderr=True), output_console(arguments, width=_FILE_WIDTH)
    options = with_variant(arguments.tasks, arguments.retain_ratios, options)
    subject = look_at_checkpoint(arguments.model, device=arguments.device, dtype=arguments.dtype, options=options)
    evaluations = plan(arguments.tasks, arguments.retain_ratios, options, half_billion=subject.half_billion)
    about = {**environment(subject.device), "lmms-eval": version, **_asked(arguments, options)}
    cells = _Cells(arguments, about, subject.shape, saved_content(arguments, about, progress_on))
    to_do = [evaluation for evaluation in evaluations if evaluation.key not in cells.known]
    try:
        if to_do:
            _evaluate(arguments, subject, to_do, cells, progress_on)
    except KeyboardInterrupt:
        done = len(evaluations) - sum(evaluation.key not in cells.known for evaluation in evaluations)
        raise stopped(arguments, f"{done} of {counted(len(evaluations), 'evaluation')}" if done else "") from None
    report = cells.report(evaluations)
    for table in report.tables():
        console.print(table)
    cells.write(last=True)
    if arguments.markdown:
        write_text(arguments.markdown, report.to_markdown(about))


def load_model(arguments: argparse.Namespace, subject: Subject, own: dict[str, Any]) -> Any:
    """The plugin's model of lmms-eval, whose compression :meth:`use` changes; ``own``: what only its kind takes."""
    return subject.load(batch_size=str(arguments.batch_size), max_frames_num=arguments.frames, **own)


class _Cells:
    """What is evaluated, saved as soon as there is more of it."""

    def __init__(
        self, arguments: argparse.Namespace, about: dict[str, Any], shape: ModelShape | None, saved: dict[str, Any]
    ) -> None:
        self._file = arguments.json
        self._about = about
        self._shape = shape
        self._limit = arguments.limit
        found = map(Cell.from_dict, saved.get("evaluations", ()))
        self.known: dict[tuple[str, float | None], Cell] = {cell.key: cell for cell in found}

    def add(self, cell: Cell) -> None:
        """Raises where another evaluation of the task asked other questions, which happens if its data were changed."""
        others = [known for known in self.known.values() if known.task == cell.task and known.questions]
        if cell.questions and any(known.questions != cell.questions for known in others):
            raise EarlyTomConfigError(
                f"{cell.task} asks other questions than when {self._file} was begun ({cell.score.samples} now, "
                f"{others[0].score.samples} then), and rows of both do not belong into one table. Begin anew in "
                "another file."
            )
        self.known[cell.key] = cell
        self.write()

    def write(self, last: bool = False) -> None:
        """Everything known: what the file has from before stays in it, whatever this run comes to."""
        if self._file and (last or self._file != STANDARD_OUTPUT):
            content = {**self._about, **self._report(list(self.known.values())).to_dict()}
            write_text(self._file, json.dumps(content, indent=2) + "\n")

    def report(self, evaluations: list[Evaluation]) -> Report:
        return self._report([self.known[evaluation.key] for evaluation in evaluations])

    def _report(self, cells: list[Cell]) -> Report:
        return Report(cells, self._shape, self._limit)


def _evaluate(
    arguments: argparse.Namespace,
    subject: Subject,
    evaluations: list[Evaluation],
    cells: _Cells,
    progress_on: Console,
) -> None:
    """All of ``evaluations``, in turn, with one model."""
    harness = Harness(arguments.include_path)
    tasks = list(dict.fromkeys(evaluation.task for evaluation in evaluations))
    harness.require_tasks(tasks)
    own = read_model_args(arguments.model_args, subject.kind)
    for task in tasks:
        with step(progress_on, f"looking at {task}"):
            harness.look_at(task)
    model = load_model(arguments, subject, own)
    seconds: list[float] = []
    for number, evaluation in enumerate(evaluations):
        left = f"; {in_words(sum(seconds) / number * (len(evaluations) - number))} to go" if number else ""
        progress_on.print(f"[{number + 1}/{len(evaluations)}] {evaluation.name}{left}", markup=False, soft_wrap=True)
        try:
            cell = evaluate(model, harness, evaluation, arguments.limit)
        except EarlyTomError as error:
            raise EarlyTomConfigError(f"{error} {_what_is_saved(arguments, cells)}") from error
        seconds.append(cell.seconds)
        cells.add(cell)


def evaluate(model: Any, harness: Harness, evaluation: Evaluation, limit: int | None) -> Cell:
    """One task with one ratio; raises :class:`EarlyTomConfigError` with the name of both."""
    start = time.perf_counter()
    try:
        model.use(evaluation.retain_ratio, **evaluation.options)
    except EarlyTomError as error:
        raise EarlyTomConfigError(f"{evaluation.name}: {error}") from error
    found = harness.evaluate(model, evaluation.task, limit=limit, said=evaluation.name)
    return Cell(
        task=evaluation.task,
        retain_ratio=evaluation.retain_ratio,
        settings=evaluation.settings,
        options=evaluation.options,
        score=score_of(found, evaluation.task),
        costs=model.costs(),
        tokens_per_second=found.get("throughput", {}).get("avg_speed"),
        seconds=time.perf_counter() - start,
        questions=questions_of(found),
        run=_BEGUN,
        results=json.loads(json.dumps(found["results"], default=str)),
    )


def _refuse_to_overwrite(arguments: argparse.Namespace) -> None:
    """Raise where ``--json`` names a file with evaluations, which may have taken days, and nobody said --resume."""
    file = Path(arguments.json) if arguments.json and arguments.json != STANDARD_OUTPUT else None
    if arguments.resume or file is None or not file.is_file():
        return
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        finished = len(content["evaluations"])
    except (OSError, ValueError, TypeError, KeyError):
        return  # nothing of this command's
    if finished:
        raise EarlyTomConfigError(
            f"{arguments.json} has {counted(finished, 'evaluation')} of before: go on with --resume, or begin anew in "
            "another file."
        )


def _what_is_saved(arguments: argparse.Namespace, cells: _Cells) -> str:
    if not arguments.json or arguments.json == STANDARD_OUTPUT:
        return "Nothing was saved; with --json FILE, all that is finished would be, for --resume."
    if not cells.known:
        return f"Nothing was finished yet that {arguments.json} could have."
    finished = counted(len(cells.known), "evaluation")
    return f"{arguments.json} has the {finished} before it; the same command with --resume goes on from there."


def _check(arguments: argparse.Namespace) -> None:
    if not arguments.model:
        raise EarlyTomConfigError("--tasks needs --model: a checkpoint folder or Hub id.")
    for name in ("batch_size", "limit", "frames"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise EarlyTomConfigError(f"{name}={value}: must be at least 1.")


def _asked(arguments: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    """What an answer and its time depend on beside the machine, the task and the ratio."""
    names = ("model", "frames", "dtype", "batch_size", "limit", "include_path", "model_args")
    # What is "none" is not what was left open.
    spelled = {name: "none" if value is None else value for name, value in options.items()}
    return {**{name: getattr(arguments, name) for name in names}, "options": spelled}
