"""Pictures of what ``earlytom eval --toy`` found.

cost.png        accuracy against the operations of a whole prefill, a line for each method over its ratios
accuracy.png    accuracy against the share of the tokens that is kept
categories.png  the same for each category
encoder.png     accuracy against the work of the vision encoder, where every token stays
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from earlytom_compile.benchmarks.colours import MARKERS, PALE, STRONG
from earlytom_compile.toyworld.evaluate import Result
from earlytom_compile.toyworld.installed import INNER, own_options
from earlytom_compile.toyworld.methods import ALL_TOKENS
from earlytom_compile.toyworld.report import label, title

_ACCURACY = "right answers (95 % interval)"
_Style = dict[str, Any]


def write_plots(results: Sequence[Result], folder: Path) -> list[Path]:
    """The pictures, as PNG files in ``folder``; there are lines for methods, and all tokens for themselves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    styles = line_styles(list(dict.fromkeys(label(result.arm) for result in results)))
    drawn = {
        "cost": _cost_figure(plt, results, styles),
        "accuracy": _ratio_figure(plt, results, styles),
        "categories": _category_figure(plt, results, styles),
        "encoder": _encoder_figure(plt, results, styles),
    }
    for name, figure in drawn.items():
        figure.savefig(folder / f"{name}.png", dpi=120)
        plt.close(figure)
    return [folder / f"{name}.png" for name in drawn]


def line_styles(labels: Sequence[str]) -> dict[str, _Style]:
    """Colour and marker of each line: strong colours for what users run, pale ones for parts of it and baselines; a row
    with inner merging has those of the row without, hollow and dashed."""
    bases = list(dict.fromkeys(name.replace(INNER, "") for name in labels if name != ALL_TOKENS))
    bases.sort(key=lambda name: own_options(name.partition(",")[0]) is None)
    colors = [*STRONG, *PALE]
    styles: dict[str, _Style] = {}
    for name in labels:
        if name == ALL_TOKENS:
            styles[name] = {"color": "black", "marker": "*", "markersize": 12}
            continue
        place = bases.index(name.replace(INNER, ""))
        style = {"color": colors[place % len(colors)], "marker": MARKERS[place % len(MARKERS)]}
        styles[name] = {**style, "linestyle": "--", "markerfacecolor": "white"} if INNER in name else style
    return styles


def _legend(axes: Any) -> None:
    """Beside the axes, where it hides nothing however many rows there are."""
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    axes.grid(alpha=0.3)


def _height(styles: dict[str, _Style]) -> float:
    """Inches, so that the legend fits."""
    return max(4.5, 0.21 * len(styles) + 0.8)


def _points(axes: Any, results: Sequence[Result], place: Callable[[Result], float], styles: dict[str, _Style]) -> None:
    """A line with an interval at each point for every row's ratios, in the order of their places."""
    for name in dict.fromkeys(label(result.arm) for result in results):
        of_row = sorted((result for result in results if label(result.arm) == name), key=place)
        accuracy = [result.accuracy() for result in of_row]
        low, high = zip(*(result.interval() for result in of_row), strict=True)
        bounds = [
            [max(value - bound, 0.0) for value, bound in zip(accuracy, low, strict=True)],  # NaN stays NaN
            [max(bound - value, 0.0) for value, bound in zip(accuracy, high, strict=True)],
        ]
        axes.errorbar(list(map(place, of_row)), accuracy, yerr=bounds, capsize=2, label=name, **styles[name])


def _cost_figure(plt: Any, results: Sequence[Result], styles: dict[str, _Style]) -> Any:
    figure, axes = plt.subplots(figsize=(10, _height(styles)), layout="constrained")
    _points(axes, results, lambda result: result.cost.flops / 1e6, styles)
    axes.set(title=title(results), ylabel=_ACCURACY, xlabel="operations of a whole prefill (MFLOP, exact)")
    _legend(axes)
    return figure


def _ratio_figure(plt: Any, results: Sequence[Result], styles: dict[str, _Style]) -> Any:
    figure, axes = plt.subplots(figsize=(9, _height(styles)), layout="constrained")
    _draw_ratios(axes, results, None, styles)
    axes.set(title=title(results), ylabel=_ACCURACY, xlabel="share of the video tokens kept")
    _legend(axes)
    return figure


def _category_figure(plt: Any, results: Sequence[Result], styles: dict[str, _Style]) -> Any:
    categories = results[0].categories
    size = (3.2 * len(categories), max(3.2, _height(styles) - 1.3))
    figure, grid = plt.subplots(1, len(categories), figsize=size, sharey=True, layout="constrained")
    for axes, category in zip(grid, categories, strict=True):
        _draw_ratios(axes, results, category, styles)
        axes.set(title=category)
        axes.grid(alpha=0.3)
    _legend(grid[-1])
    return figure


def _encoder_figure(plt: Any, results: Sequence[Result], styles: dict[str, _Style]) -> Any:
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    every_token = [result for result in results if result.arm.retain_ratio is None and result.cost.tokens]
    _points(axes, every_token, lambda result: result.cost.work, styles)
    axes.set(title=title(results), ylabel=_ACCURACY, xlabel="work of the encoder's layers")
    _legend(axes)
    return figure


def _draw_ratios(axes: Any, results: Sequence[Result], category: str | None, styles: dict[str, _Style]) -> None:
    """A line with its interval for each method and its settings; all tokens as a line across."""
    for name in dict.fromkeys(label(result.arm) for result in results if result.arm.retain_ratio is not None):
        of_method = [result for result in results if label(result.arm) == name]
        ratios = [result.arm.retain_ratio for result in of_method]
        bounds = [result.interval(category) for result in of_method]
        axes.plot(ratios, [result.accuracy(category) for result in of_method], label=name, **styles[name])
        axes.fill_between(ratios, *zip(*bounds, strict=True), color=styles[name]["color"], alpha=0.08)
    for result in results:
        if result.arm.method == ALL_TOKENS:
            axes.axhline(result.accuracy(category), color="black", linestyle="--", label=ALL_TOKENS)
