"""What ``earlytom eval --toy`` prints and writes: a table of all rows, the same as JSON and Markdown; plots.py draws.

| method         | ratio| tokens | a layer | encoder | MFLOP | TTFT ms | accuracy          | of all tokens' | motion ...
| all tokens     |      |    128 |   128.0 |  100.0% |   839 |    15.2 | 97.1 (96.5-97.7)  |                |   93.0 ...
| earlytom paper |  10% |     13 |    13.0 |   79.6% |   470 |    14.8 | 90.2 (89.1-91.3)  |          92.9% |   70.0 ...

(made-up numbers; "a layer": video tokens that a layer of the language model sees, on average; "encoder": the work of
the vision encoder's layers; "MFLOP": all operations of a prefill; "–" where nothing was asked or timed, or for an
interval of too few videos, which is null in JSON)
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from earlytom_compile.benchmarks import markdown
from earlytom_compile.toyworld.evaluate import Arm, Questions, Result
from earlytom_compile.toyworld.methods import ALL_TOKENS
from earlytom_compile.toyworld.seeds import OverModels
from earlytom_compile.words import counted

NOTHING = "–"
_SHOWN = ("method", "ratio", "tokens", "a layer", "encoder", "MFLOP", "TTFT ms", "accuracy (95% CI)")


def headings(results: Sequence[Result], questions: Questions) -> tuple[str, ...]:
    """Of the columns."""
    return (*_SHOWN, *models_heading(results), "of all tokens'", *questions.world.categories)


def models_heading(results: Sequence[Result]) -> tuple[str, ...]:
    """Of a column for each model's own accuracy, where several were asked."""
    return ("each model",) if results and isinstance(results[0], OverModels) else ()


def each_text(result: Result) -> tuple[str, ...]:
    """Its cell: ``97.3 96.9 97.1``."""
    own = " ".join(_percent(one.accuracy()) for one in result.each) if isinstance(result, OverModels) else ""
    return (own,) if own else ()


def label(arm: Arm) -> str:
    """The method, and the options that this row alone has: ``only reuse, tau_reuse=0.06, full_layers=5,7``."""
    values = ((name, ",".join(map(str, x)) or "none" if isinstance(x, tuple) else x) for name, x in arm.settings)
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
                ratio_text(result),
                f"{result.cost.tokens:.0f}",
                f"{result.cost.layer_tokens:.1f}",
                f"{result.cost.work:.1%}",
                f"{result.cost.flops / 1e6:.0f}",
                milliseconds(result),
                accuracy_text(result),
                *each_text(result),
                f"{result.accuracy() / full:.1%}" if full and arm.method != ALL_TOKENS else "",
                *(_percent(result.accuracy(category)) for category in questions.world.categories),
            )
        )
    chance = questions.chance
    beside = [""] * (1 + len(models_heading(results)))
    guessing = ("guessing", *[""] * 6, _percent(questions.overall_chance), *beside)
    return [*cells, (*guessing, *(_percent(chance[category]) for category in questions.world.categories))]


def ratio_text(result: Result) -> str:
    """A share of the tokens; nothing for a row without one."""
    return "" if result.arm.retain_ratio is None else f"{result.arm.retain_ratio:.0%}"


def milliseconds(result: Result) -> str:
    """The median time to the first token."""
    return f"{1e3 * statistics.median(result.ttft):.1f}" if result.ttft else NOTHING


def _percent(share: float) -> str:
    return NOTHING if math.isnan(share) else f"{100 * share:.1f}"


def accuracy_text(result: Result) -> str:
    """In percent, with its interval: ``97.3 (96.7-97.9)``."""
    low, high = map(_percent, result.interval())
    return f"{_percent(result.accuracy())} ({NOTHING if low == NOTHING else f'{low}-{high}'})"


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
        f"{accuracy_text(part)} in the {counted(len(part.asked), 'video')} {name}"
        if len(part.asked)
        else f"no video {name}"
        for name, part in _parts(results, questions).items()
    ]
    return "Pairs of colour and shape never seen in training, all tokens: " + ", ".join(parts) + "."


def table(results: Sequence[Result], questions: Questions) -> Table:
    """For people at a terminal."""
    drawn = Table(title=title(results), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, heading in enumerate(headings(results, questions)):
        drawn.add_column(heading, justify="right" if index else "left", overflow="fold")
    for cells in rows(results, questions):
        drawn.add_row(*cells)
    drawn.caption, drawn.caption_justify = _unseen_text(results, questions), "left"
    return drawn


def to_markdown(results: Sequence[Result], questions: Questions, about: dict[str, Any]) -> str:
    """The command, where it ran, and the table."""
    lines = markdown.heading(about) + markdown.table(
        title(results), headings(results, questions), rows(results, questions)
    )
    return "\n".join([*lines, _unseen_text(results, questions)]) + "\n"


def to_dict(
    results: Sequence[Result], questions: Questions, about: dict[str, Any], of_models: Mapping[str, Sequence[Result]]
) -> dict[str, Any]:
    """For JSON: ``results`` are rows over all models that were asked, ``of_models`` every row of each."""
    chance = {"overall": questions.overall_chance, **questions.chance}
    unseen = unseen_pairs(results, questions) if results else {}
    rows = [{"model": model, **result.to_dict()} for model, own in of_models.items() for result in own]
    together = [
        {**result.summary(), "each model": [one.accuracy() for one in result.each]}
        for result in results
        if isinstance(result, OverModels)
    ]
    over = {"over models": together} if together else {}
    return {**about, **without_nan({"chance": chance, "unseen pairs": unseen, **over, "results": rows})}


def without_nan(content: Any) -> Any:
    """The same with null in the place of NaN, which JSON does not have."""
    if isinstance(content, dict):
        return {name: without_nan(value) for name, value in content.items()}
    if isinstance(content, list):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content


def title(results: Sequence[Result]) -> str:
    """How much was asked."""
    if not results:
        return ""
    asked, models = results[0].asked > 0, results[0].asked.max()
    of_models = f", each model of {models}" if isinstance(results[0], OverModels) else ""
    return f"{counted(int(asked.sum()), 'question')} about {counted(len(asked), 'video')}{of_models}"
