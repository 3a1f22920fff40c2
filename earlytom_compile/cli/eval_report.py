"""What ``earlytom eval --tasks`` prints and writes: Table 1, every evaluation by itself, JSON and Markdown.

| method         | retained | FLOPs (T) | FLOPs ratio | TTFT (ms) | tokens/s | mvbench | videomme | avg. score |     % |
| all tokens     |     100% |      82.6 |      100.0% |       890 |     24.4 |    58.3 |     58.6 |       58.5 | 100.0 |
| earlytom paper |      10% |      32.2 |       39.0% |       336 |     31.6 |    56.5 |     55.8 |       56.2 |  96.1 |

(made-up numbers; "–" where nothing was measured)
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table

from ..benchmarks import markdown
from ..config import EarlyTomConfig
from ..flops import Reuse, count
from ..flops_inside import lengths_inside
from ..methods.base import Step
from ..methods.registry import EARLYTOM
from ..shapes import ModelShape
from ..words import counted
from .eval_score import Score, unit_of

ALL_TOKENS = "all tokens"
_NOTHING = "–"
_BEFORE = ("method", "retained", "FLOPs (T)", "FLOPs ratio", "TTFT (ms)", "tokens/s")
_BEHIND = ("avg. score", "%")
_DETAILS = (
    "task", "retained", "settings", "score", "of full", "questions", "TTFT (ms)", "frames left", "patches",
    "video tokens", "frames/s", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One evaluation that is done."""

    task: str
    retain_ratio: float | None
    settings: str
    options: dict[str, Any]
    score: Score
    costs: dict[str, float]
    """As ``EarlyTom.costs()`` of the lmms-eval plugin has them; what does not apply is not there."""
    tokens_per_second: float | None
    seconds: float
    """Of the whole evaluation, reading the videos and compiling included."""
    results: dict[str, Any]
    """Everything lmms-eval says of the task and its subtasks."""
    questions: str
    """A digest of what was asked; "" where lmms-eval does not tell."""
    run: str
    """When the command began that evaluated it."""

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Cell":
        """One of those that :func:`to_dict` wrote."""
        score = Score(**{**content["score"], "subtasks": tuple(content["score"]["subtasks"])})
        return cls(**{name: content[name] for name in cls.__dataclass_fields__ if name != "score"}, score=score)

    @property
    def key(self) -> tuple[str, float | None]:
        """As that of the evaluation."""
        return self.task, self.retain_ratio


