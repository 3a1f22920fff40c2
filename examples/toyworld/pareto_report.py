"""The table of ``earlytom eval --toy --pareto``, and the same for JSON; ``pareto_plot.py`` draws it.

| method        | ratio| tokens| encoder| MFLOP | TTFT ms | accuracy (95% CI) | front | plus ahead at equal MFLOP | ...
| earlytom plus |   10%|     13|   52.2%|   360 |    15.1 | 90.5 (89.4-91.5)  | MFLOP |                           | ...
| visionzip     |   10%|     13|  100.0%|   580 |    17.0 | 70.9 (69.5-72.2)  |       | 26.4 (25.1 to 27.6)       | ...

(made-up numbers; "ahead": accuracy of the curve of ``plus`` at the row's cost, less the row's; "–" where the curve does
not reach, or nothing was timed)
"""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from earlytom_compile.benchmarks import markdown
from earlytom_compile.toyworld.evaluate import Result
from earlytom_compile.toyworld.pareto import CostOf, Lead, ahead, flops_of, on_front, ttft_of
from earlytom_compile.toyworld.pareto_rows import OF_PLUS
from earlytom_compile.toyworld.report import (
    NOTHING,
    accuracy_text,
    each_text,
    label,
    milliseconds,
    models_heading,
    ratio_text,
    title,
)

COSTS: dict[str, CostOf] = {"MFLOP": flops_of, "TTFT": ttft_of}


def headings(results: Sequence[Result]) -> tuple[str, ...]:
    """Of the columns."""
    beside = ("front", *(f"plus ahead at equal {name}" for name in COSTS))
    shown = ("method", "ratio", "tokens", "encoder", "MFLOP", "TTFT ms", "accuracy (95% CI)")
    return (*shown, *models_heading(results), *beside)


def rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """Cells: accuracies in percent, what plus is ahead in points of them."""
    fronts = {name: on_front(results, cost_of) for name, cost_of in COSTS.items()}
    return [
        (
            label(result.arm),
            ratio_text(result),
            f"{result.cost.tokens:.0f}",
            f"{result.cost.work:.1%}",
            f"{result.cost.flops / 1e6:.0f}",
            milliseconds(result),
            accuracy_text(result),
            *each_text(result),
            ", ".join(name for name, kept in fronts.items() if kept[place]),
            *(_points(result, lead) for lead in leads(results, result).values()),
        )
        for place, result in enumerate(results)
    ]


def leads(results: Sequence[Result], row: Result) -> dict[str, Lead | None]:
    """How far plus is ahead of ``row`` by each cost; of itself it is not."""
    plus = [result for result in results if result.arm.method in OF_PLUS]
    if row.arm.method in OF_PLUS:
        return dict.fromkeys(COSTS)
    return {name: ahead(plus, row, cost_of) for name, cost_of in COSTS.items()}


def _points(row: Result, lead: Lead | None) -> str:
    if lead is None:
        return "" if row.arm.method in OF_PLUS else NOTHING
    return f"{100 * lead.points:.1f} ({100 * lead.low:.1f} to {100 * lead.high:.1f})"


def table(results: Sequence[Result]) -> Table:
    """For people at a terminal."""
    drawn = Table(title=title(results), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, heading in enumerate(headings(results)):
        drawn.add_column(heading, justify="right" if index else "left", overflow="fold")
    for cells in rows(results):
        drawn.add_row(*cells)
    return drawn


def to_markdown(results: Sequence[Result], about: dict[str, Any]) -> str:
    """The command, where it ran, and the table."""
    lines = markdown.heading(about) + markdown.table(title(results), headings(results), rows(results))
    return "\n".join(lines)


def to_list(results: Sequence[Result]) -> list[dict[str, Any]]:
    """For JSON: where each row is on the front, and how far plus is ahead of it."""
    fronts = {name: on_front(results, cost_of) for name, cost_of in COSTS.items()}
    return [
        {
            "method": result.arm.method,
            "retain_ratio": result.arm.retain_ratio,
            "settings": dict(result.arm.settings),
            "accuracy": result.accuracy(),
            "interval": list(result.interval()),
            "flops": flops_of(result),
            "ttft": ttft_of(result),
            "front": [name for name, kept in fronts.items() if kept[place]],
            "plus ahead": {
                name: None if lead is None else [lead.points, lead.low, lead.high]
                for name, lead in leads(results, result).items()
            },
        }
        for place, result in enumerate(results)
    ]
