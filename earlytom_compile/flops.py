"""How much work a prefill is, before anything runs: vision encoder, projector and language model.

The paper's tables and torch's counter do not count alike, so every count says by which of two protocols::

    count(shape_of("llava-onevision-7b"), protocol="paper", frames_schedule=(32,), llm_tokens=6272).total   # 82.6e12
    count(shape_of("llava-onevision-7b"), protocol="exact", frames_schedule=(32,), llm_tokens=6305).total   # 119.6e12
    count(..., frames_schedule=(32,), reuse=Reuse(computed=6100, full_layers=(18, 25)))   # 6100 of 32 x 729 patches
    count(shape_of("qwen2.5-vl-7b"), protocol="exact", frames_schedule=(384,), llm_tokens=23040)   # 768 pictures

A frame is what the encoder sees as one: a picture, or the two of a temporal patch of Qwen.

``paper`` (Eq. 8): a layer with n tokens of width d and an MLP of m is 4nd² + 2n²d + 2ndm. A multiply-add counts once,
the encoder's n is all frames in one sequence, an MLP has two matrices, and there is nothing but layers. The paper's
Table 7, of Qwen2.5-VL, is counted otherwise, and so is ``paper`` for shapes of that kind (:mod:`.qwen_shape`).

``exact``: the multiply-adds that are done, counted as two as in ``torch.utils.flop_counter``. Attention stays within a
frame (or the windows in it), the language model's MLP has three matrices and its keys fewer heads, and patch embedding,
projector, lm_head and the products of our operators count too. Causal attention is counted as a full square, as torch
does.

Where unchanged patches are reused, a layer computes T of the F·S patches of a video, and each of its queries looks at
all S patches of its frame, in both protocols: it costs T / (F·S) of a layer that computes all. What decides which
patches changed compares pixels and multiplies nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from .config import EarlyTomConfig, Variant
from .errors import EarlyTomConfigError
from .methods.base import Sizes
from .methods.registry import EARLYTOM, method_named
from .shapes import ModelShape

Protocol = Literal["paper", "exact"]
PROTOCOLS: tuple[Protocol, ...] = ("paper", "exact")
_LEAST_BLOCK_FRAMES = 16  # of ``frame_similarity``
_BLOCK = 8, 16  # most frames, and tokens of each, among which ``plus`` looks for representatives

TABLE_ROUNDING = 0.05e12
"""The paper's numbers are rounded to 0.1 T: the true one is at most this far away."""


@dataclass(frozen=True)
class Reuse:
    """What an encoder computes of one video when it does not compute unchanged patches again."""

    computed: float
    """T, patches that are computed, of F frames with S each."""
    full_layers: tuple[int, ...] = ()
    """0-based layers that compute all places of every frame."""
    distinct: float | None = None
    """Frames that these compute, where others repeat them exactly; None: all F."""


@dataclass(frozen=True)
class Flops:
    """Work of one prefill by part, in the unit of its protocol."""

    protocol: Protocol
    encoder: float
    operators: float
    """What merging and selecting cost themselves; not part of ``encoder``."""
    projector: float
    llm: float
    lm_head: float

    @property
    def total(self) -> float:
        """All parts together."""
        return self.encoder + self.operators + self.projector + self.llm + self.lm_head


