"""What the operators compute, in two other ways that ``kernels.py`` times beside them.

plain_*   in plain PyTorch that Inductor can fuse, float32 where the operator is; where decisions follow one another,
          unrolled over the frames of one video (the native body takes them on the host, which Dynamo cannot trace)
naive_*   what one would write first: loops over frames, decisions on the host, whole attention maps

plan_reuse has no plain way: its scans go through the frames one after the other, 14 times with a budget.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from earlytom_compile.kernels import all_ops  # noqa: F401  (registers torch.ops.earlytom)

ops = torch.ops.earlytom


def plain_similarity(hidden: Tensor, band: int) -> Tensor:
    frames, tokens, _ = hidden.shape
    unit = F.normalize(hidden.float(), dim=-1).flatten(1)
    earlier = torch.arange(frames, device=hidden.device)[:, None] - 1 - torch.arange(band, device=hidden.device)
    similarity = (unit @ unit.t() / tokens).gather(1, earlier.clamp_min(0))
    return torch.where(earlier >= 0, similarity, 0.0)


def plain_merge(tensors: Sequence[Tensor], source: Tensor, weight: Tensor, n: int) -> list[Tensor]:
    def blended(x: Tensor) -> Tensor:
        weights = weight[:n].reshape(n, 2, *[1] * (x.dim() - 1))
        return (x[source[:n, 0]].float() * weights[:, 0] + x[source[:n, 1]].float() * weights[:, 1]).to(x.dtype)

    return [blended(x) for x in tensors]


def plain_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    return torch.softmax(query.float() @ key.float().transpose(-1, -2) * scale, dim=-1).mean((1, 2))


def plain_heads(near: Tensor, tau_seg: float, alpha: float) -> Tensor:
    """int64 [T]: the first frame of each frame's segment, from similarities to the frame before [T]."""
    smoothed, head = torch.ones_like(near[0]), torch.zeros_like(near[0], dtype=torch.int64)
    heads = [head]
    for frame in range(1, len(near)):
        smoothed = alpha * near[frame] + (1 - alpha) * smoothed
        cut = smoothed < tau_seg
        smoothed, head = torch.where(cut, 1.0, smoothed), torch.where(cut, frame, head)
        heads.append(head)
    return torch.stack(heads)


def plain_dynamic(similarity: Tensor, counts: Tensor, *, tau_seg: float, alpha: float, **_: Any) -> Tensor:
    """One video, paper: bool [T]."""
    heads = plain_heads(similarity[:, 0], tau_seg, alpha)
    is_head = heads == torch.arange(len(heads), device=heads.device)
    return is_head | torch.cat([is_head[1:], is_head[:1]])  # frame 0 is a head, as the frame behind the last would be


def plain_plan(
    similarity: Tensor, counts: Tensor, *, tau_seg: float, alpha: float, min_frames: int, **_: Any
) -> tuple[Tensor, ...]:
    """One video, paper, without a window, threshold "segment"."""
    frames = len(similarity)
    place = torch.arange(frames, device=similarity.device)
    near = F.pad(similarity[:, 0], (0, 2))
    alike, following = near[1 : frames + 1], near[2 : frames + 2]
    heads = plain_heads(near[:frames], tau_seg, alpha)
    is_tail = torch.cat([heads[1:] == place[1:], torch.ones_like(heads[:1], dtype=torch.bool)])
    tails = torch.where(is_tail, place, frames).flip(0).cummin(0).values.flip(0)
    threshold = similarity[tails].gather(1, (tails - heads - 1).clamp_min(0)[:, None])[:, 0]
    good = (place > heads) & (place + 1 < tails) & (alike >= threshold) & (alike >= following)
    taken = [good[0]]
    for frame in range(1, frames):
        taken.append(good[frame] & ~taken[-1])
    merges = torch.stack(taken)
    order = torch.argsort(torch.where(merges, alike, -math.inf), descending=True, stable=True)
    merges = merges & (torch.empty_like(order).scatter_(0, order, place) < max(0, frames - min_frames))
    one, two = alike.clamp_min(0), following.clamp_min(0)
    share = torch.where(one + two == 0, 0.5, one / (one + two))
    pair = torch.stack([share, 1 - share], 1)
    alone = torch.tensor([1.0, 0.0], device=pair.device)
    stays = ~torch.cat([torch.zeros_like(merges[:1]), merges[:-1]])
    row = torch.where(stays, stays.cumsum(0) - 1, frames)
    source = place.new_zeros(frames + 1, 2).index_copy(0, row, torch.stack([place, place + merges], 1))
    weight = pair.new_zeros(frames + 1, 2).index_copy(0, row, torch.where(merges[:, None], pair, alone))
    return source[:frames], weight[:frames], stays.sum()[None]


