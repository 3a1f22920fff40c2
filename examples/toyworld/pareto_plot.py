"""pareto.png: accuracy against all operations of a prefill, and against its measured time; one point for each row.

``plus`` is strong, with a line through the best of its rows, all others are pale, and a dotted line joins what nothing
beats.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from earlytom_compile.benchmarks.colours import MARKERS, PALE
from earlytom_compile.toyworld.evaluate import Result
from earlytom_compile.toyworld.methods import ALL_TOKENS
from earlytom_compile.toyworld.pareto import CostOf, flops_of, on_front, ttft_of
from earlytom_compile.toyworld.pareto_rows import OF_PLUS
from earlytom_compile.toyworld.report import title

_PLUS = "plus"
_STRONG = {"color": "tab:red", "marker": "o", "zorder": 3}
_FULL = {"color": "black", "marker": "*", "markersize": 12, "zorder": 3}
_LOWEST = 0.57
"""Of the best row's right answers; rows below are left to the table: without tokens, or of a single frame."""
_Style = dict[str, Any]


def write_plot(results: Sequence[Result], folder: Path) -> Path:
    """The picture, as a PNG file in ``folder``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    figure = draw(plt, results)
    figure.savefig(folder / "pareto.png", dpi=120)
    plt.close(figure)
    return folder / "pareto.png"


def draw(plt: Any, results: Sequence[Result]) -> Any:
    """Both panels, of which the second has the rows that were timed."""
    figure, (flops, ttft) = plt.subplots(1, 2, figsize=(16, 7), sharey=True, layout="constrained")
    _panel(flops, results, flops_of, 1e-6)
    _panel(ttft, results, ttft_of, 1e3)
    flops.set(xlabel="operations of a whole prefill (MFLOP, exact)", ylabel="right answers (95 % interval)")
    ttft.set(xlabel="median time to the first token (ms)")
    figure.suptitle(title(results))
    flops.set_ylim(bottom=_LOWEST * max(result.accuracy() for result in results))
    figure.legend(*flops.get_legend_handles_labels(), loc="outside right center", fontsize="small")
    return figure


def _panel(axes: Any, results: Sequence[Result], cost_of: CostOf, unit: float) -> None:
    styles = point_styles(list(dict.fromkeys(group(result) for result in results)))
    for name, style in styles.items():
        of_group = [result for result in results if group(result) == name and cost_of(result) is not None]
        _points(axes, of_group, cost_of, unit, name, style)
    plus = [result for result in results if group(result) == _PLUS]
    _line(axes, plus, cost_of, unit, {"color": _STRONG["color"], "linewidth": 2.5})
    _line(axes, results, cost_of, unit, {"color": "black", "linewidth": 1, "linestyle": ":", "label": "front"})
    axes.grid(alpha=0.3)


def group(result: Result) -> str:
    """Rows that look alike: a method with all its ratios, layers and thresholds."""
    return _PLUS if result.arm.method in OF_PLUS else result.arm.method


def point_styles(groups: Sequence[str]) -> dict[str, _Style]:
    """Colour and marker of each of the ``groups``."""
    pale = [name for name in groups if name not in (ALL_TOKENS, _PLUS)]
    styles: dict[str, _Style] = {
        name: {"color": PALE[place % len(PALE)], "marker": MARKERS[place % len(MARKERS)], "markersize": 5}
        for place, name in enumerate(pale)
    }
    return {name: styles.get(name, _STRONG if name == _PLUS else _FULL) for name in groups}


def _points(axes: Any, results: Sequence[Result], cost_of: CostOf, unit: float, name: str, style: _Style) -> None:
    accuracy = [result.accuracy() for result in results]
    bounds = [
        [max(value - result.interval()[0], 0.0) for value, result in zip(accuracy, results, strict=True)],
        [max(result.interval()[1] - value, 0.0) for value, result in zip(accuracy, results, strict=True)],
    ]
    costs = [unit * (cost_of(result) or 0.0) for result in results]
    axes.errorbar(costs, accuracy, yerr=bounds, linestyle="", elinewidth=0.7, label=name, **style)


def _line(axes: Any, results: Sequence[Result], cost_of: CostOf, unit: float, style: _Style) -> None:
    """Through those of these rows that are on their own front."""
    kept = zip(results, on_front(results, cost_of), strict=True)
    corners = sorted((unit * (cost_of(result) or 0.0), result.accuracy()) for result, kept_ in kept if kept_)
    axes.plot(*zip(*corners, strict=True), **style) if corners else None
