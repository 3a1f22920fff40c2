"""The rows of ``earlytom eval --toy --pareto``: what accuracy costs, over all that a method lets one choose.

Every method at every ratio; ``plus`` at more of them, so that its curve reaches the costs of methods that act inside
the language model; ``paper`` and ``plus`` with other layers and thresholds; and cheap baselines at their best: with as
many frames as one likes, before the encoder by leaving out or averaging, and behind it by means over the blocks of
tokens that were best on 200 videos of the split ``validation`` (``grids.py``).
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from earlytom_compile.toyworld import evaluate
from earlytom_compile.toyworld.baselines import AVERAGING, BASELINES, POOLING, SUBSAMPLING
from earlytom_compile.toyworld.evaluate import RATIOS, Arm
from earlytom_compile.toyworld.installed import INNER, REUSE
from earlytom_compile.toyworld.merging import RUNS
from earlytom_compile.toyworld.methods import STAGE_1
from earlytom_compile.toyworld.world import FRAMES

PLUS, PAPER = "earlytom plus", "earlytom paper"
OF_PLUS = (PLUS, PLUS + INNER, REUSE)
"""Rows of ``plus`` as it is; the last one keeps every token."""
MORE_RATIOS = (0.75, 0.5, 0.35, 0.05)
FEW_RATIOS = (0.25, 0.10)
"""Where other layers and thresholds are tried."""
Settings = tuple[tuple[str, Any], ...]

# full_layers: the layers of 8 that compute every patch; the default is the last three.
_SETTINGS_OF_REUSE: tuple[Settings, ...] = (
    (("tau_reuse", 0.03),),
    (("tau_reuse", 0.12),),
    (("full_layers", ()),),
    (("full_layers", (7,)),),
    (("full_layers", (6, 7)),),
    (("full_layers", (4, 5, 6, 7)),),
    (("full_layers", (2, 3, 4, 5, 6, 7)),),
    (("encode_ratio", 0.35),),
    (("encode_ratio", 0.5),),
)
# The default is to merge behind layers 1 and 6 of 0 to 7, in segments of 0.6, by each segment's own threshold.
_SETTINGS_OF_MERGING: tuple[Settings, ...] = (
    (("tau_seg", 0.8),),
    (("tau_seg", 0.9),),
    (("tau_merge", 0.9),),
    (("tau_merge", 0.97),),
    (("merge_layers", (0,)),),
    (("merge_layers", (1,)),),
    (("merge_layers", (3, 6)),),
)
# Half of the language model's layers get a ratio r, the other half 0.4 r: 0.7 r on average, which is what rows without
# merging inside are compared at.
_HALFWAY: Settings = (("inner_layer", 2), ("inner_drop_ratio", 0.6))
_MEAN_OF_HALFWAY = 0.7
_CHEAPER_ENCODERS: tuple[Settings, ...] = ((), (("full_layers", (7,)),), (("full_layers", ()),))
_TAU_RUNS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
_GRIDS = ((2, 2, 2), (3, 2, 2), (4, 2, 2), (5, 2, 2), (4, 3, 2), (4, 2, 4), (4, 4, 3), (8, 2, 4))
"""Of all frames, time, height and width; the best of all shapes for 8, 12, 16, 20, 24, 32, 48 and 64 tokens."""
_GRIDS_OF_FEWER_FRAMES: dict[int, tuple[tuple[int, int, int], ...]] = {
    3: ((3, 3, 2), (3, 4, 2)),
    4: ((4, 2, 2), (4, 3, 2), (4, 2, 4)),
    5: ((5, 2, 2), (5, 4, 2)),
    6: ((3, 2, 4), (6, 2, 4)),
    7: ((4, 4, 2), (7, 4, 2)),
}
"""The same of so many frames, the others left out. Means of frames, worse than frames left out wherever both were
tried, go without blocks."""


def arms(ratios: Sequence[float] = RATIOS) -> list[Arm]:
    """All of them, all tokens first; ``ratios`` are those of every method."""
    every = [arm for arm in evaluate.arms(tuple(ratios), (evaluate.EVERY,)) if arm.method not in BASELINES]
    more = [Arm(name, ratio) for name, ratio in product((PLUS, PLUS + INNER), MORE_RATIOS)]
    return list(dict.fromkeys([*every, *more, *_halfway((*ratios, *MORE_RATIOS)), *_tried(), *_runs(), *_baselines()]))


def _halfway(ratios: Sequence[float]) -> Iterator[Arm]:
    """``plus`` with as many tokens a layer of the language model as each ratio means, more before its middle."""
    for encoder, ratio in product(_CHEAPER_ENCODERS, ratios):
        if ratio <= _MEAN_OF_HALFWAY:
            yield Arm(PLUS + INNER, round(ratio / _MEAN_OF_HALFWAY, 3), (*encoder, *_HALFWAY))


def _tried() -> Iterator[Arm]:
    """EarlyTom with other layers and thresholds, with all tokens of its first stage and with few."""
    for name, all_tokens, settings in (
        (PLUS, REUSE, _SETTINGS_OF_REUSE),
        (PAPER, STAGE_1, _SETTINGS_OF_MERGING),
    ):
        for some in settings:
            yield Arm(all_tokens, None, some)
            yield from (Arm(name, ratio, some) for ratio in FEW_RATIOS)


def _runs() -> Iterator[Arm]:
    for tau_run, ratio in product(_TAU_RUNS, (None, *FEW_RATIOS)):
        yield Arm(RUNS, ratio, (("tau_run", tau_run),))


def _baselines() -> Iterator[Arm]:
    for name, frames in product((SUBSAMPLING, AVERAGING), range(1, FRAMES)):
        yield Arm(name, None, (("frames", frames),))
    for frames, grids in _GRIDS_OF_FEWER_FRAMES.items():
        yield from (Arm(SUBSAMPLING, None, (("frames", frames), ("grid", grid))) for grid in grids)
    yield from (Arm(POOLING, None, (("grid", grid),)) for grid in _GRIDS)
