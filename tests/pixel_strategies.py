"""Arguments of ``plan_reuse`` for property tests: what moves, drifts, flickers, is noisy, or ties exactly."""

import torch
from hypothesis import strategies as st

KINDS = ("walk", "held", "repeats", "noise", "whole numbers")


def _frames(kind, frames, shape, generator):
    def draw(high):
        return torch.randint(-high, high + 1, shape, generator=generator).float()

    if kind == "noise":
        return torch.randn(shape, generator=generator) + 0.1 * torch.randn(frames, *shape, generator=generator)
    if kind == "walk":
        speed = torch.rand(frames, generator=generator) ** 4
        return torch.stack([v * torch.randn(shape, generator=generator) for v in speed]).cumsum(0)
    if kind in ("held", "repeats"):
        pictures, order = (
            torch.randn(3, *shape, generator=generator),
            torch.randint(0, 3, (frames,), generator=generator),
        )
        return pictures[order.sort().values if kind == "held" else order]
    return torch.stack([draw(1) for _ in range(frames)])


@st.composite
def reuse_arguments(draw, kinds=KINDS, min_frames=1):
    """Everything but ``tau_reuse`` and ``budget``. Each patch is of a kind of its own; whole numbers are multiplied by
    a few of their own, so that many changes tie."""
    frames = draw(st.integers(min_frames, 7))
    channels = draw(st.integers(1, 3))
    grid = draw(st.tuples(st.integers(1, 3), st.integers(1, 4)))
    patch = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    margin = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sides = [count * side + more for count, side, more in zip(grid, patch, margin, strict=True)]
    pixels = torch.randn(frames, channels, *sides, generator=generator)
    for row in range(grid[0]):
        for column in range(grid[1]):
            kind = draw(st.sampled_from(kinds))
            top, left = row * patch[0], column * patch[1]
            view = pixels[:, :, top : top + patch[0], left : left + patch[1]]
            view.copy_(_frames(kind, frames, view.shape[1:], generator))
    return {"pixels": pixels, "grid": grid, "patch": patch, "prefix": draw(st.integers(0, 2))}


thresholds = st.one_of(st.sampled_from([0.0, 0.03, 0.5, 1.0, 3.0]), st.floats(0, 2, width=32))


def places_of(arguments):
    return arguments["prefix"] + arguments["grid"][0] * arguments["grid"][1]


def fewest_of(arguments):
    """Each patch once, places in front of them in every frame."""
    return places_of(arguments) + (len(arguments["pixels"]) - 1) * arguments["prefix"]


@st.composite
def budgets(draw, arguments):
    return draw(st.integers(fewest_of(arguments), len(arguments["pixels"]) * places_of(arguments)))
