"""What ``earlytom eval --toy`` prints and writes: a table of all rows, the same as JSON and Markdown, and plots.

| method         | ratio | tokens | encoder | accuracy          | of all tokens' | appearance | motion | ...
| all tokens     |       |    128 |  100.0% | 97.1 (96.5-97.7)  |                |       99.0 |   93.0 | ...
| earlytom paper |   10% |     13 |   79.6% | 90.2 (89.1-91.3)  |          92.9% |       97.0 |   70.0 | ...

(made-up numbers; "encoder": the work of the vision encoder's layers; "–" where nothing was asked, or for an interval of
too few videos, which is null in JSON)
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from earlytom_compile.benchmarks import markdown
from earlytom_compile.toyworld.evaluate import Arm, Questions, Result
from earlytom_compile.toyworld.methods import ALL_TOKENS, METHODS
from earlytom_compile.toyworld.questions import CATEGORIES
from earlytom_compile.words import counted

_NOTHING = "–"
HEADINGS = ("method", "ratio", "tokens", "encoder", "accuracy (95% CI)", "of all tokens'", *CATEGORIES)


def label(arm: Arm) -> str:
    """The method, and the options that this row alone has: ``only reuse, tau_reuse=0.06, full_layers=5,7``."""
    values = ((name, ",".join(map(str, value)) if isinstance(value, tuple) else value) for name, value in arm.settings)
    return ", ".join([arm.method, *(f"{name}={value}" for name, value in values)])


def rows(results: Sequence[Result], questions: Questions) -> list[tuple[str, ...]]:
    """Cells: accuracies in percent, a row for each result, and guessing last."""
    full = next((result.accuracy() for result in results if result.arm.method == ALL_TOKENS), 0.0)
    cells = []
    for result in results:
        arm = result.arm
        cells.append(
            (
                label(arm),
                "" if arm.retain_ratio is None else f"{arm.retain_ratio:.0%}",
                f"{result.tokens:.0f}",
                f"{result.work:.1%}",
                _with_interval(result),
                f"{result.accuracy() / full:.1%}" if full and arm.method != ALL_TOKENS else "",
                *(_percent(result.accuracy(category)) for category in CATEGORIES),
            )
        )
    chance = questions.chance
    guessing = ("guessing", "", "", "", _percent(questions.overall_chance), "")
    return [*cells, (*guessing, *(_percent(chance[category]) for category in CATEGORIES))]


def _percent(share: float) -> str:
    return _NOTHING if math.isnan(share) else f"{100 * share:.1f}"


def _with_interval(result: Result) -> str:
    low, high = map(_percent, result.interval())
    return f"{_percent(result.accuracy())} ({_NOTHING if low == _NOTHING else f'{low}-{high}'})"


def unseen_pairs(results: Sequence[Result], questions: Questions) -> dict[str, Any]:
    """How the model fares with all tokens where a video shows a pair of colour and shape that training never did."""
    return {
        name: {"videos": len(part.asked), "accuracy": part.accuracy(), "interval": list(part.interval())}
        for name, part in _parts(results, questions).items()
    }


def _parts(results: Sequence[Result], questions: Questions) -> dict[str, Result]:
    full = next(result for result in results if result.arm.method == ALL_TOKENS)
    return {"with an unseen pair": full.of(questions.held_out), "without": full.of(~questions.held_out)}


def _unseen_text(results: Sequence[Result], questions: Questions) -> str:
    parts = [
        f"{_with_interval(part)} in the {counted(len(part.asked), 'video')} {name}"
        if len(part.asked)
        else f"no video {name}"
        for name, part in _parts(results, questions).items()
    ]
    return "Pairs of colour and shape never seen in training, all tokens: " + ", ".join(parts) + "."


def table(results: Sequence[Result], questions: Questions) -> Table:
    """For people at a terminal."""
    drawn = Table(title=_title(results), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, heading in enumerate(HEADINGS):
        drawn.add_column(heading, justify="right" if index else "left", overflow="fold")
    for cells in rows(results, questions):
        drawn.add_row(*cells)
    drawn.caption, drawn.caption_justify = _unseen_text(results, questions), "left"
    return drawn


def to_markdown(results: Sequence[Result], questions: Questions, about: dict[str, Any]) -> str:
    """The command, where it ran, and the table."""
    lines = markdown.heading(about) + markdown.table(_title(results), HEADINGS, rows(results, questions))
    return "\n".join([*lines, _unseen_text(results, questions)]) + "\n"


def to_dict(results: Sequence[Result], questions: Questions, about: dict[str, Any]) -> dict[str, Any]:
    """For JSON."""
    chance = {"overall": questions.overall_chance, **questions.chance}
    unseen = unseen_pairs(results, questions)
    rows = [result.to_dict() for result in results]
    return {**about, **_without_nan({"chance": chance, "unseen pairs": unseen, "results": rows})}


def _without_nan(content: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(content, dict):
        return {name: _without_nan(value) for name, value in content.items()}
    if isinstance(content, list):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content


def write_plots(results: Sequence[Result], folder: Path) -> list[Path]:
    """accuracy.png: accuracy against ratio. categories.png: the same for each category. encoder.png: accuracy against
    the work of the vision encoder, where every token stays."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    _draw(axes, results, None)
    axes.set(title=_title(results), ylabel="right answers (95 % interval)", xlabel="share of the video tokens kept")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    figure.savefig(folder / "accuracy.png", dpi=120)
    plt.close(figure)
    figure, grid = plt.subplots(1, len(CATEGORIES), figsize=(14, 3.2), sharey=True, layout="constrained")
    for axes, category in zip(grid, CATEGORIES, strict=True):
        _draw(axes, results, category)
        axes.set(title=category)
    grid[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    figure.savefig(folder / "categories.png", dpi=120)
    plt.close(figure)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    _draw_work(axes, [result for result in results if result.arm.retain_ratio is None and result.tokens])
    axes.set(title=_title(results), ylabel="right answers (95 % interval)", xlabel="work of the encoder's layers")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    figure.savefig(folder / "encoder.png", dpi=120)
    plt.close(figure)
    return [folder / name for name in ("accuracy.png", "categories.png", "encoder.png")]


def _draw_work(axes: Any, results: Sequence[Result]) -> None:
    """A point with its interval for each row."""
    for result in results:
        low, high = result.interval()
        bounds = [[result.accuracy() - low], [high - result.accuracy()]]
        axes.errorbar(result.work, result.accuracy(), yerr=bounds, fmt="o", capsize=2, label=label(result.arm))
    axes.grid(alpha=0.3)


def _draw(axes: Any, results: Sequence[Result], category: str | None) -> None:
    """A line with its interval for each method and its settings; all tokens as a line across."""
    for name in dict.fromkeys(label(result.arm) for result in results if result.arm.method in METHODS):
        of_method = [result for result in results if label(result.arm) == name]
        ratios = [result.arm.retain_ratio for result in of_method]
        bounds = [result.interval(category) for result in of_method]
        (line,) = axes.plot(ratios, [result.accuracy(category) for result in of_method], marker="o", label=name)
        axes.fill_between(ratios, *zip(*bounds, strict=True), color=line.get_color(), alpha=0.12)
    for result in results:
        if result.arm.method == ALL_TOKENS:
            axes.axhline(result.accuracy(category), color="black", linestyle="--", label=ALL_TOKENS)
    axes.grid(alpha=0.3)


def _title(results: Sequence[Result]) -> str:
    if not results:
        return ""
    asked = results[0].asked
    return f"{counted(int(asked.sum()), 'question')} about {counted(len(asked), 'video')}"
