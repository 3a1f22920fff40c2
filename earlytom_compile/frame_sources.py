"""What a merged frame is made of, in frames of the video as it came."""

from collections.abc import Iterator, Sequence

Source = tuple[tuple[int, float], ...]
"""(frame, weight) of each part, a weight of 0 left out."""


def untouched(frames: int) -> tuple[Source, ...]:
    """Every frame is itself."""
    return tuple(((frame, 1.0),) for frame in range(frames))


def parts(frames: Sequence[int], weights: Sequence[float]) -> Iterator[tuple[int, float]]:
    """The row of a merge plan (kernels/plan_merge.py) as a source."""
    for frame, share in zip(frames, weights, strict=True):
        if share:
            yield frame, share


def blend(made: Sequence[Source], source: Source) -> Source:
    """``source`` in terms of what its parts are made of."""
    weights: dict[int, float] = {}
    for part, share in source:
        for frame, weight in made[part]:
            weights[frame] = weights.get(frame, 0.0) + share * weight
    return tuple(sorted(weights.items()))