def plain_select(features: Tensor, importance: Tensor, dynamic: Tensor, counts: Tensor, budget: int) -> Tensor:
    """One video: [budget, D]."""
    frames, tokens = importance.shape
    base, left = divmod(budget, frames)
    order = torch.argsort((~dynamic).int(), stable=True)
    frame, place = torch.arange(frames, device=order.device), torch.arange(tokens, device=order.device)
    quota = (base + (torch.empty_like(order).scatter_(0, order, frame) < left).long())[:, None]
    by_importance = torch.argsort(importance, dim=1, descending=True, stable=True)
    rank = torch.empty_like(by_importance).scatter_(1, by_importance, place.expand(frames, tokens))
    runs = quota.clamp_min(1)
    small, larger = tokens // runs, tokens % runs
    border = larger * (small + 1)
    run = torch.where(place < border, place // (small + 1), larger + (place - border) // small)
    best = torch.full_like(rank, tokens).scatter_reduce_(1, run, rank, "amin").gather(1, run)
    keep = torch.where(dynamic[:, None], rank < quota, (rank == best) & (quota > 0)).flatten()
    slot = torch.where(keep, keep.cumsum(0) - 1, budget)
    kept = slot.new_empty(budget + 1).scatter_(0, slot, torch.arange(frames * tokens, device=slot.device))[:budget]
    return features.flatten(0, 1)[kept]


def naive_similarity(hidden: Tensor, band: int) -> Tensor:
    out = torch.zeros(hidden.shape[0], band, device=hidden.device)
    for t in range(1, hidden.shape[0]):
        low = max(0, t - band)
        cosine = F.cosine_similarity(hidden[t].float(), hidden[low:t].float(), dim=-1)
        out[t, : t - low] = cosine.mean(-1).flip(0)
    return out


def naive_merge(tensors: Sequence[Tensor], source: Tensor, weight: Tensor, n: int) -> list[Tensor]:
    rows = list(zip(source[:n].tolist(), weight[:n].tolist(), strict=True))
    return [torch.stack([x[a] if a == b else (wa * x[a].float() + wb * x[b].float()).to(x.dtype)
                         for (a, b), (wa, wb) in rows]) for x in tensors]  # fmt: skip


def naive_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    return torch.softmax(query @ key.transpose(-1, -2) * scale, dim=-1, dtype=torch.float32).mean((1, 2))


def naive_plan(similarity: Tensor, counts: Tensor, **options: Any) -> tuple[Tensor, ...]:
    plan = ops.plan_merge(similarity.cpu(), counts.cpu(), **options)
    return tuple(part.to(similarity.device) for part in plan)


def naive_dynamic(similarity: Tensor, counts: Tensor, **options: Any) -> Tensor:
    return ops.dynamic_frames(similarity.cpu(), counts.cpu(), **options).to(similarity.device)


def naive_select(features: Tensor, importance: Tensor, dynamic: Tensor, counts: Tensor, budget: int) -> Tensor:
    flags = dynamic.tolist()
    base, left = divmod(budget, len(flags))
    favoured = sorted(range(len(flags)), key=lambda t: not flags[t])[:left]
    kept = []
    for t, flag in enumerate(flags):
        quota = base + (t in favoured)
        if flag:
            places = importance[t].topk(quota).indices.sort().values
        else:
            runs = importance[t].tensor_split(quota) if quota else ()
            starts = itertools.accumulate((len(run) for run in runs), initial=0)
            best = [run.argmax() + start for run, start in zip(runs, starts, strict=False)]
            places = torch.stack(best) if best else importance.new_empty(0, dtype=torch.int64)
        kept.append(features[t, places])
    return torch.cat(kept)


def plain_pack(source: Tensor, total: int) -> tuple[Tensor, ...]:
    frame = torch.arange(source.shape[1], device=source.device)[:, None]
    active = source == frame
    row = (active.flatten().cumsum(0) - 1).view_as(source)
    slot = torch.where(active, row, total).flatten()
    index = slot.new_empty(total + 1).scatter_(0, slot, torch.arange(len(slot), device=slot.device))[:total]
    ends = active.flatten(0, 1).sum(1).cumsum(0)
    return index, row.gather(1, source).flatten(0, 1), torch.cat([ends.new_zeros(1), ends])


def plain_take(hidden: Tensor, index: Tensor) -> Tensor:
    return hidden.flatten(0, 1)[index].unsqueeze(0)


def plain_return(hidden: Tensor, packed: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    source, new = index[rows], packed[0][rows]
    before = hidden.flatten(0, 1)[source]
    moved = (hidden.float() + (new.float() - before.float())).to(hidden.dtype)
    own = torch.arange(rows.numel(), device=rows.device).view_as(rows)
    return torch.where((source == own)[..., None], new, moved)


def plain_spread(packed: Tensor, rows: Tensor) -> Tensor:
    return packed[0].transpose(0, 1)[rows].transpose(1, 2)


def plain_reuse_attention(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, offsets: Tensor, scale: float
) -> Tensor:
    """Every place asks, as if it were active; the answers of those that are not are thrown away."""
    q, k, v = (plain_spread(x, rows) for x in (query, key, value))
    attended = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(0, 1)
    own = torch.arange(rows.numel(), device=rows.device)
    frame = torch.bucketize(torch.arange(query.shape[2], device=rows.device), offsets, right=True) - 1
    # The place of a packed row: the one of its frame that reads it.
    place = own.new_zeros(query.shape[2]).scatter_(0, rows.flatten(), own % rows.shape[1])
    return attended[frame * rows.shape[1] + place].transpose(0, 1).unsqueeze(0)


def naive_plan_reuse(
    pixels: Tensor, *, grid: Sequence[int], patch: Sequence[int], prefix: int, tau: float, budget: int
) -> tuple[Tensor, ...]:
    """One video of two frames or more, without leading places: [F, C, H, W]."""
    (rows, columns), (height, width) = grid, patch
    inside = pixels[:, :, : rows * height, : columns * width].float()
    patches = inside.unflatten(2, (rows, height)).unflatten(4, (columns, width)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    frames, places = patches.shape[:2]

    def mean(x: Tensor) -> Tensor:
        return x.abs().double().flatten(-3).mean(-1).float()

    def scan(threshold: Tensor) -> tuple[Tensor, Tensor]:
        source = torch.zeros(frames, places, dtype=torch.int64, device=pixels.device)
        change = torch.full((frames, places), math.inf, device=pixels.device)
        held = patches[0].clone()
        for frame in range(1, frames):
            change[frame] = mean(patches[frame] - held)
            changed = ~(change[frame] <= threshold)
            held[changed] = patches[frame][changed]
            source[frame] = torch.where(changed, frame, source[frame - 1])
        return source, change

    def count(source: Tensor) -> int:
        return int((source == torch.arange(frames, device=source.device)[:, None]).sum())

    apart = patches[1:] - patches[:-1]
    a, b, c, d = (apart[..., i : height // 2 * 2 : 2, j : width // 2 * 2 : 2] for i in (0, 1) for j in (0, 1))
    quiet = mean((a - b - c + d) / 2).flatten().sort().values
    noise = quiet[(len(quiet) - 1) // 4]
    if budget:
        low, high = torch.zeros_like(noise), (pixels.max() - pixels.min()).float()
        if count(scan(low)[0]) <= budget:
            high = low
        for _ in range(12 if high > 0 else 0):
            middle = (low + high) / 2
            low, high = (low, middle) if count(scan(middle)[0]) <= budget else (middle, high)
        threshold, total = high, budget
        source, change = scan(threshold)
    else:
        threshold = noise + tau
        source, change = scan(threshold)
        step = math.ceil((frames - 1) * places / 16)
        total = min(places + math.ceil((count(source) - places) / step) * step, frames * places)
        total = frames * places if count(source) > 0.8 * frames * places else total
    active = source == torch.arange(frames, device=source.device)[:, None]
    least = torch.where(active, math.inf, change)
    for frame in range(frames - 2, 0, -1):
        goes_on = torch.minimum(least[frame], least[frame + 1])
        least[frame] = torch.where(active[frame] | active[frame + 1], least[frame], goes_on)
    order = torch.where(active, -1.0, least).flip(0).t().flatten().argsort(descending=True, stable=True)
    taken = order[: max(0, total - count(source))]
    frame = frames - 1 - taken % frames
    source[frame, taken // frames] = frame
    return source[None], change[None], torch.tensor([total]), torch.stack([noise, threshold])[None]


def naive_pack(source: Tensor, total: int) -> tuple[Tensor, ...]:
    plan = ops.pack_places(source.cpu(), total)
    return tuple(part.to(source.device) for part in plan)


def naive_take(hidden: Tensor, index: Tensor) -> Tensor:
    return torch.stack([hidden[index // hidden.shape[1], index % hidden.shape[1]]])


def naive_return(hidden: Tensor, packed: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    update = packed[0].to(wide) - hidden.flatten(0, 1)[index].to(wide)
    moved = [state.to(wide) + update[row] for state, row in zip(hidden, rows, strict=True)]
    out = torch.stack(moved).to(hidden.dtype)
    out.view(-1, hidden.shape[2])[index] = packed[0]
    return out


def naive_spread(packed: Tensor, rows: Tensor) -> Tensor:
    return torch.stack([packed[0][:, row] for row in rows])


def naive_reuse_attention(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, offsets: Tensor, scale: float
) -> Tensor:
    borders = offsets.tolist()
    return torch.cat([
        F.scaled_dot_product_attention(query[:, :, start:stop], key[:, :, row], value[:, :, row], scale=scale)
        for row, start, stop in zip(rows, borders, borders[1:], strict=False)
        if start < stop
    ], 2)  # fmt: skip
