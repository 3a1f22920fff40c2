"""The rows of ``earlytom eval --toy --pareto``: what accuracy costs, over all that a method lets one choose.

Every method at every ratio; ``plus`` at more of them, so that its curve reaches the costs of methods that act inside
the language model; ``paper`` and ``plus`` with other layers and thresholds; and cheap baselines at their best: with as
many frames as one likes, before the encoder by leaving out or averaging, and behind it by means over the blocks of
tokens that were best on 200 videos of the split ``validation`` of the toy world (``grids.py``).

Layers, frames and blocks are written for the toy world, whose encoder has 8 layers, whose language model has 4, and
whose videos have 8 frames of 4 x 4 tokens. In another world they are the same shares of what it has; blocks that were
best there nobody looked for.
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
from earlytom_compile.toyworld.worlds import TOY, World

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
_DROPPED_HALFWAY = 0.6
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


def arms(ratios: Sequence[float] = RATIOS, world: World = TOY) -> list[Arm]:
    """All of them, all tokens first; ``ratios`` are those of every method."""
    every = [arm for arm in evaluate.arms(tuple(ratios), (evaluate.EVERY,), (), world) if arm.method not in BASELINES]
    more = [Arm(name, ratio) for name, ratio in product((PLUS, PLUS + INNER), MORE_RATIOS)]
    halfway = _halfway((*ratios, *MORE_RATIOS), world)
    return list(dict.fromkeys([*every, *more, *halfway, *_tried(world), *_runs(), *_baselines(world)]))


def _scaled(settings: Settings, world: World) -> Settings:
    """Layers at the same share of the encoder's depth."""
    scaled = {"full_layers": _last_layers, "merge_layers": _layers}
    return tuple((name, scaled[name](value, world) if name in scaled else value) for name, value in settings)


def _layers(of_toy: Sequence[int], world: World) -> tuple[int, ...]:
    """Those behind which as much of the encoder lies as behind these."""
    return tuple((layer + 1) * world.encoder_layers // TOY.encoder_layers - 1 for layer in of_toy)


def _last_layers(of_toy: Sequence[int], world: World) -> tuple[int, ...]:
    """As large a share of them, at the end."""
    depth = world.encoder_layers
    return tuple(range(depth - len(of_toy) * depth // TOY.encoder_layers, depth))


def _halfway(ratios: Sequence[float], world: World) -> Iterator[Arm]:
    """``plus`` with as many tokens a layer of the language model as each ratio means, more before its middle."""
    depth = world.language_layers
    layer = depth // 2
    mean = (layer + (depth - layer) * (1 - _DROPPED_HALFWAY)) / depth
    inside: Settings = (("inner_layer", layer), ("inner_drop_ratio", _DROPPED_HALFWAY))
    for encoder, ratio in product(_CHEAPER_ENCODERS, ratios):
        if ratio <= mean:
            yield Arm(PLUS + INNER, round(ratio / mean, 3), (*_scaled(encoder, world), *inside))


def _tried(world: World) -> Iterator[Arm]:
    """EarlyTom with other layers and thresholds, with all tokens of its first stage and with few."""
    for name, all_tokens, settings in (
        (PLUS, REUSE, _SETTINGS_OF_REUSE),
        (PAPER, STAGE_1, _SETTINGS_OF_MERGING),
    ):
        for some in (_scaled(each, world) for each in settings):
            yield Arm(all_tokens, None, some)
            yield from (Arm(name, ratio, some) for ratio in FEW_RATIOS)


def _runs() -> Iterator[Arm]:
    for tau_run, ratio in product(_TAU_RUNS, (None, *FEW_RATIOS)):
        yield Arm(RUNS, ratio, (("tau_run", tau_run),))


def _baselines(world: World) -> Iterator[Arm]:
    times, sides = world.frames // TOY.frames, world.side // TOY.side
    for name, frames in product((SUBSAMPLING, AVERAGING), range(1, TOY.frames)):
        yield Arm(name, None, (("frames", times * frames),))
    for frames, grids in _GRIDS_OF_FEWER_FRAMES.items():
        for t, height, width in grids:
            grid = (times * t, sides * height, sides * width)
            yield Arm(SUBSAMPLING, None, (("frames", times * frames), ("grid", grid)))
    for t, height, width in _GRIDS:
        yield Arm(POOLING, None, (("grid", (times * t, sides * height, sides * width)),))
