"""``earlytom eval --toy``: every way to fewer tokens beside the others, on a small model that really answers.

Draw the videos of a split -> ask about each, with all tokens and with what each method leaves -> time the first tokens,
all methods on a video in turn -> table.

A row is saved as soon as it is counted, and every row once more with each video that was timed.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from ..benchmarks.environment import environment
from ..benchmarks.forecast import compilation, in_words
from ..config import EarlyTomConfig
from ..errors import EarlyTomConfigError
from ..words import counted
from .loading import (
    checked_config,
    open_checkpoint,
    progress_bars,
    require_layers,
    require_weights,
    resolve_device,
)
from .options import read_settings
from .outputs import STANDARD_OUTPUT, output_console, write_text
from .resume import saved_content, stopped

_OURS = "the one that comes along"
_FILE_WIDTH = 190  # columns, where nobody watches
_PIECE = 20  # videos that are asked about to say how long all take
_PROMPT_TRACED = 2.0  # seconds for each kind of prompt whose tokens go inside: of one question, and of several


def execute(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Every method at every ratio, or what ``--pareto`` chooses, of every model."""
    try:
        from ..toyworld.worlds import world_named

        world = world_named(arguments.world)
        arms = _arms(arguments, world, [read_settings(text) for text in arguments.try_])
    except ImportError as error:
        raise EarlyTomConfigError(f"{error}: pip install '.[toy]' in the repository brings what it needs.") from error
    progress_on, console = Console(stderr=True), output_console(arguments, width=_FILE_WIDTH)
    _refuse_what_does_nothing(arguments, options, arms)
    models = {name or _OURS: _opened(world, name, arguments.device) for name in arguments.model or [None]}
    for checkpoint in models.values():
        _require_layers(checkpoint.config, arms, options)
    about = {**environment(next(iter(models.values())).device), **_asked(arguments, options)}
    rows = _Rows(arguments, arms, list(models), about, saved_content(arguments, about, progress_on))
    try:
        _say_what_is_left_out(world, progress_on)
        rows.questions = _draw(arguments, world, progress_on)
        for name, checkpoint in models.items():
            _ask(arguments, checkpoint.load(progress_on), rows, name, options, progress_on)
    except KeyboardInterrupt:
        raise stopped(arguments, rows.told()) from None
    _show(arguments, rows, console)


class _Opened(NamedTuple):
    """A checkpoint whose weights are not read yet."""

    config: Any
    device: Any
    load: Callable[[Console], Any]


def _opened(world: Any, name: str | None, device: str) -> _Opened:
    """That of ``name``, or the one that comes along with the world."""
    folder = str(name or world.weights)
    if world.load is None:
        checkpoint = open_checkpoint(folder, device=device)
        return _Opened(checkpoint.config, checkpoint.device, lambda console: checkpoint.load(console).model)
    # Such a folder has no processor, and transformers would ask for the weights that are elsewhere.
    place, (folder, config) = resolve_device(device), checked_config(folder)
    require_weights(folder)
    return _Opened(config, place, lambda console: world.load(folder).to(place))


def _say_what_is_left_out(world: Any, progress_on: Console) -> None:
    if world.unreadable:
        names = ", ".join(world.unreadable)
        progress_on.print(f"world {world.name}: without {names}, which cannot read its vision encoder", soft_wrap=True)


def _arms(arguments: argparse.Namespace, world: Any, settings: list[dict[str, Any]]) -> list[Any]:
    """The rows that were asked for."""
    from ..toyworld import evaluate, pareto_rows

    if arguments.pareto:
        return evaluate.chosen(pareto_rows.arms(arguments.retain_ratios, world), _methods(arguments), settings)
    return evaluate.arms(arguments.retain_ratios, _methods(arguments), settings, world)


def _ask(
    arguments: argparse.Namespace, model: Any, rows: "_Rows", name: str, options: dict[str, Any], progress_on: Console
) -> None:
    """Count and time what is missing of the model of that name."""
    of_model = _OfModel(rows, name)
    if of_model.is_first:
        with progress_bars(progress_on) as progress:
            progress.add_task(f"timing {_PIECE} videos", total=None)
            _say_how_long(model, rows.questions, rows.missing, min(arguments.repeats, arguments.videos), progress_on)
    _count(arguments, model, of_model, options, progress_on)
    _time(arguments, model, of_model, options, progress_on)


