"""What ``earlytom bench --plot`` draws: stages, the time against the work, and both against the number of frames."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from earlytom_compile.benchmarks.breakdown import LLM, NOT_SEPARABLE, OVERHEAD, TOKENS, VISION
from earlytom_compile.benchmarks.colours import MARKERS, STRONG
from earlytom_compile.benchmarks.measure import Result
from earlytom_compile.benchmarks.results import Workload, peaks
from earlytom_compile.errors import EarlyTomConfigError

_COLOURS = {
    VISION: "tab:blue", TOKENS: "tab:orange", LLM: "tab:green", NOT_SEPARABLE: "tab:olive", OVERHEAD: "tab:gray",
}  # fmt: skip


def write_plots(workloads: Sequence[Workload], folder: Path) -> list[Path]:
    """PNG files in ``folder``: for each workload, stages of the time to the first token (as Figure 3 of the paper)
    and that time against the work; for several, it and the memory against the number of frames."""
    pyplot = pyplot_without_screen()
    folder.mkdir(parents=True, exist_ok=True)
    written = []

    def save(name: str, figure: Any) -> None:
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=150)
        pyplot.close(figure)

    for workload in workloads:
        save(f"ttft-{workload.frames}-frames", _plot_stages(pyplot, workload))
        if any(result.floor for result in workload.measured):
            save(f"ttft-against-flops-{workload.frames}-frames", _plot_against_flops(pyplot, workload))
    if len(workloads) > 1:
        save("cost-against-frames", _plot_against_frames(pyplot, workloads))
    return written


def _plot_stages(pyplot: Any, workload: Workload) -> Any:
    """Stacked bars of the profiled calls, and beside each the median of the timed ones."""
    results = workload.measured[::-1]
    names = [result.name for result in results]
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(results) + 2), layout="constrained")
    parts = [result.breakdown.parts if result.breakdown else {} for result in results]
    before = [0.0] * len(results)
    for part, colour in _COLOURS.items():
        lengths = [1e3 * known.get(part, 0.0) for known in parts]
        axes.barh(names, lengths, left=before, label=part if any(lengths) else None, color=colour)
        before = [start + length for start, length in zip(before, lengths, strict=True)]
    axes.plot([1e3 * result.median for result in results], names, "k|", markersize=16, label="median, not profiled")
    axes.set(xlabel="time to first token (ms)", title=workload.title)
    axes.set_xlim(left=0)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _plot_against_flops(pyplot: Any, workload: Workload) -> Any:
    """A point for each arm, with the tokens that a layer of the language model sees, over the operations that
    ``flops.count`` counts; and the line on which the machine's largest products would lie."""
    counted = [result for result in workload.measured if result.floor is not None]
    figure, axes = pyplot.subplots(figsize=(10, max(5.0, 0.22 * len(counted) + 1)), layout="constrained")
    most = 0.0
    for index, result in enumerate(counted):
        assert result.floor is not None
        work, tokens = result.floor.exact_flops / 1e12, workload.layer_tokens(result)
        most = max(most, work)
        style = {"color": STRONG[index % len(STRONG)], "marker": MARKERS[index % len(MARKERS)]}
        axes.scatter([work], [1e3 * result.median], label=f"{result.name}: {tokens:.0f} tokens", **style)
    axes.plot([0, most], [0, 1e15 * most / workload.ceilings["matmul"]], "k--", label="matrix products alone")
    axes.set(xlabel="exact TFLOP", ylabel="time to first token (ms)", title=workload.title)
    axes.set(xlim=(0, None), ylim=(0, None))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    return figure


def _plot_against_frames(pyplot: Any, workloads: Sequence[Workload]) -> Any:
    """Time and peaks of memory against the number of frames, with gaps where one is not known."""
    costs: dict[str, Callable[[Result], float]] = {
        "time to first token (ms)": lambda result: float("nan") if result.failure else 1e3 * result.median,
        "peak memory of vision encoding (MiB)": lambda result: _mebibytes(peaks(result)[0]),
        "peak memory of a call (MiB)": lambda result: _mebibytes(peaks(result)[-1]),
    }
    figure, panels = pyplot.subplots(1, len(costs), figsize=(7 * len(costs), 5), layout="constrained", squeeze=False)
    ticks = [workload.frames for workload in workloads]
    for axes, (label, cost) in zip(panels[0], costs.items(), strict=True):
        for index, result in enumerate(workloads[0].results):
            costs_of_arm = [cost(workload.results[index]) for workload in workloads]
            axes.plot(ticks, costs_of_arm, marker="o", label=result.name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set(xlabel="frames", ylabel=label, yscale="log")
        axes.grid(alpha=0.3)
    panels[0][0].legend()
    return figure


def _mebibytes(peak: int | None) -> float:
    return float("nan") if peak is None else peak / 2**20


def require_matplotlib() -> None:
    """Raise :class:`EarlyTomConfigError` where nothing can be plotted."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise EarlyTomConfigError(
            "--plot needs matplotlib: pip install 'earlytom-compile[plot]' (or leave --plot out)."
        ) from error


def pyplot_without_screen() -> Any:
    """``matplotlib.pyplot`` that only writes files."""
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