def count(
    shape: ModelShape,
    *,
    protocol: Protocol,
    frames_schedule: Sequence[float],
    llm_tokens: int | Mapping[int, int],
    merge_layers: Sequence[int] | None = None,
    lm_head_positions: int = 1,
    variant: Variant | None = None,
    method: str = EARLYTOM,
    kept: int | None = None,
    reuse: Reuse | None = None,
) -> Flops:
    """Work of one prompt with one video.

    Args:
        protocol: ``"paper"`` (Eq. 8) or ``"exact"``, see above.
        frames_schedule: frames at first and after each merge layer, as ``report(model)`` has them; just the
            first where nothing merges. Averages over videos may be broken numbers.
        llm_tokens: length of the sequence in the language model; or, where that changes on the way, the length
            from each 0-based layer on, such as ``{0: 6272, 2: 1254}``. The paper counts video tokens only.
        merge_layers: 0-based encoder layers after which frames merge; None = the default for the depth.
        lm_head_positions: positions that get logits: 1 in ``generate``, all of them in a plain ``forward``.
        variant: that of ``EarlyTomConfig``, by which the operators are counted: ``"plus"`` selects by others.
            None: ``"paper"``, and with another ``method`` none at all.
        method: likewise; with another than ``"earlytom"`` no frames merge, and ``keep`` has operators of its own.
        kept: K, tokens that a ``method`` keeps of the video behind the encoder; only the work of keeping depends on it.
        reuse: what is computed where unchanged patches are not computed again; then no frames merge.

    Raises:
        EarlyTomConfigError: an unknown protocol, variant or method, a schedule that fits neither the merge layers nor
            time, more patches or other layers than there are, or a method without the number of tokens it keeps.
    """
    if protocol not in PROTOCOLS:
        raise EarlyTomConfigError(f"protocol={protocol!r}: must be one of {', '.join(map(repr, PROTOCOLS))}.")
    config = EarlyTomConfig(variant=variant or ("paper" if method == EARLYTOM else None), method=method)
    merges = shape.merges(merge_layers)
    if method == EARLYTOM:
        kept = None  # what its operators do follows from the schedule
    else:
        merges = ()
        _check_kept(method, kept, frames_schedule, shape)
    _check_schedule(frames_schedule, merges)
    if reuse is not None:
        _check_reuse(reuse, frames_schedule, shape)
    lengths = _by_layer({0: llm_tokens} if isinstance(llm_tokens, int) else llm_tokens, shape.llm_layers)[:-1]
    boundaries = [layer + 1 for layer in merges] if len(frames_schedule) > 1 else []
    frames = _by_layer(dict(zip([0, *boundaries], frames_schedule, strict=True)), shape.vision_layers)
    computed = _computed(shape, frames[:-1], reuse)
    if protocol == "paper":
        llm = sum(shape.paper_llm_layer(layer, n) for layer, n in enumerate(lengths))
        return Flops(protocol, shape.paper_encoder(computed, frames), 0, 0, llm, 0)
    layers = sum(shape.vision_layer(layer, n) for layer, n in enumerate(computed))
    scored = max(merges, default=shape.vision_layers - 1)
    return Flops(
        protocol,
        encoder=2 * (shape.patch_embedding(frames[0]) + layers),
        operators=_operators(shape, frames_schedule, config, kept, scored) if boundaries or reuse or kept else 0,
        projector=2 * shape.projector(frames),
        llm=2 * sum(shape.llm_layer(layer, n) for layer, n in enumerate(lengths)),
        lm_head=2 * lm_head_positions * shape.llm_width * shape.vocab,
    )


def reuse_of(report: Mapping[str, Any]) -> list[Reuse | None]:
    """What each video of a report's last call had computed, from ``report(model).to_dict()``; None where patches were
    not reused."""
    found = [video.get("patches") for video in report["videos"]]
    full = tuple(report["full_layers"])
    return [
        None if patches is None else Reuse(sum(patches["by_frame"]), full, patches.get("distinct")) for patches in found
    ]


def merged_inside(tokens: int, *, layer: int = 18, drop_ratio: float = 0.5) -> dict[int, int]:
    """``llm_tokens`` of a prompt whose tokens are merged before ``layer`` (algorithm.md, stage 3).

    Layer 18 and half of the tokens are HoliTom's settings; with them its FLOPs in Tables 1 and 2 come out.
    """
    return {0: tokens, layer: round((1 - drop_ratio) * tokens)}


def _computed(shape: ModelShape, frames: Sequence[float], reuse: Reuse | None) -> list[float]:
    """Patches that each layer computes."""
    every = [f * shape.frame_tokens for f in frames]
    if reuse is None:
        return every
    whole = every[0] if reuse.distinct is None else reuse.distinct * shape.frame_tokens
    return [whole if layer in reuse.full_layers else reuse.computed for layer in range(len(every))]


