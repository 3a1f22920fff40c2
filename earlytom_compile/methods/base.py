"""What a method of compression is to the rest of the package.

    behind the encoder         keep(FrameTokens, K) -> Kept       which K tokens of a video the language model gets
    in the language model      inside(r, layers) -> Step, ...     which share of them its later layers get

A method has either or both. All else (tracing, batches, several videos, prompts, caches, reports) is done for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:  # options are checked, and --help is printed, without torch
    from torch import Tensor


class FrameTokens(NamedTuple):
    """One video behind projector and pooling: F frames of P tokens each, in raster order."""

    features: Tensor
    """[F, P, C], any floating dtype."""
    importance: Tensor | None
    """float32 [F, P]: attention that each token receives in the encoder, mean over heads and queries, pooled as the
    features are; None unless the method asks for it."""
    keys: Tensor | None
    """float32 [F, P, d]: keys of the encoder's attention, as they enter it (behind norms and rotary positions), mean
    over heads, pooled likewise; None unless asked for."""


class Kept(NamedTuple):
    """What is left of a video."""

    tokens: Tensor
    """[K, C]: the tokens themselves, or what others were merged into."""
    places: Tensor
    """int64 [K, 2]: the (frame, token) that each stands at, in time order and then in raster order."""


class Sizes(NamedTuple):
    """Of one video, what the work of ``Method.keep`` depends on."""

    frames: int
    """F."""
    tokens: int
    """P."""
    channels: int
    """C."""
    key_width: int
    """d."""
    kept: int
    """K."""


class Step(NamedTuple):
    """One reduction inside the language model."""

    layer: int
    """0-based decoder layer, at least 1, before which tokens go."""
    keep_ratio: float
    """Share of each video's tokens, as they entered the language model, that is left from here on, in (0, 1]."""
    merge: Literal["mean", "sequential", "drop"]
    """What becomes of the others: averaged into the kept one of highest cosine, the same one after another in the order
    of the prompt, or dropped."""
    scores: Literal["last", "all"] = "last"
    """By whose attention in the layer before tokens are ranked: that of the last position of the prompt, or the mean of
    all positions that can see them."""


@dataclass(frozen=True)
class Method:
    """A way to fewer video tokens."""

    name: str
    """What ``method=`` calls it."""
    paper: str
    """Title, venue and number, as a reader would look for them."""
    keep: Callable[[FrameTokens, int], Kept] | None = None
    """Of one video exactly K tokens, on the video's device; None: all of them reach the language model."""
    importance: bool = False
    """Whether ``keep`` wants ``FrameTokens.importance``."""
    keys: bool = False
    """Whether ``keep`` wants ``FrameTokens.keys``."""
    scored_layer: int = -1
    """The encoder layer whose attention these two are of; -1: the last that the model runs."""
    inside: Callable[[float, int], tuple[Step, ...]] | None = None
    """The steps inside a language model of so many layers, for a retain ratio."""
    operations: Callable[[Sizes], float] | None = None
    """How many operations the matrix products of ``keep`` are, a multiply-add being two; None: it has none."""
