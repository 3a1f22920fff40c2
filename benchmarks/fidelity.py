"""How far a cheaper vision encoder is from the full one: its features of real clips, and its share of the work.

    rows = [measure(tower, "talk", pixels, full, arm) for arm in arms((0.6, 0.8), (0.04, 0.06), (), ((11,),))]
    rows[0]                      # merging at tau_seg 0.6: cost 0.70, mean cosine 0.945
    equal_fidelity(rows)[0]      # reuse costs 0.63 of what merging does where it is as near to the full features

Cost is the share of the encoder's layer work: products of matrices and of attention, which are in proportion to the
rows that go through a layer. Fidelity is the cosine of each place of each frame with the full encoder's, without any
weighting. Where frames merged, the merged one stands for each of its frames.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from earlytom_compile.config import EarlyTomConfig
from earlytom_compile.integrations.tower import MergedFrames, compile_tower

MERGING, REUSING = "paper", "reuse"
_NO_FLOOR = 1e-9
"""A ``retain_ratio`` that forbids no merge: how many tokens stay is not asked here."""


@dataclass(frozen=True)
class Tower:
    """A vision encoder and what is known of it."""

    name: str
    module: nn.Module
    """Takes pixels [F, 3, H, W] as its own processor makes them."""
    layers: int


@dataclass(frozen=True)
class Arm:
    """One cheaper encoder."""

    method: str
    """:data:`MERGING` or :data:`REUSING`."""
    setting: str
    """What decides its cost, such as ``tau_seg 0.6``."""
    full_layers: tuple[int, ...]
    """Of :data:`REUSING`: layers that compute every place."""
    options: dict[str, Any]
    """Those of ``compile_tower``."""

    @property
    def key(self) -> tuple[str, str, tuple[int, ...]]:
        """What tells it from others."""
        return self.method, self.setting, self.full_layers


@dataclass(frozen=True)
class Row:
    """What one arm made of one clip."""

    clip: str
    method: str
    setting: str
    full_layers: tuple[int, ...]
    """As the arm's."""
    cost: float
    """Share of the full encoder's layer work."""
    cosine: float
    """Mean over all places of all frames."""
    low: float
    """The 5th percentile of places."""
    worst_frame: float
    """The lowest mean of a frame."""

    @property
    def key(self) -> tuple[str, str, str, tuple[int, ...]]:
        """What tells it from others."""
        return self.clip, self.method, self.setting, self.full_layers


@dataclass(frozen=True)
class EqualFidelity:
    """Cost of reuse where its mean cosine is that of merging."""

    clip: str
    setting: str
    """Of merging."""
    cosine: float
    full_layers: tuple[int, ...]
    """Of reuse."""
    merging: float
    """Cost of merging."""
    reusing: float
    """Cost of reuse, between the measured points around it."""
    at_most: bool
    """Whether even the cheapest measured point is better, so that the true cost is lower."""

    @property
    def ratio(self) -> float:
        """Reuse / merging."""
        return self.reusing / self.merging


def arms(
    tau_segs: Iterable[float],
    tau_reuses: Iterable[float],
    encode_ratios: Iterable[float],
    full_layers: Iterable[tuple[int, ...]],
) -> list[Arm]:
    """Merging at each ``tau_segs``; reuse at each threshold and each budget with each set of full layers."""
    merging = {"variant": "paper", "reuse": False, "retain_ratio": _NO_FLOOR}
    found = [Arm(MERGING, f"tau_seg {tau:g}", (), {**merging, "tau_seg": tau}) for tau in tau_segs]
    chosen = [("tau_reuse", tau) for tau in tau_reuses] + [("encode_ratio", ratio) for ratio in encode_ratios]
    for layers in full_layers:
        for name, value in chosen:
            options = {"variant": "plus", "reuse": True, "full_layers": layers, name: value}
            found.append(Arm(REUSING, f"{name} {value:g}", layers, options))
    return found


