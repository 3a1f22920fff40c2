"""Observations without a model: the real operators, on features that walk and jump, with sinks in their importance."""

from dataclasses import replace

import torch

from earlytom_compile.config import EarlyTomConfig
from earlytom_compile.integrations.observe import Observation, ReusedPatches, _merge_step
from earlytom_compile.kernels import all_ops  # noqa: F401  (registers torch.ops.earlytom)
from earlytom_compile.reused import computed_patches

OPS = torch.ops.earlytom


def observation(frames, grid=(4, 4), *, seed=0, cuts=3, layers=(1, 6), sinks=1, **options):
    """Of ``frames`` frames of ``grid`` tokens, with ``cuts`` jumps."""
    generator = torch.Generator().manual_seed(seed)
    config = EarlyTomConfig(**{"variant": "paper", **options})
    tokens = grid[0] * grid[1]
    hidden = _walk(frames, tokens, cuts, generator)
    importance = torch.rand(frames, tokens, generator=generator) + 0.2
    importance[:, torch.randperm(tokens, generator=generator)[:sinks]] += 0.4 * tokens
    importance /= importance.sum(dim=1, keepdim=True)
    counts = torch.tensor([frames])
    rules = {"variant": config.merge_variant(), "tau_seg": config.tau_seg, "alpha": config.alpha}
    rules |= {"max_window": config.window()}
    steps = []
    for layer in layers if frames >= 4 else ():
        given = {"similarity": OPS.frame_similarity(hidden, config.similarity_band(frames)), "counts": counts, **rules}
        given |= {"tau_merge": float("nan"), "min_frames": config.min_frames(frames)}
        plan = OPS.plan_merge(**given)
        steps.append(_merge_step(layer, given, plan))
        counts = plan[2]
        hidden, importance = OPS.merge_frames([hidden, importance], plan[0], plan[1], int(counts.sum()))
    dynamic = OPS.dynamic_frames(OPS.frame_similarity(hidden, config.similarity_band(frames)), counts, **rules)
    decides = config.selects_by_attention()
    if config.variant == "plus":
        _, kept = OPS.select_representatives(hidden, counts, config.token_budget(frames, tokens))
    elif config.variant == "released":
        _, kept, _ = OPS.select_tokens_released(hidden, importance, dynamic, counts, frames, config.retain_ratio)
    else:
        _, kept = OPS.select_tokens(hidden, importance, dynamic, counts, config.token_budget(frames, tokens))
    places = kept.reshape(-1, kept.shape[-1])[:, -2:].tolist()
    return Observation(
        frames=frames,
        grid=grid,
        layers=8,
        config=config,
        merges=tuple(steps),
        dynamic=tuple(dynamic.tolist()) if decides else None,
        importance=importance.reshape(-1, *grid).numpy(),
        importance_decides=decides,
        kept=tuple((frame, place // grid[1], place % grid[1]) for frame, place in places),
    )


def reused(frames, grid=(4, 4), *, prefix=0, covered=(1.0, 1.0), share=0.3, seed=0, tokens=(2, 2), **options):
    """An observation of ``frames`` frames of which about ``share`` of the patches change from one to the next."""
    generator = torch.Generator().manual_seed(seed)
    change = torch.rand(1, frames, prefix + grid[0] * grid[1], generator=generator)
    change[:, 0] = float("inf")
    threshold = 1 - share
    source = torch.arange(frames)[:, None] * (change[0] > threshold)
    counts = computed_patches(source.cummax(0).values[None], change, torch.tensor([[0.0, threshold]]))
    seen = observation(frames, tokens, seed=seed, layers=(), **{"variant": "plus", **options})
    return replace(seen, reuse=ReusedPatches(source.cummax(0).values.numpy(), grid, covered, *counts))


def _walk(frames, tokens, cuts, generator):
    """[frames, tokens, 16]: drifts at a changing speed, jumps at each cut."""
    at = set(torch.randint(0, frames, (cuts,), generator=generator).tolist())
    current, walked = torch.randn(tokens, 16, generator=generator), []
    for frame in range(frames):
        noise = torch.randn(tokens, 16, generator=generator)
        speed = 1.0 if frame in at else 0.4 * torch.rand((), generator=generator).item()
        current = (1 - speed**2) ** 0.5 * current + speed * noise
        walked.append(current)
    return torch.stack(walked)


def pictures(frames, *, height=96, width=96, seed=0):
    """uint8 [frames, height, width, 3]: a smooth picture that slides."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 8, 8 + frames, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (height, width * (8 + frames) // 8), mode="bicubic").clamp(0, 1)
    step = width // 8
    slides = [fine[0, :, :, frame * step : frame * step + width] for frame in range(frames)]
    return (255 * torch.stack(slides)).byte().permute(0, 2, 3, 1).contiguous().numpy()