class Report:
    """Tables of ``cells``: the full model's, and of compressed ones only what stands beside those.

    ``shape``: sizes of the model, for its work; None where they are not known. ``limit``: questions of a task that were
    asked, None for all.
    """

    def __init__(self, cells: Sequence[Cell], shape: ModelShape | None, limit: int | None) -> None:
        self._full = {cell.task: cell for cell in cells if cell.retain_ratio is None}
        self._cells = [cell for cell in cells if cell.task in self._full]
        self._shape = shape
        self._limit = limit
        self.tasks = list(self._full)

    def percent(self, cell: Cell) -> float:
        """The score of ``cell`` as a percentage."""
        return cell.score.value * self._unit(cell)

    def _unit(self, cell: Cell) -> float:
        return unit_of(cell.score.value, self._full[cell.task].score.value)

    def of_full(self, cell: Cell) -> float | None:
        """The share of the full model's score that ``cell`` has; None where that is 0 or lower scores are better."""
        full = self._full[cell.task].score
        return cell.score.value / full.value if full.value and full.higher_is_better else None

    def stderr(self, cell: Cell) -> float | None:
        """In percentage points."""
        return None if cell.score.stderr is None else cell.score.stderr * self._unit(cell)

    def rows(self) -> list[dict[str, Any]]:
        """Table 1: a row for all tokens and for each ratio; what a row does not have of every task is None."""
        ratios = sorted({cell.retain_ratio: None for cell in self._cells}, key=lambda ratio: ratio is not None)
        found = [self._row([cell for cell in self._cells if cell.retain_ratio == ratio]) for ratio in ratios]
        full = found[0] if found else {}
        for row in found:
            row["of_full_tflop"] = _share(row["tflop"], full["tflop"])
            row["of_full_score"] = _share(row["score"], full["score"])
        return found

    def _row(self, cells: Sequence[Cell]) -> dict[str, Any]:
        by_task = {cell.task: cell for cell in cells}
        complete = len(by_task) == len(self.tasks)
        averaged = [cell for cell in cells if self._full[cell.task].score.higher_is_better]

        def mean(of: Callable[[Cell], float | None], over: Sequence[Cell] = cells) -> float | None:
            known = [value for value in map(of, over) if value is not None]
            return statistics.fmean(known) if complete and known and len(known) == len(over) else None

        return {
            "method": _method(cells[0]),
            "retain_ratio": cells[0].retain_ratio,
            "tflop": mean(self.tflop),
            "ttft_ms": mean(lambda cell: cell.costs.get("ttft_ms")),
            "tokens_per_second": mean(lambda cell: cell.tokens_per_second),
            "scores": {task: self.percent(by_task[task]) if task in by_task else None for task in self.tasks},
            "score": mean(self.percent, averaged),
        }

    def tflop(self, cell: Cell) -> float | None:
        """Work of a prefill by Eq. 8, in T, with the frames and tokens that were measured.

        As in Table 5, one share of the frames is left by all merge layers together; it is counted behind each of them.
        Where unchanged patches are reused, it is counted with the share of them that was computed, and where tokens are
        left out inside the language model, with what is left behind each step.
        """
        costs, shape = cell.costs, self._shape
        if shape is None or not {"video_frames", "stage1_retention", "video_tokens_kept"} <= costs.keys():
            return None
        schedule: tuple[float, ...] = (costs["video_frames"],)
        layers: tuple[int, ...] | None = None
        reuse: Reuse | None = None
        steps: tuple[Step, ...] = ()
        if cell.retain_ratio is not None:
            config = EarlyTomConfig.from_options({**cell.options, "retain_ratio": cell.retain_ratio})
            if config.reuses() and "patches_computed" in costs:
                computed = costs["patches_computed"] * costs["video_frames"] * shape.frame_tokens
                reuse = Reuse(computed, config.resolve_full_layers(shape.vision_layers))
            steps = config.steps_inside(shape.llm_layers)
            layers = config.resolve_merge_layers(shape.vision_layers, shape.full_layers)
            schedule += (costs["video_frames"] * costs["stage1_retention"],) * len(layers)
        tokens = round(costs["video_tokens_kept"])
        given: dict[str, Any] = {"protocol": "paper", "frames_schedule": schedule, "merge_layers": layers}
        lengths = lengths_inside(tokens, [tokens], steps)
        return count(shape, **given, llm_tokens=lengths, reuse=reuse).total / 1e12

    def sections(self) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
        """(title, headings, rows) of both tables."""
        headings = (*_BEFORE, *self.tasks, *_BEHIND)
        return [
            ("accuracy in percent, and what it costs", headings, list(map(_table_1_cells, self.rows()))),
            ("every evaluation", _DETAILS, list(map(self._detail_cells, self._cells))),
        ]

    def _detail_cells(self, cell: Cell) -> tuple[str, ...]:
        costs, error, share = cell.costs, self.stderr(cell), self.of_full(cell)
        tokens = _NOTHING
        if "video_tokens" in costs:
            tokens = f"{costs['video_tokens']:.0f} -> {costs['video_tokens_kept']:.0f}"
        return (
            cell.task,
            _retained(cell.retain_ratio),
            cell.settings,
            f"{self.percent(cell):.1f}" + ("" if error is None else f" ± {error:.1f}"),
            _percent(share),
            str(cell.score.samples),
            _number(costs.get("ttft_ms"), 0),
            _percent(costs.get("stage1_retention")),
            _percent(costs.get("patches_computed")),
            tokens,
            _number(costs.get("frames_per_second"), 1),
            f"{cell.seconds:.0f}",
        )

    def notes(self) -> list[str]:
        """What a reader must know to take the numbers for what they are."""
        metrics = ", ".join(f"{task}: {_metric(cell.score)}" for task, cell in self._full.items())
        found = [f"Scores are lmms-eval's: {metrics}; ± one standard error where it gives one."]
        if "default" in {cell.settings for cell in self._cells}:
            found.append("settings: a preset is a row of the paper's Table 8; default: those of EarlyTomConfig.")
        if self._limit:
            found.append(f"Only the first {counted(self._limit, 'question')} of each task: no result of a benchmark.")
        if any(cell.options.get("lowering") != "eager" for cell in self._cells if cell.options):
            found.append("Compressed models are compiled and the full one is not: their times do not compare.")
        if (runs := len({cell.run for cell in self._cells})) > 1:
            found.append(f"Evaluated in {runs} runs of the command: times compare within one of them only.")
        worse = [task for task, cell in self._full.items() if not cell.score.higher_is_better]
        if worse:
            found.append(f"Lower is better in {', '.join(worse)}, which is not part of the score.")
        for cell in self._cells:
            if cell.score.empty:
                found.append(
                    f"{cell.task}, {_retained(cell.retain_ratio)}: {counted(cell.score.empty, 'answer')} of "
                    f"{cell.score.samples} empty, which some tasks leave out of their score."
                )
        return found

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        cells = [
            {
                **asdict(cell),
                "percent": self.percent(cell),
                "stderr_percent": self.stderr(cell),
                "of_full": self.of_full(cell),
                "tflop": self.tflop(cell),
            }
            for cell in self._cells
        ]
        return {"rows": self.rows(), "evaluations": cells, "notes": self.notes() if cells else []}

    def to_markdown(self, about: dict[str, Any]) -> str:
        """For documents: command, machine, versions and date, and the tables."""
        lines = markdown.heading({name: value for name, value in about.items() if value is not None})
        for section in self.sections():
            lines += markdown.table(*section)
        return "\n".join([*lines, *(f"- {note}" for note in self.notes())]) + "\n"

    def tables(self) -> list[Table]:
        """For people at a terminal."""
        printed = [_table(*section) for section in self.sections()]
        printed[-1].caption, printed[-1].caption_justify = "\n".join(self.notes()), "left"
        return printed


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, heading in enumerate(headings):
        drawn.add_column(heading, justify="right" if index else "left", overflow="fold")
    for cells in rows:
        drawn.add_row(*cells)
    return drawn


