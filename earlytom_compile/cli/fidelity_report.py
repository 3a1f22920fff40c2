"""What ``earlytom eval --fidelity`` prints and writes: a row for each cheaper encoder, and cost at equal fidelity.

| video | method | setting        | layers in full | cost | cosine | 5 % below | worst frame |
| talk  | paper  | tau_seg 0.6    |                | 0.70 | 0.9444 |     0.719 |       0.789 |
| talk  | reuse  | tau_reuse 0.06 | 11             | 0.47 | 0.9750 |     0.895 |       0.929 |

(made-up numbers)
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from ..benchmarks import markdown
from ..benchmarks.fidelity import MERGING, EqualFidelity, Row, equal_fidelity

_TITLE = "features beside the full encoder's"
_HEADINGS = ("video", "method", "setting", "layers in full", "cost", "cosine", "5 % below", "worst frame")
_EQUAL_TITLE = "cost of reuse where its mean cosine is that of merging"
_EQUAL_HEADINGS = ("video", "merging", "cosine", "its cost", "layers in full", "cost of reuse", "of merging's")
_WORDS = (
    "cost: share of the encoder's layer work. cosine: mean over all places of all frames, with the full encoder's "
    "features; 5 % of the places are below the next column; worst frame: the lowest mean of one."
)
_EQUAL_WORDS = (
    "By straight lines between the thresholds that were measured, and the full encoder at (1, 1). ≤: the cheapest of "
    "them is better already."
)

Layers = tuple[int, ...]


def row_of(content: dict[str, Any]) -> Row:
    """One of those that :func:`to_dict` wrote."""
    known = {name: content[name] for name in Row.__dataclass_fields__}
    return Row(**{**known, "full_layers": tuple(content["full_layers"])})


def to_dict(rows: Sequence[Row], about: dict[str, Any]) -> dict[str, Any]:
    """For JSON."""
    equal = [{**asdict(each), "ratio": each.ratio} for each in equal_fidelity(rows)]
    return {**about, "rows": [asdict(row) for row in rows], "equal fidelity": equal}


def tables(rows: Sequence[Row], default: Layers) -> list[Table]:
    """For people at a terminal; ``default``: the set of full layers that reuse has by itself."""
    return [
        _table(title, headings, cells, words) for title, headings, cells, words in _sections(rows, default) if cells
    ]


def to_markdown(rows: Sequence[Row], default: Layers, about: dict[str, Any]) -> str:
    """The command, where it ran, and the tables."""
    lines = markdown.heading({name: value for name, value in about.items() if name != "videos"})  # rows name them
    for title, headings, cells, words in _sections(rows, default):
        if cells:
            lines += [*markdown.table(title, headings, cells), words, ""]
    return "\n".join(lines)


def _sections(rows: Sequence[Row], default: Layers) -> Iterable[tuple[str, Sequence[str], list[Sequence[str]], str]]:
    yield _TITLE, _HEADINGS, [_cells(row, default) for row in rows], _WORDS
    yield _EQUAL_TITLE, _EQUAL_HEADINGS, [_equal_cells(each, default) for each in equal_fidelity(rows)], _EQUAL_WORDS


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> Table:
    drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    drawn.caption, drawn.caption_justify = caption, "left"
    texts = {"video", "method", "setting", "merging", "layers in full"}
    for heading in headings:
        drawn.add_column(heading, justify="left" if heading in texts else "right", overflow="fold")
    for before, cells in zip([None, *rows], rows, strict=False):
        if before is not None and before[0] != cells[0]:
            drawn.add_section()
        drawn.add_row(*cells)
    return drawn


def _cells(row: Row, default: Layers) -> Sequence[str]:
    layers = "" if row.method == MERGING else layers_in_words(row.full_layers, default)
    numbers = (f"{row.cost:.3f}", f"{row.cosine:.4f}", f"{row.low:.3f}", f"{row.worst_frame:.3f}")
    return (row.clip, row.method, row.setting, layers, *numbers)


def _equal_cells(each: EqualFidelity, default: Layers) -> Sequence[str]:
    bound = "≤ " if each.at_most else ""
    return (
        each.clip,
        each.setting,
        f"{each.cosine:.4f}",
        f"{each.merging:.3f}",
        layers_in_words(each.full_layers, default),
        f"{bound}{each.reusing:.3f}",
        f"{bound}{each.ratio:.2f}",
    )


def layers_in_words(layers: Layers, default: Layers) -> str:
    """``"8, 9, 10, 11 (default)"``; ``"none"``."""
    named = ", ".join(map(str, layers)) or "none"
    return f"{named} (default)" if layers == default else named


def write_plot(rows: Sequence[Row], default: Layers, folder: Path) -> Path:
    """fidelity.png: mean cosine against cost, a panel for each video."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    clips = list(dict.fromkeys(row.clip for row in rows))
    figure, grid = plt.subplots(1, len(clips), figsize=(3.6 * len(clips) + 2, 3.8), squeeze=False, layout="constrained")
    for axes, clip in zip(grid[0], clips, strict=True):
        _draw(axes, [row for row in rows if row.clip == clip], default)
        axes.set(title=clip, xlabel="share of the encoder's work")
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel("mean cosine with the full encoder's features")
    grid[0][-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    figure.savefig(folder / "fidelity.png", dpi=120)
    plt.close(figure)
    return folder / "fidelity.png"


def _draw(axes: Any, rows: Sequence[Row], default: Layers) -> None:
    """A line for merging, and for each set of full layers one through its thresholds and one through its budgets."""
    lines: dict[tuple[str, str, Layers], list[Row]] = {}
    for row in rows:
        lines.setdefault((row.method, row.setting.split()[0], row.full_layers), []).append(row)
    colors: dict[Layers, str] = {}
    for (method, option, layers), points in lines.items():
        points.sort(key=lambda row: row.cost)
        costs, cosines = [row.cost for row in points], [row.cosine for row in points]
        if method == MERGING:
            axes.plot(costs, cosines, color="black", marker="s", label=f"merging, {option}")
            continue
        color = colors.setdefault(layers, f"C{len(colors)}")
        style = {"marker": "x", "linestyle": ":"} if option == "encode_ratio" else {"marker": "o", "linestyle": "-"}
        axes.plot(costs, cosines, color=color, label=f"{option}, full: {layers_in_words(layers, default)}", **style)