def _show(arguments: argparse.Namespace, rows: "_Rows", console: Console) -> None:
    """Print the table; write it and pictures of it where they were asked for."""
    from ..toyworld import pareto_plot, pareto_report, plots, report

    console.print(pareto_report.table(rows.finished) if arguments.pareto else rows.table())
    rows.write(last=True)
    if arguments.markdown:
        text = (
            pareto_report.to_markdown(rows.finished, rows.about)
            if arguments.pareto
            else report.to_markdown(rows.finished, rows.questions, rows.about)
        )
        write_text(arguments.markdown, text)
    if arguments.plot:
        folder = Path(arguments.plot)
        if arguments.pareto:
            written = [pareto_plot.write_plot(rows.finished, folder)]
        else:
            written = plots.write_plots(rows.finished, folder)
        for path in written:
            console.print(f"wrote {path}")


class _Rows:
    """What was asked for, and what is known of it; saved as soon as there is more."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        arms: list[Any],
        models: list[str],
        about: dict[str, Any],
        saved: dict[str, Any],
    ) -> None:
        from ..toyworld.evaluate import Result

        self.arms = arms
        self.models = models
        self.about = {**about, "models": models}
        self.questions: Any = None
        self._arguments = arguments
        # What the file has from before stays in it, whatever this run comes to.
        self.known: dict[str, dict[Any, Any]] = {name: {} for name in models}
        for content in saved.get("results", ()):
            row = Result.from_dict(content)
            self.known.setdefault(content["model"], {})[row.arm] = row

    @property
    def finished(self) -> list[Any]:
        """Of the rows that were asked for, in their order, those that every model has, over all of them."""
        from ..toyworld.seeds import over_models

        asked = [self.known[name] for name in self.models]
        return [over_models([own[arm] for own in asked]) for arm in self.arms if all(arm in own for own in asked)]

    @property
    def missing(self) -> list[Any]:
        """Those that nobody counted yet, once for each model."""
        return [arm for name in self.models for arm in self.arms if arm not in self.known[name]]

    def write(self, last: bool = False) -> None:
        """To the standard output only what comes ``last``."""
        from ..toyworld import pareto_report, report

        file = self._arguments.json
        if file and (last or file != STANDARD_OUTPUT):
            own = {name: self._in_order(rows) for name, rows in self.known.items()}
            content = report.to_dict(self.finished, self.questions, self.about, own)
            if last and self._arguments.pareto:
                content["pareto"] = report.without_nan(pareto_report.to_list(self.finished))
            write_text(file, json.dumps(content, indent=2) + "\n")

    def _in_order(self, rows: dict[Any, Any]) -> list[Any]:
        """What was asked for first."""
        asked = [rows[arm] for arm in self.arms if arm in rows]
        return asked + [row for arm, row in rows.items() if arm not in self.arms]

    def table(self) -> Any:
        """For people at a terminal."""
        from ..toyworld import report

        return report.table(self.finished, self.questions)

    def told(self) -> str:
        """What is there, for somebody who stopped it."""
        there = [self.known[name][arm] for name in self.models for arm in self.arms if arm in self.known[name]]
        if not there:
            return ""
        timed = min((len(row.ttft) for row in there if row.ttft), default=0)
        times = f", timed on {counted(timed, 'video')}" if timed else ""
        return f"{len(there)} of {counted(len(self.arms) * len(self.models), 'row')}{times}"


class _OfModel:
    """The rows of one model."""

    def __init__(self, rows: _Rows, name: str) -> None:
        self.made: dict[Any, Any] = {}  # methods by row, since making one traces the model
        self.arms = rows.arms
        self.questions = rows.questions
        self.is_first = name == rows.models[0]
        self._rows = rows
        self._known = rows.known[name]
        self.called = f"{name}: " if len(rows.models) > 1 else ""

    @property
    def missing(self) -> list[Any]:
        """Those that nobody counted yet."""
        return [arm for arm in self.arms if arm not in self._known]

    @property
    def times(self) -> dict[Any, tuple[float, ...]]:
        """Seconds to the first token, as far as they are known."""
        return {arm: self._known[arm].ttft for arm in self.arms}

    def add(self, row: Any) -> None:
        """One that is counted."""
        self._known[row.arm] = row
        self._rows.write()

    def add_times(self, seconds: dict[Any, tuple[float, ...]]) -> None:
        """Seconds to the first token by row, as far as they are known."""
        for arm, ttft in seconds.items():
            self._known[arm] = replace(self._known[arm], ttft=ttft)
        self._rows.write()


def _draw(arguments: argparse.Namespace, world: Any, progress_on: Console) -> Any:
    from ..toyworld import evaluate

    with progress_bars(progress_on) as progress:
        task = progress.add_task("drawing videos", total=arguments.videos)
        return evaluate.load_questions(
            arguments.split,
            arguments.first,
            arguments.videos,
            lambda: progress.advance(task),
            encoded=arguments.encoded,
            noise=arguments.noise,
            world=world,
        )


def _count(
    arguments: argparse.Namespace, model: Any, rows: _OfModel, options: dict[str, Any], console: Console
) -> None:
    """Right answers of every row that is missing."""
    from ..toyworld import evaluate, report

    with progress_bars(console) as progress:
        for arm in rows.missing:
            ratio = "" if arm.retain_ratio is None else f", {arm.retain_ratio:.0%}"
            task = progress.add_task(rows.called + report.label(arm) + ratio, total=arguments.videos)
            answered = functools.partial(progress.advance, task)
            rows.made[arm] = evaluate.made(model, arm, options)
            rows.add(evaluate.evaluate(model, rows.questions, arm, options, answered, rows.made[arm]))


def _time(arguments: argparse.Namespace, model: Any, rows: _OfModel, options: dict[str, Any], console: Console) -> None:
    """The first tokens of the rows that can be called, of as many videos as were asked for."""
    from ..toyworld import evaluate, timing

    videos, known = min(arguments.repeats, arguments.videos), rows.times
    if not videos or all(len(known[arm]) >= videos for arm in rows.arms if timing.can_be_called(arm)):
        return
    with progress_bars(console) as progress:
        task = progress.add_task(f"{rows.called}first tokens: tracing", total=None)
        called = [arm for arm in rows.arms if timing.can_be_called(arm)]
        made = {arm: rows.made.get(arm) or evaluate.made(model, arm, options) for arm in called}
        calls = {arm: timing.first_token(model, arm, made[arm], rows.questions.world) for arm in called}

        def save(seconds: dict[Any, tuple[float, ...]]) -> None:
            rows.add_times(seconds)
            done = min(map(len, seconds.values()))
            progress.update(task, description=f"{rows.called}first tokens", total=videos, completed=done)

        timing.timed(calls, rows.questions, known, videos, model.device, save)


def _require_layers(config: Any, arms: list[Any], options: dict[str, Any]) -> None:
    """Raise :class:`EarlyTomConfigError` for layers that the model does not have."""
    from ..toyworld.evaluate import options_of
    from ..toyworld.installed import inner_options
    from ..toyworld.methods import UNCONFIGURED

    layers = config.text_config.num_hidden_layers
    for arm in arms:
        if arm.method in UNCONFIGURED:
            continue
        given = options_of(arm, options)
        require_layers(config, given)
        EarlyTomConfig.from_options({**inner_options(arm.method, layers), **given}).steps_inside(layers)


def _asked(arguments: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    """What an answer depends on beside the machine and the row."""
    return {
        # None is the toy world, so that files from before there was another go on.
        "world": None if arguments.world == "toy" else arguments.world,
        "split": arguments.split,
        "first video": arguments.first,
        "videos": arguments.videos,
        "encoded": arguments.encoded,
        "noise": arguments.noise,
        "options": options,
    }


def _say_how_long(model: Any, questions: Any, arms: list[Any], timed: int, progress_on: Console) -> None:
    """A few videos are asked about with all tokens, which costs about what other rows do; and one question as it is
    asked where tokens leave inside the language model, and where first tokens are timed."""
    from ..toyworld import evaluate, installed, timing

    few = questions.first(_PIECE)
    everything = evaluate.Arm(evaluate.ALL_TOKENS)
    evaluate.evaluate(model, questions.first(1), everything)  # the first call is no measure
    start = time.perf_counter()
    evaluate.evaluate(model, few, everything)
    row = (time.perf_counter() - start) / len(few.asked) * len(questions.asked)
    called = timing.first_token(model, everything, evaluate.made(model, everything, {}), questions.world)
    ((call,),) = timing.timed({everything: called}, few, {}, 1, model.device).values()
    layers = model.config.vision_config.num_hidden_layers
    by_call = [arm for arm in arms if timing.can_be_called(arm)]
    compiled = sum(installed.own_options(arm.method) is not None for arm in arms)
    inside = sum(installed.reduces_inside(arm.method) for arm in arms)
    seconds = row * len(arms) + call * (len(by_call) * timed + inside * len(questions.asked))
    seconds += compiled * compilation("earlytom", layers, "eager") + inside * _PROMPT_TRACED * (2 if timed else 1)
    progress_on.print(
        f"{counted(len(arms), 'row')}, {counted(len(questions.asked), 'video')}: {in_words(seconds)} (measured with "
        f"{len(few.asked)} of them)",
        markup=False,
        highlight=False,
        soft_wrap=True,
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