def _table_1_cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["method"],
        _retained(row["retain_ratio"]),
        _NOTHING if row["tflop"] is None else f"{row['tflop']:.3g}",
        _percent(row["of_full_tflop"]),
        _number(row["ttft_ms"], 0),
        _number(row["tokens_per_second"], 1),
        *(_number(score, 1) for score in row["scores"].values()),
        _number(row["score"], 1),
        _percent(row["of_full_score"]).removesuffix("%"),
    )


def _method(cell: Cell) -> str:
    if cell.retain_ratio is None:
        return ALL_TOKENS
    config = EarlyTomConfig.from_options({**cell.options, "retain_ratio": cell.retain_ratio})
    name = f"earlytom {config.variant}" if config.method == EARLYTOM else config.method
    return name if config.inner_layer is None else f"{name}, inner"


def _metric(score: Score) -> str:
    of = f", mean of {counted(len(score.subtasks), 'task')}" if score.subtasks else ""
    return f"{score.metric.partition(',')[0]}{of}"


def _retained(ratio: float | None) -> str:
    return "100%" if ratio is None else f"{100 * ratio:g}%"


def _share(value: float | None, full: float | None) -> float | None:
    return None if value is None or not full else value / full


def _number(value: float | None, digits: int) -> str:
    return _NOTHING if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _percent(share: float | None) -> str:
    return _NOTHING if share is None or math.isnan(share) else f"{share:.1%}"