def _operators(
    shape: ModelShape, schedule: Sequence[float], config: EarlyTomConfig, kept: int | None, scored: int
) -> float:
    """Similarities of every frame with every other that can be in its segment, at each merge layer and once more for
    selection; and the scores of the last merge layer's attention, which nobody keeps and importance needs again. A
    schedule of one number is one in which unchanged patches are reused and no frames merge.

    ``plus`` selects by neither, but by the similarities of every pooled token with every other of its block; taking the
    tokens one by one is sums and comparisons, without a product.
    """
    if config.method != EARLYTOM:
        return _of_method(shape, round(schedule[0]), config, kept or 0)
    values, band = shape.frame_tokens * shape.vision_width, config.similarity_band(math.ceil(schedule[0]))
    similarities = [2 * _pairs(frames, band) * values for frames in schedule]
    if config.selects_by_attention():
        return sum(similarities) + 2 * shape.attention_scores(scored, schedule[max(0, len(schedule) - 2)])
    return sum(similarities[:-1]) + _of_blocks(shape, math.ceil(schedule[-1]))


def _of_blocks(shape: ModelShape, frames: int) -> float:
    """Products of ``select_representatives``: blocks are as large as the largest of them."""
    numbers = [-(-whole // most) for whole, most in zip((frames, shape.pooled_tokens), _BLOCK, strict=True)]
    frames_of_each, tokens_of_each = -(-frames // numbers[0]), -(-shape.pooled_tokens // numbers[1])
    return 2 * math.prod(numbers) * (frames_of_each * tokens_of_each) ** 2 * shape.llm_width


def _pairs(frames: float, band: int) -> float:
    """Products of two frames of which ``frame_similarity`` makes its band: square blocks of the frames, each with those
    before it that are needed."""
    reach = min(band, frames - 1)
    height = max(reach + 1, _LEAST_BLOCK_FRAMES)
    if frames <= height:
        return frames**2
    whole, rest = divmod(frames, height)
    return height**2 + (whole - 1) * height * (height + reach) + rest * (rest + reach)


def _of_method(shape: ModelShape, frames: int, config: EarlyTomConfig, kept: int) -> float:
    """The scores of the attention that another method asks for, and the products that it says it has."""
    method = method_named(config.method)
    assert method is not None
    scored = config.scored_layer(shape.vision_layers, shape.full_layers)
    scores = 2 * shape.attention_scores(scored, frames) if method.importance else 0
    if method.keep is None or method.operations is None:
        return scores
    sizes = Sizes(frames, shape.pooled_tokens, shape.llm_width, shape.vision_width // shape.vision_heads, kept)
    return scores + method.operations(sizes)


def _check_schedule(schedule: Sequence[float], merges: Sequence[int]) -> None:
    given = ",".join(f"{frames:g}" for frames in schedule)
    if len(schedule) not in (1, 1 + len(merges)):
        raise EarlyTomConfigError(
            f"frame schedule {given}: must have one number, or {1 + len(merges)}: frames at first and after each of "
            f"the merge layers {', '.join(map(str, merges))}."
        )
    if min(schedule) <= 0 or any(after > before for before, after in zip(schedule, schedule[1:], strict=False)):
        raise EarlyTomConfigError(f"frame schedule {given}: must be positive and never grow.")


def _check_kept(method: str, kept: int | None, schedule: Sequence[float], shape: ModelShape) -> None:
    if len(schedule) > 1:
        raise EarlyTomConfigError(
            f"frame schedule {','.join(f'{frames:g}' for frames in schedule)} with method={method!r}: no frames merge "
            "with it; give one number."
        )
    most = schedule[0] * shape.pooled_tokens
    if kept is None or not 1 <= kept <= most:
        raise EarlyTomConfigError(
            f"kept={kept} with method={method!r}: must be the tokens that it keeps behind the encoder, from 1 to "
            f"{most:g}, all."
        )


def _check_reuse(reuse: Reuse, schedule: Sequence[float], shape: ModelShape) -> None:
    least, most = shape.frame_tokens, schedule[0] * shape.frame_tokens
    if len(schedule) > 1:
        raise EarlyTomConfigError(
            f"frame schedule {','.join(f'{frames:g}' for frames in schedule)} with reuse: no frames merge where "
            "unchanged patches are reused; give one number."
        )
    if not least <= reuse.computed <= most:
        raise EarlyTomConfigError(
            f"{reuse.computed:g} computed patches: must be from {least}, those of the first frame, to {most:g}, all."
        )
    EarlyTomConfig(reuse=True, full_layers=reuse.full_layers).resolve_full_layers(shape.vision_layers)


def _by_layer(starts: Mapping[int, float], layers: int) -> list[float]:
    """``{0: 32, 7: 27}`` -> 32 in layers 0 to 6, 27 in the others; one number more is what leaves the last layer."""
    if 0 not in starts or not all(0 <= first <= layers for first in starts):
        raise EarlyTomConfigError(f"{dict(starts)}: must start at layer 0 and name layers up to {layers}.")
    return [starts[max(first for first in starts if first <= layer)] for layer in range(layers + 1)]


@dataclass(frozen=True)
class ImpliedFrames:
    """What a published total says about the frames in the encoder; every pair is (least, most)."""

    encoder: tuple[float, float]
    """FLOPs left for the encoder, protocol ``paper``."""
    every_layer: tuple[float, float]
    """Frames that would cost as much if all layers had the same number."""
    after_merge: tuple[tuple[float, float], ...]
    """Frames after each merge layer, whatever happens at the others."""


def implied_encoder(shape: ModelShape, published: Sequence[tuple[float, Mapping[int, int]]]) -> tuple[float, float]:
    """The encoder's FLOPs (least, most) that fit all of ``published``: (total, ``llm_tokens``), protocol ``paper``.

    Each total is known up to its rounding. Raises :class:`EarlyTomConfigError` if no encoder fits all.
    """
    rest = [
        total - count(shape, protocol="paper", frames_schedule=(1,), llm_tokens=tokens).llm
        for total, tokens in published
    ]
    least, most = max(rest) - TABLE_ROUNDING, min(rest) + TABLE_ROUNDING
    if not 0 < least <= most:
        raise EarlyTomConfigError(f"no encoder fits the totals {', '.join(f'{total:.3g}' for total, _ in published)}.")
    return least, most


def implied_frames(
    shape: ModelShape,
    encoder: tuple[float, float],
    *,
    frames: float,
    merge_layers: Sequence[int] | None = None,
) -> ImpliedFrames:
    """The frame schedules whose encoder costs between ``encoder[0]`` and ``encoder[1]`` (protocol ``paper``).

    One cost does not fix several merges. So each merge layer gets the range it can have while frames never grow and a
    layer, which merges pairs, leaves at least half. Raises :class:`EarlyTomConfigError` if no schedule can cost that.
    """
    merges = shape.merges(merge_layers)
    least, most = encoder

    def cost(*schedule: float) -> float:
        return count(shape, protocol="paper", frames_schedule=schedule, llm_tokens=0, merge_layers=merges).encoder

    def cheapest(index: int, x: float) -> float:
        return cost(frames, *(x * 0.5 ** max(0, i - index) for i in range(len(merges))))

    def dearest(index: int, x: float) -> float:
        return cost(frames, *(min(frames, x * 2.0 ** max(0, index - i)) for i in range(len(merges))))

    if not cheapest(0, frames / 2) <= most or not least <= cost(frames):
        raise EarlyTomConfigError(f"no merging of {frames:g} frames costs {least:.4g} to {most:.4g} FLOPs.")
    ranges = []
    for index in range(len(merges)):
        low = _solve(partial(dearest, index), least, frames * 0.5 ** (index + 1), frames)
        high = _solve(partial(cheapest, index), most, frames * 0.5 ** (index + 1), frames)
        ranges.append((low, high))
    every_layer = _solve(cost, least, 0, frames), _solve(cost, most, 0, frames)
    return ImpliedFrames(encoder, every_layer, tuple(ranges))


def _solve(cost: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Where the growing ``cost`` reaches ``target``; an end of the interval where it does not."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) < target else (low, middle)
    return high
