"""What ``earlytom eval --toy`` prints and writes: a table of all rows, the same as JSON and Markdown, and plots.

| method         | ratio | tokens | accuracy          | of all tokens' | appearance | motion | ...
| all tokens     |       |    128 | 97.1 (96.5-97.7)  |                |       99.0 |   93.0 | ...
| earlytom paper |   10% |     13 | 90.2 (89.1-91.3)  |          92.9% |       97.0 |   70.0 | ...

(made-up numbers)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from earlytom_compile.benchmarks import markdown
from earlytom_compile.toyworld.evaluate import Questions, Result
from earlytom_compile.toyworld.methods import ALL_TOKENS, METHODS
from earlytom_compile.toyworld.questions import CATEGORIES

HEADINGS = ("method", "ratio", "tokens", "accuracy (95% CI)", "of all tokens'", *CATEGORIES)


def rows(results: Sequence[Result], questions: Questions) -> list[tuple[str, ...]]:
    """Cells: accuracies in percent, a row for each result, and guessing last."""
    full = next((result.accuracy() for result in results if result.method == ALL_TOKENS), 0.0)
    cells = []
    for result in results:
        low, high = result.interval()
        cells.append(
            (
                result.method,
                "" if result.retain_ratio is None else f"{result.retain_ratio:.0%}",
                f"{result.tokens:.0f}",
                f"{100 * result.accuracy():.1f} ({100 * low:.1f}-{100 * high:.1f})",
                f"{result.accuracy() / full:.1%}" if full and result.method != ALL_TOKENS else "",
                *(f"{100 * result.accuracy(category):.1f}" for category in CATEGORIES),
            )
        )
    chance = questions.chance
    guessing = ("guessing", "", "", f"{100 * questions.overall_chance:.1f}", "")
    return [*cells, (*guessing, *(f"{100 * chance[category]:.1f}" for category in CATEGORIES))]


def unseen_pairs(results: Sequence[Result], questions: Questions) -> dict[str, Any]:
    """How the model fares with all tokens where a video shows a pair of colour and shape that training never did."""
    full = next(result for result in results if result.method == ALL_TOKENS)
    found = {}
    for name, videos in (("with an unseen pair", questions.held_out), ("without", ~questions.held_out)):
        part = full.of(videos)
        found[name] = {"videos": int(videos.sum()), "accuracy": part.accuracy(), "interval": list(part.interval())}
    return found


def _unseen_text(results: Sequence[Result], questions: Questions) -> str:
    parts = [
        f"{100 * part['accuracy']:.1f} ({100 * part['interval'][0]:.1f}-{100 * part['interval'][1]:.1f}) in the "
        f"{part['videos']} videos {name}"
        for name, part in unseen_pairs(results, questions).items()
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
    return {**about, "chance": chance, "unseen pairs": unseen, "results": [result.to_dict() for result in results]}


def write_plots(results: Sequence[Result], folder: Path) -> list[Path]:
    """accuracy.png: accuracy against ratio. categories.png: the same for each category."""
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
    return [folder / "accuracy.png", folder / "categories.png"]


def _draw(axes: Any, results: Sequence[Result], category: str | None) -> None:
    """A line with its interval for each method; all tokens as a line across."""
    for name in METHODS:
        of_method = [result for result in results if result.method == name and result.retain_ratio is not None]
        if not of_method:
            continue
        ratios = [result.retain_ratio for result in of_method]
        bounds = [result.interval(category) for result in of_method]
        (line,) = axes.plot(ratios, [result.accuracy(category) for result in of_method], marker="o", label=name)
        axes.fill_between(ratios, *zip(*bounds, strict=True), color=line.get_color(), alpha=0.12)
    for result in results:
        if result.method == ALL_TOKENS:
            axes.axhline(result.accuracy(category), color="black", linestyle="--", label=ALL_TOKENS)
    axes.grid(alpha=0.3)


def _title(results: Sequence[Result]) -> str:
    return f"{int(results[0].asked.sum())} questions about {len(results[0].asked)} videos" if results else ""
