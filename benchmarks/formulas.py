"""What the operators compute, in two other ways that ``kernels.py`` times beside them.

plain_*   in plain PyTorch that Inductor can fuse, float32 where the operator is; where decisions follow one another,
          unrolled over the frames of one video (the native body takes them on the host, which Dynamo cannot trace)
naive_*   what one would write first: loops over frames, decisions on the host, whole attention maps
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
