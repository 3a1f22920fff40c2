"""The operators of merging and selection once more, for programs that leave Python (``torch.export``, AOTInductor).

The bodies of the operators read plans on the host and loop over frames, of which there are as many as the video says.
Here the same comes of whole tensors, for one video of at most ``most`` frames, and the host reads nothing::

    plan_merge(similarity [n, band], counts [1])  ->  source, weight [most, 2], merged_counts [1]
                                                      n is known at run time only; rows behind the merged ones are 0

Each function takes and returns what the operator of its name does, but for what its docstring says. Values that the
operators refuse become counts of -1, which the check of the next size known at run time refuses.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.functional import scaled_dot_product_attention

from earlytom_compile.kernels.frame_similarity import _fixed_point_bits, _fixed_point_tokens
from earlytom_compile.kernels.plan_merge import float32, longest_segment
from earlytom_compile.kernels.select_representatives import (
    FADING,
    MOST_OF_SHARE,
    POWER,
    ROUNDING,
    STRIP,
    TIE,
    WINDOW,
    near_equal,
    whole_ties,
)
from earlytom_compile.kernels.select_tokens import keep_quota
from earlytom_compile.kernels.window_attention import in_windows, runs_of

_CHUNK_ELEMENTS = 1 << 24
"""Of the largest temporary tensor: the tokens of all frames, or an attention map, go in pieces of so many."""


def frame_similarity(hidden: Tensor, band: int, *, most: int) -> Tensor:
    """The same bits for the same norms: sums of fixed-point numbers are exact in any order."""
    frames, tokens, channels = hidden.shape
    step, bits = max(1, _CHUNK_ELEMENTS // (most * channels)), _fixed_point_bits(tokens)
    product = hidden.new_zeros((frames, frames), dtype=torch.float64)
    nonzero = hidden.new_zeros((frames,), dtype=torch.int64)
    for first in range(0, tokens, step):
        unit, present = _fixed_point_tokens(hidden[:, first : first + step], bits)
        product, nonzero = product + unit @ unit.T, nonzero + present.sum(1)
    own = torch.where(nonzero > 0, product.diagonal() * tokens / nonzero, 1.0)
    other = torch.arange(frames, device=hidden.device)[:, None] - 1 - torch.arange(band, device=hidden.device)
    before = other.clamp_min(0)
    cosine = product.gather(1, before) / (own[:, None] * own[before]).sqrt()
    return torch.where(other < 0, 0.0, cosine.clamp(-1.0, 1.0)).float()


def plan_merge(
    similarity: Tensor,
    counts: Tensor,
    *,
    variant: str,
    tau_seg: float,
    alpha: float,
    max_window: int,
    tau_merge: float,
    min_frames: int,
    most: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``variant="paper"``; source and weight are [most, 2], whatever n is."""
    segments = _Segments(similarity, counts, tau_seg, alpha, longest_segment(variant, max_window), most)
    frame, alike, following = segments.frame, segments.neighbour(1), segments.neighbour(2)
    least = segments.of_ends() if math.isnan(tau_merge) else float32(tau_merge)
    inside = (frame > segments.head) & (frame + 1 < segments.tail)
    can = inside & (alike >= least) & (alike >= following)
    # Of neighbours that all can, every second one does: where the last that cannot is, tells which.
    last_not = torch.cummax(torch.where(can, -1, frame), 0).values
    merges = can & ((frame - last_not) % 2 == 1)
    order = torch.where(merges, alike + 0.0, -math.inf).sort(descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter(0, order, frame)
    merges = merges & (rank < (counts - min_frames).clamp_min(0))
    joined = torch.cat((merges.new_zeros((1,)), merges[:-1]))
    stays = ~joined & (frame < counts)

    alike, following = (x.double().clamp_min(0.0) for x in (alike, following))
    both = alike + following
    first = torch.where(both == 0.0, 0.5, alike / both)
    second = torch.where(both == 0.0, 0.5, following / both)
    weight = torch.stack((torch.where(merges, first, 1.0), torch.where(merges, second, 0.0)), 1).float()
    source = torch.stack((frame, frame + merges), 1)
    row = torch.where(stays, stays.cumsum(0) - 1, most)[:, None].expand(-1, 2)  # the last one is thrown away
    source = source.new_zeros((most + 1, 2)).scatter(0, row, source)[:most]
    weight = weight.new_zeros((most + 1, 2)).scatter(0, row, weight)[:most]
    return source, weight, torch.where(segments.known, stays.sum(0, keepdim=True), -1)


def dynamic_frames(
    similarity: Tensor, counts: Tensor, *, variant: str, tau_seg: float, alpha: float, max_window: int, most: int
) -> Tensor:
    """Of ``variant="paper"``."""
    segments = _Segments(similarity, counts, tau_seg, alpha, longest_segment(variant, max_window), most)
    ends = (segments.frame == segments.head) | (segments.frame == segments.tail)
    return ends.narrow(0, 0, similarity.shape[0])


class _Segments:
    """The segments of one video of n frames, in tables of ``most`` rows, of which those from n on mean nothing."""

    def __init__(
        self, similarity: Tensor, counts: Tensor, tau_seg: float, alpha: float, longest: float, most: int
    ) -> None:
        self.frame = torch.arange(most, device=similarity.device)  # int64 [most]
        self._counts = counts
        self._similarity = similarity.index_select(0, torch.minimum(self.frame, counts - 1))
        begins = _begins(self.neighbour(0), counts, float32(tau_seg), float32(alpha), float32(1.0 - alpha), longest)
        self.head = torch.cummax(torch.where(begins, self.frame, 0), 0).values
        ends = torch.cat((begins[1:], begins.new_ones((1,)))) | (self.frame == counts - 1)
        self.tail = torch.cummin(torch.where(ends, self.frame, most).flip(0), 0).values.flip(0)
        reach = torch.arange(similarity.shape[1], device=similarity.device)
        asked = (self.frame < counts)[:, None] & (reach < self.frame[:, None])
        self.known = (self._similarity.isfinite() | ~asked).all()  # bool []

    def neighbour(self, later: int) -> Tensor:
        """float32 [most]: s(t + later, t + later - 1)."""
        return self._similarity[:, 0].index_select(0, (self.frame + later).clamp_max(len(self.frame) - 1))

    def of_ends(self) -> Tensor:
        """float32 [most]: s(tail, head) of the segment of each frame."""
        apart = self.tail - self.head
        column = (apart - 1).clamp(0, self._similarity.shape[1] - 1)
        between = self._similarity.index_select(0, self.tail).gather(1, column[:, None])[:, 0]
        return torch.where(apart == 0, 1.0, between)


def _begins(neighbour: Tensor, counts: Tensor, threshold: float, newest: float, older: float, longest: float) -> Tensor:
    """bool [most]: whether a segment begins in each of n frames, by the similarity float32 [most] to the one before."""
    end = counts.sum()

    def goes_on(frame: Tensor, head: Tensor, average: Tensor, begins: Tensor) -> Tensor:
        return frame < end

    def step(frame: Tensor, head: Tensor, average: Tensor, begins: Tensor) -> tuple[Tensor, ...]:
        now = neighbour.gather(0, frame.view(1)).sum()
        average = newest * now + older * average
        new = (frame - head >= longest) | (average < threshold)
        begins = begins.scatter(0, frame.view(1), new.view(1))
        return frame + 1, torch.where(new, frame, head), torch.where(new, 1.0, average), begins

    first = torch.zeros_like(end)
    start = (first + 1, first, neighbour.new_ones(()), torch.zeros_like(neighbour, dtype=torch.bool))
    return while_loop(goes_on, step, start)[3]


def merge_frames(tensors: Sequence[Tensor], source: Tensor, weight: Tensor, n: int, *, most: int) -> list[Tensor]:
    """Untouched frames are blended too, with weights 1 and 0."""
    (first, second), weight = source.narrow(0, 0, n).unbind(1), weight.narrow(0, 0, n)
    return [_merged(x, first, second, weight) for x in tensors]


def _merged(x: Tensor, first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    one, other = (each.reshape(-1, *[1] * (x.dim() - 1)).to(wide) for each in weight.unbind(1))
    blend = torch.addcmul(x.index_select(0, first).to(wide) * one, x.index_select(0, second).to(wide), other)
    return blend.to(x.dtype)


def first_of_merged(first: Tensor | None, source: Tensor, n: int, *, most: int) -> Tensor:
    """As the operator."""
    rows = source.narrow(0, 0, n)[:, 0]
    return rows.clone() if first is None else first.index_select(0, rows)


def attention_received(query: Tensor, key: Tensor, scale: float, *, most: int) -> Tensor:
    """Queries of all frames go in pieces."""
    _, heads, tokens, _ = query.shape
    step = max(1, _CHUNK_ELEMENTS // (most * heads * tokens))
    keys, received = key.float().transpose(2, 3), query.new_zeros((query.shape[0], tokens), dtype=torch.float32)
    for first in range(0, tokens, step):
        scores = query[:, :, first : first + step].float() @ keys * scale
        received = received + scores.softmax(-1).sum((1, 2))
    return received / (heads * tokens)


def window_attention(
    query: Tensor, key: Tensor, value: Tensor, windows: Sequence[int], scale: float, *, most: int
) -> Tensor:
    """As the operator."""
    frames, mixed = query.shape[0], []
    for start, number, length in runs_of(windows):
        q, k, v = (in_windows(x, start, number, length) for x in (query, key, value))
        attended = scaled_dot_product_attention(q, k, v, scale=scale)
        mixed.append(attended.unflatten(0, (frames, number)).transpose(1, 2).flatten(2, 3))
    return torch.cat(mixed, 2)


def window_attention_received(query: Tensor, key: Tensor, windows: Sequence[int], scale: float, *, most: int) -> Tensor:
    """As the operator."""
    frames, places, received = query.shape[0], query.shape[2], []
    for start, number, length in runs_of(windows):
        q, k = (in_windows(x, start, number, length) for x in (query, key))
        inside = attention_received(q, k, scale, most=most * number)
        received.append(inside.view(frames, number * length) * (length / places))
    return torch.cat(received, 1)


def select_tokens(
    features: Tensor,
    importance: Tensor,
    dynamic: Tensor,
    counts: Tensor,
    budget: int,
    *,
    static_selection: str = "device",
    most: int,
) -> tuple[Tensor, Tensor]:
    """NaN in the importance gives tokens of NaN."""
    base, left = budget // counts, budget % counts
    place = torch.where(dynamic, dynamic.cumsum(0) - 1, dynamic.sum() + (~dynamic).cumsum(0) - 1)
    frame, token = keep_quota(importance, dynamic, base + (place < left), budget)
    tokens = torch.where(importance.isnan().any(), math.nan, features[frame, token])
    return tokens[None], torch.stack((frame, token), 1)[None]


def select_representatives(features: Tensor, counts: Tensor, budget: int, *, most: int) -> tuple[Tensor, Tensor]:
    """All blocks at once, each with room for ``WINDOW`` frames. NaN and inf give tokens of NaN."""
    frames, tokens, _ = features.shape
    windows = (frames + WINDOW - 1) // WINDOW
    # [W + 1]: of n frames each of W windows has n // W, and the first n % W one more.
    number = torch.arange(windows + 1, device=features.device)
    begins = number * (counts // windows) + torch.minimum(number, counts % windows)
    frame = begins[:-1, None] + torch.arange(WINDOW, device=features.device)
    there = (frame < begins[1:, None])[:, :, None].expand(-1, -1, tokens).flatten(1)  # bool [W, M]
    x = features.index_select(0, frame.clamp_max(frames - 1).flatten()).float().view(windows, WINDOW * tokens, -1)
    inside, filled = (part.to(features.device) for part in _strips(tokens))

    similarity = _standing_for(*_apart(x, there), inside, tokens)
    present = (there[:, inside] & filled).flatten(0, 1)  # bool [B, m]
    limit = (MOST_OF_SHARE * budget * present.sum(1) - 1) // (counts * tokens) + 1
    gain, turn = (part.flatten() for part in _cover(similarity, present, limit))
    flat = (frame[:, :, None] * tokens + torch.arange(tokens, device=features.device)).flatten(1)[:, inside].flatten()
    # By gain; of equal ones the earlier turn wins, then the earlier block.
    order = turn.sort(stable=True).indices
    order = order.index_select(0, gain.index_select(0, order).sort(descending=True, stable=True).indices)
    places = flat.index_select(0, order[:budget]).sort().values
    kept = torch.stack((places // tokens, places % tokens), 1)
    selected = features.flatten(0, 1).index_select(0, places)
    return torch.where(x.isfinite().all(), selected, math.nan)[None], kept[None]


def _strips(tokens: int) -> tuple[Tensor, Tensor]:
    """int64 [S, m], bool [S, m]: the places of each strip among those of a window, and whether there is one."""
    strips = near_equal(tokens, STRIP)
    width = strips[0][1]
    token = torch.tensor([begin for begin, _ in strips])[:, None, None] + torch.arange(width)
    filled = (token < torch.tensor([end for _, end in strips])[:, None, None]).expand(-1, WINDOW, -1)
    place = torch.arange(WINDOW)[:, None] * tokens + token.clamp_max(tokens - 1)
    return place.flatten(1), filled.flatten(1)


def _apart(x: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [W, M, D], [W, M], from the M tokens of each window float32 [W, M, D], of which some are ``there``: the
    direction in which each lies from the mean, and how much it counts."""
    number = there.sum(1, keepdim=True)
    away = x - torch.where(there[:, :, None], x, 0.0).sum(1, keepdim=True) / number[:, :, None]
    length = torch.linalg.vector_norm(away, dim=2)
    length = torch.where(there & (length > ROUNDING * torch.linalg.vector_norm(x, dim=2)), length, 0.0)
    direction = torch.where(length[:, :, None] > 0, away / length[:, :, None], 0.0)
    return direction, torch.where(length > 0, (length / (length.sum(1, keepdim=True) / number)) ** POWER, 0.0)


def _standing_for(direction: Tensor, weight: Tensor, inside: Tensor, tokens: int) -> Tensor:
    """float32 [B, m, m]: how well each token of a block (row) stands for each (column)."""
    direction, weight = direction[:, inside].flatten(0, 1), weight[:, inside].flatten(0, 1)
    cosine = (direction @ direction.transpose(1, 2)).clamp_min(0)
    frame = inside[0] // tokens
    return cosine * FADING ** (frame[:, None] - frame).abs() * weight[:, None, :]


def _cover(similarity: Tensor, present: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """int64 [B, m] twice: the largest gain before the turn in which a token is taken, in whole ``TIE``, -1 for those
    that are not, and that turn; of each block no more than its ``limit`` int64 [B] are taken."""
    end, token = limit.amax(), torch.arange(present.shape[1], device=present.device)

    def goes_on(turn: Tensor, *state: Tensor) -> Tensor:
        return turn < end

    def step(turn: Tensor, covered: Tensor, free: Tensor, gains: Tensor, turns: Tensor) -> tuple[Tensor, ...]:
        gain = (similarity - covered[:, None, :]).clamp_min(0).sum(2)
        gain = torch.where(free, gain, -1.0)
        largest = gain.amax(1, keepdim=True)
        best = (gain >= largest - TIE).int().argmax(1)[:, None]  # the first of those that tie
        row = similarity.gather(1, best[:, :, None].expand(-1, 1, similarity.shape[2]))[:, 0]
        now = free & (turn < limit)[:, None] & (token == best)
        gains = torch.where(now, whole_ties(largest), gains)
        return turn + 1, torch.maximum(covered, row), free & ~now, gains, torch.where(now, turn, turns)

    nothing = torch.full_like(present, -1, dtype=torch.int64)
    start = torch.zeros_like(end), torch.zeros_like(similarity[:, 0]), present.clone(), nothing, nothing.clone()
    return while_loop(goes_on, step, start)[3:]


FORMS: dict[str, Callable[..., Any]] = {
    form.__name__: form
    for form in (
        frame_similarity, plan_merge, dynamic_frames, merge_frames, first_of_merged, attention_received, select_tokens,
        select_representatives, window_attention, window_attention_received,
    )
}  # fmt: skip
"""By the names of their operators."""
