"""Which evaluations ``earlytom eval --tasks`` makes, and with which settings: Table 8's where it has some.

    plan(["mvbench", "mlvu_dev"], (0.25, 0.1), {}, half_billion=False)
    ->  mvbench, all tokens;           mlvu_dev, all tokens;
        mvbench, 25%, preset mvbench;  mlvu_dev, 25%, default settings; ...

All tokens come first: every other accuracy is told beside that of the same model, questions and versions.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import EarlyTomConfigError
from ..methods.registry import EARLYTOM
from ..presets import PRESET_RATIOS
from .options import given_options

BENCHMARKS = ("mvbench", "egoschema", "longvideobench", "videomme")
"""Those of Table 8; tasks of lmms-eval are named after them, such as longvideobench_val_v."""


@dataclass(frozen=True)
class Evaluation:
    """One task with one share of its video tokens."""

    task: str
    retain_ratio: float | None
    """None: the full model."""
    options: dict[str, Any]
    """Those of :class:`EarlyTomConfig` beside the ratio; empty for the full model."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.task}, {'all tokens' if self.retain_ratio is None else f'{self.retain_ratio:.0%}'}"

    @property
    def key(self) -> tuple[str, float | None]:
        """What tells it from others of the same run."""
        return self.task, self.retain_ratio

    @property
    def settings(self) -> str:
        """Where its settings are from, in a word."""
        if self.retain_ratio is None:
            return ""
        preset = self.options.get("preset")
        return "default" if preset is None else str(preset)


def plan(
    tasks: Sequence[str], ratios: Sequence[float], options: Mapping[str, Any], *, half_billion: bool
) -> list[Evaluation]:
    """Every evaluation, in the order in which they run: the full model's, then ratio by ratio.

    ``options``: what the user asked for, which wins over presets; a ``preset`` among them, None included, is that of
    every task. Raises :class:`EarlyTomConfigError` for values that cannot be, and for what is asked for twice.
    """
    for name, given in (("tasks", tasks), ("retain_ratios", ratios)):
        twice = next((one for one in given if list(given).count(one) > 1), None)
        if twice is not None:
            raise EarlyTomConfigError(f"{name}: {twice} is there twice.")
    compressed = [
        Evaluation(task, ratio, _options(task, ratio, options, half_billion)) for ratio in ratios for task in tasks
    ]
    return [*(Evaluation(task, None, {}) for task in tasks), *compressed]


def with_variant(tasks: Sequence[str], ratios: Sequence[float], options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` with the one variant of a whole table, where nobody chose it: the paper's if a task takes a row of
    Table 8, which is for it. Otherwise it is left to be the default."""
    ours = options.get("method", EARLYTOM) == EARLYTOM and options.get("variant") is None
    if "preset" in options:
        rows = options["preset"] is not None
    else:
        rows = any(preset_of(task, ratio, half_billion=False) for task in tasks for ratio in ratios)
    return {**options, "variant": "paper"} if ours and rows else dict(options)


def preset_of(task: str, ratio: float, *, half_billion: bool) -> str | None:
    """The row of Table 8 for a task of lmms-eval; None where it has none for the benchmark or the ratio."""
    if ratio not in PRESET_RATIOS:
        return None
    named = (benchmark for benchmark in BENCHMARKS if task == benchmark or task.startswith(f"{benchmark}_"))
    benchmark = next(named, None)
    return f"{benchmark}-0.5b" if benchmark and half_billion else benchmark


def _options(task: str, ratio: float, options: Mapping[str, Any], half_billion: bool) -> dict[str, Any]:
    preset = options["preset"] if "preset" in options else preset_of(task, ratio, half_billion=half_billion)
    found = {name: value for name, value in {**options, "preset": preset}.items() if value is not None}
    given_options(argparse.Namespace(**found, retain_ratio=ratio))
    return found
