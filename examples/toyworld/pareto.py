"""Which rows nothing beats, and how far ``plus`` is ahead at equal cost.

    front([1.0, 2.0, 3.0], [0.8, 0.9, 0.85])    # [True, True, False]: the third costs more than the second, for less
    ahead(rows_of_plus, row, flops_of)          # (0.061, 0.052, 0.070): 6.1 points, with their interval

A row is on the front if no other has at least its accuracy at no more cost, unless both are equal. The curve of
``plus`` is the front of its own rows, with straight lines between them: what lies between two settings could be had by
taking each for some of the videos. Behind its last point it goes on level as far as ``plus`` was tried.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from earlytom_compile.toyworld.evaluate import Result, interval

CostOf = Callable[[Result], float | None]
"""What a row costs; None where nobody knows."""


@dataclass(frozen=True)
class Lead:
    """Accuracy on the curve less that of a row, and its 95 % interval over videos, both answering about the same."""

    points: float
    low: float
    high: float


def flops_of(result: Result) -> float | None:
    """Operations of a whole prefill."""
    return result.cost.flops


def ttft_of(result: Result) -> float | None:
    """Median seconds to the first token."""
    return median(result.ttft) if result.ttft else None


def front(costs: Sequence[float | None], accuracies: Sequence[float]) -> list[bool]:
    """Which rows are on it; one of unknown cost is not."""
    best: dict[float, float] = {}  # accuracy by cost, along the front
    reached = -math.inf
    for cost, lost in sorted((cost, -each) for cost, each in zip(costs, accuracies, strict=True) if cost is not None):
        if -lost > reached:
            best[cost] = reached = -lost
    return [cost is not None and best.get(cost) == each for cost, each in zip(costs, accuracies, strict=True)]


def on_front(results: Sequence[Result], cost_of: CostOf) -> list[bool]:
    """The same of rows."""
    return front([cost_of(result) for result in results], [result.accuracy() for result in results])


def mixture(costs: Sequence[float], accuracies: Sequence[float], cost: float) -> list[tuple[int, float]]:
    """Which points of a curve, and which shares of them, come to ``cost``: [] outside what was tried.

    ``costs`` and ``accuracies``: of all that was tried, of which the curve takes what is on the front.
    """
    if not costs or not min(costs) <= cost <= max(costs):
        return []
    kept = front(costs, accuracies)
    corners = sorted((costs[i], i) for i in range(len(costs)) if kept[i])
    below = [corner for corner in corners if corner[0] <= cost][-1]
    above = next((corner for corner in corners if corner[0] > cost), None)
    if above is None:
        return [(below[1], 1.0)]
    share = (cost - below[0]) / (above[0] - below[0])
    return [(below[1], 1 - share), (above[1], share)]


def ahead(plus: Sequence[Result], row: Result, cost_of: CostOf) -> Lead | None:
    """How far the curve through the rows of ``plus`` lies above ``row`` at its cost; None where it does not reach."""
    cost = cost_of(row)
    known = [(each, spent) for each in plus if (spent := cost_of(each)) is not None]
    if cost is None:
        return None
    parts = mixture([spent for _, spent in known], [each.accuracy() for each, _ in known], cost)
    if not parts:
        return None
    right = sum(share * known[place][0].right for place, share in parts) - row.right
    low, high = interval(right, row.asked)
    return Lead(float(right.sum() / row.asked.sum()), low, high)
