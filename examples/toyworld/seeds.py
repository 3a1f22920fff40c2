"""One row of several models: what is trained from another seed answers otherwise.

    over_models([row_of_seed_0, row_of_seed_1, row_of_seed_2])    ->    a row whose accuracy is the mean of theirs

All of them were asked the same questions. The interval is that of other videos, not of other seeds: videos are drawn
with replacement, the same ones for every model, and the mean over the models is taken of each draw. Three seeds are too
few to draw from; what each one comes to stands beside the mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from earlytom_compile.toyworld.evaluate import Cost, Result


@dataclass(frozen=True)
class OverModels(Result):
    """``right`` and ``asked`` are how many models were right and how many were asked, int [V, C]; costs are means, and
    ``ttft`` are the times of all of them. ``each``: what it is made of."""

    each: tuple[Result, ...] = ()


def over_models(results: Sequence[Result]) -> Result:
    """The same row of several models, as one; that of one model is what it is."""
    first, *others = results
    if not others:
        return first
    assert all(np.array_equal(first.asked, other.asked) for other in others), "they were asked different questions"
    return OverModels(
        first.arm,
        Cost(*np.mean([result.cost for result in results], axis=0).tolist()),
        np.stack([result.right for result in results]).sum(0, dtype=np.int64),
        np.stack([result.asked for result in results]).sum(0, dtype=np.int64),
        tuple(seconds for result in results for seconds in result.ttft),
        first.categories,
        tuple(results),
    )
