"""Inputs for the operator tests: videos whose frames resemble each other, and plans, from a seed.

video(seed, 8, 5, 6)      ->   [8, 5, 6], scenes that drift and cut, similarities from about 0 to 1
clip(seed, 8, 3, 28, 28)  ->   [8, 3, 28, 28], pixels of which a part changes from frame to frame
sources(seed, 2, 8, 5)    ->   [2, 8, 5], a plan of plan_reuse
"""

import math

import torch
from effort import examples
from hypothesis import strategies as st
from torch import Tensor

import earlytom_compile.kernels.all_ops  # noqa: F401  registers torch.ops.earlytom

ops = torch.ops.earlytom
operator_settings = examples(40)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SEGMENT = math.nan
"""``tau_merge="segment"``, as the operators take it."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where Triton providers are tested: on the GPU, or in the interpreter (conftest.py)."""

RUNS = 20 if DEVICE == "cuda" else 3
"""That must have the same bits: a GPU runs programs in any order, the interpreter one after the other."""

seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from(DTYPES)
native_dtypes = st.sampled_from([*DTYPES, torch.float64])
"""Of native bodies; providers leave float64 to them."""
variants = st.sampled_from(["paper", "released"])
layouts = st.sampled_from(["contiguous", "transposed", "strided"])
counts_lists = st.lists(st.integers(1, 9), min_size=1, max_size=4)


def video(seed: int, frames: int, tokens: int, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[frames, tokens, channels]: a walk inside each scene, some frames repeated, some cuts."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    base, scene, now = noise(tokens, channels), noise(tokens, channels), noise(tokens, channels)
    out = []
    for step in torch.rand(frames, generator=generator).tolist():
        if step > 0.85:
            scene, now = noise(tokens, channels), noise(tokens, channels)
        elif step > 0.15:
            now = now + 0.7 * step * noise(tokens, channels)
        out.append(base + 2 * scene + now)
    return torch.stack(out).to(dtype)


def clip(seed: int, frames: int, channels: int, height: int, width: int, steps: int = 0) -> Tensor:
    """[frames, channels, height, width]: a still scene, a rectangle that changes in most frames, some cuts, noise.

    With ``steps`` pixels are multiples of 1 / steps, so that changes are often equal, and often none.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    grain = 0.1 * torch.rand(1, generator=generator)
    now, out = noise(channels, height, width), []
    for step in torch.rand(frames, generator=generator).tolist():
        top, left = (torch.rand(2, generator=generator) * torch.tensor([height, width])).long().tolist()
        if step > 0.9:
            now = noise(channels, height, width)
        elif step > 0.2:
            now = now.clone()
            now[:, top : top + height // 2 + 1, left : left + width // 2 + 1] += step * noise(channels, 1, 1)
        out.append(now + grain * noise(channels, height, width))
    pixels = torch.stack(out)
    return (pixels * steps).round() / steps if steps else pixels


def sources(seed: int, videos: int, frames: int, places: int, share: float = 0.3) -> Tensor:
    """int64 [videos, frames, places] as ``plan_reuse`` gives them, of which ``share`` are active behind the first frame
    of a video; none in some frames, and all in others."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.zeros(videos, frames, places, dtype=torch.int64)
    for video in range(videos):
        for frame in range(1, frames):
            kind = torch.rand(1, generator=generator).item()
            here = 0.0 if kind < 0.1 else 1.0 if kind > 0.9 and share else share
            active = torch.rand(places, generator=generator) < here
            source[video, frame] = torch.where(active, frame, source[video, frame - 1])
    return source


def active_places(source: Tensor) -> int:
    """Of all videos of [videos, frames, places]."""
    return int((source == torch.arange(source.shape[1], device=source.device)[:, None]).sum())


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=torch.float64).to(x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    return x.contiguous()


def per_video(counts: list[int]) -> list[slice]:
    ends = [sum(counts[: video + 1]) for video in range(len(counts))]
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


def symmetric(similarity: Tensor) -> Tensor:
    """[T, T] similarities of every pair of frames from the band [T, T - 1 or more] of one video."""
    frames = similarity.shape[0]
    out = torch.eye(frames, dtype=similarity.dtype)
    for t in range(frames):
        for j in range(t):
            out[t, t - 1 - j] = out[t - 1 - j, t] = similarity[t, j]
    return out


def plan_rows(source: Tensor, weight: Tensor, first: int) -> list[dict[int, float]]:
    """Rows of a plan as {frame within the video: weight}."""
    rows = []
    for (a, b), (wa, wb) in zip(source.tolist(), weight.tolist(), strict=True):
        rows.append({a - first: wa} if a == b else {a - first: wa, b - first: wb})
    return rows
