"""How much of a video was computed where unchanged patches are not computed again, in numbers and in words.

computed_patches(source, change, measured)    # of what plan_reuse returned, a ComputedPatches for each video
ComputedPatches(by_frame=(729, 140, 152), places=729, changed=0.45, noise=0.007, threshold=0.061).told(config, 26)
-> "1,021 of 2,187 patches (46.7%) are computed: all of the first frame, then those that changed. ..."
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import EarlyTomConfig


@dataclass(frozen=True)
class ComputedPatches:
    """Of one video of F frames."""

    by_frame: tuple[int, ...]
    """[F]: patches that were computed in each frame."""
    places: int
    """S, patches of a frame, class tokens and the like included."""
    changed: float
    """Share of all F·S patches that changed since they were last computed, those of the first frame included."""
    noise: float
    """Of the video, in normalised pixels, as ``plan_reuse`` measures it."""
    threshold: float
    """The change up to which a patch counted as unchanged."""
    distinct: int | None = None
    """Frames that layers in full computed: those that repeat no other to the last pixel. None: all F."""

    @property
    def total(self) -> int:
        """T."""
        return sum(self.by_frame)

    @property
    def every(self) -> int:
        """F·S."""
        return len(self.by_frame) * self.places

    @property
    def reused(self) -> bool:
        """Whether any patch was taken over."""
        return self.total < self.every

    def in_short(self) -> str:
        """``"1,021 of 2,187 patches (46.7%)"``."""
        return f"{self.total:,} of {self.every:,} patches ({self.total / self.every:.1%})"

    def told(self, config: EarlyTomConfig, layers: int) -> str:
        """What was computed and why, in sentences; ``layers``: of the vision encoder."""
        if not self.reused:
            return self._why_nothing(config)
        text = (
            f"{self.in_short()} are computed: all of the first frame, then those that changed. The others take over "
            "what was computed of them then. "
        )
        full, frames = config.resolve_full_layers(layers), len(self.by_frame)
        named = f" Encoder layer{'s' if len(full) > 1 else ''} {', '.join(map(str, full))} computed every patch"
        if self.distinct not in (None, frames):
            named += f" of {self.distinct} of the {frames} frames; the others repeat one of these to the last pixel"
        return text + self._limit(config) + (f"{named}." if full else "")

    def frame_by_frame(self) -> str:
        """Percent of each frame, such as ``"100 19 21"``."""
        return " ".join(f"{100 * count / self.places:.0f}" for count in self.by_frame)

    def _why_nothing(self, config: EarlyTomConfig) -> str:
        if len(self.by_frame) == 1:
            return "Nothing was reused: the video has one frame."
        if config.encode_ratio is not None:
            return f"Nothing was reused: encode_ratio={config.encode_ratio:g} has every patch computed."
        return (
            f"Nothing was reused: {self.changed:.1%} of the patches changed, those of the first frame included, as "
            "under a moving camera. Where so few are left, every patch is computed. " + self._limit(config)
        )

    def _limit(self, config: EarlyTomConfig) -> str:
        differs = f"where it differs from then by more than {self.threshold:.3g}"
        if config.encode_ratio is not None:
            return f"encode_ratio={config.encode_ratio:g} says how many: those that changed most, above all {differs}."
        return (
            f"A patch counts as changed {differs}, which comes of tau_reuse={config.tau_reuse:g} and the noise "
            f"measured in this video, {self.noise:.3g}."
        )


def patches_of(report: Mapping[str, Any]) -> list[ComputedPatches]:
    """Of each video of a report's last call, from ``report(model).to_dict()``; empty where patches were not reused."""
    return [ComputedPatches(**video["patches"]) for video in report["videos"] if "patches" in video]


def share_computed(counts: Sequence[ComputedPatches]) -> float | None:
    """Of the patches of all these videos; None without any."""
    return sum(each.total for each in counts) / sum(each.every for each in counts) if counts else None


def computed_patches(
    source: Tensor, change: Tensor, measured: Tensor, distinct: Tensor | None = None
) -> list[ComputedPatches]:
    """What ``plan_reuse`` decided about each video; waits for the device.

    Args:
        source: int64 [V, F, S], the frame in which each place was last computed.
        change: float32 [V, F, S], how much each place differed from then.
        measured: float32 [V, 2], noise and threshold.
        distinct: int64 [V], frames that layers in full computed; None: all F.
    """
    own = source == torch.arange(source.shape[1], device=source.device)[:, None]
    unchanged = change <= measured[:, 1, None, None]  # what is not finite never is
    frames = [None] * len(source) if distinct is None else distinct.tolist()
    shares = (~unchanged).double().mean((1, 2)).tolist()
    return [
        ComputedPatches(tuple(by_frame), source.shape[2], changed, noise, threshold, count)
        for by_frame, changed, (noise, threshold), count in zip(
            own.sum(2).tolist(), shares, measured.tolist(), frames, strict=True
        )
    ]