@torch.no_grad()
def full_features(tower: Tower, pixels: Tensor, frames_at_once: int = 8) -> Tensor:
    """[F, S, D] of pixels [F, 3, H, W]; a few frames at once, which need less memory."""
    pixels = pixels.to(next(tower.module.parameters()).dtype)
    return torch.cat([tower.module(part).last_hidden_state for part in pixels.split(frames_at_once)])


def compiled(tower: Tower, arm: Arm) -> Any:
    """The arm's encoder; an error where it would run uncompressed."""
    return compile_tower(tower.module, lowering="eager", strict=True, **arm.options)


def measure(tower: Tower, encode: Any, clip: str, pixels: Tensor, full: Tensor, arm: Arm) -> Row:
    """Encode one clip [F, 3, H, W] by ``arm`` and compare with ``full`` [F, S, D]; ``encode``: of :func:`compiled`."""
    encoded = encode(pixels)
    cosines = torch.cosine_similarity(_of_every_frame(encoded, len(pixels)).float(), full.float(), dim=-1)
    return Row(
        clip=clip,
        method=arm.method,
        setting=arm.setting,
        full_layers=arm.full_layers,
        cost=_cost(encoded, len(pixels), encode.config, tower.layers),
        cosine=float(cosines.mean()),
        low=float(cosines.flatten().quantile(0.05)),
        worst_frame=float(cosines.mean(1).min()),
    )


def _of_every_frame(encoded: MergedFrames, frames: int) -> Tensor:
    """[F, S, D]: what stands for each frame that went in."""
    stands_for = torch.empty(frames, dtype=torch.int64)
    for row, source in enumerate(encoded.sources):
        for frame, _ in source:
            stands_for[frame] = row
    return encoded.hidden[stands_for.to(encoded.hidden.device)]


def _cost(encoded: MergedFrames, frames: int, config: EarlyTomConfig, layers: int) -> float:
    """Share of the layer work: rows that went through the layers, of those that go through them in full."""
    if config.reuses():
        source = encoded.computed_in
        own = torch.arange(frames)[:, None]
        share = 1.0 if source is None else float((source.cpu() == own).float().mean())
        whole = 1.0 if encoded.distinct is None else encoded.distinct / frames
        in_full = len(config.resolve_full_layers(layers))
        return (in_full * whole + (layers - in_full) * share) / layers
    merges = [layer + 1 for layer in config.resolve_merge_layers(layers)]
    of_layers = zip(encoded.frame_counts, [0, *merges], [*merges, layers], strict=True)
    return sum(count * (end - begin) for count, begin, end in of_layers) / (frames * layers)


def equal_fidelity(rows: Sequence[Row]) -> list[EqualFidelity]:
    """Of each clip, each row of merging beside each set of full layers that reuse was measured with.

    Budgets are no part of it: they spread the same work in the same way.
    """
    found = []
    for merging in (row for row in rows if row.method == MERGING):
        curves: dict[tuple[int, ...], list[tuple[float, float]]] = {}
        for row in rows:
            if row.clip == merging.clip and row.method == REUSING and row.setting.startswith("tau_reuse"):
                curves.setdefault(row.full_layers, []).append((row.cost, row.cosine))
        for layers, points in curves.items():
            cost, at_most = cost_at(points, merging.cosine)
            found.append(
                EqualFidelity(merging.clip, merging.setting, merging.cosine, layers, merging.cost, cost, at_most)
            )
    return found


def cost_at(points: Sequence[tuple[float, float]], cosine: float) -> tuple[float, bool]:
    """The least cost at which straight lines through ``points``, (cost, cosine), reach ``cosine``; the full encoder,
    (1, 1), is their end. And whether the cheapest point is better already, so that it is less than that.

    A point that costs more than another and is no better is left out: nobody would choose it.
    """
    best: list[tuple[float, float]] = []
    for point in sorted([*points, (1.0, 1.0)], key=lambda point: (point[0], -point[1])):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    if best[0][1] >= cosine:
        return best[0][0], best[0][1] > cosine
    for (cost, low), (more, high) in zip(best, best[1:], strict=False):
        if high >= cosine:
            return cost + (more - cost) * (cosine - low) / (high - low), False
    return best[-1][0], False
