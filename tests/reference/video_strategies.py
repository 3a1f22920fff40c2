"""Videos for property tests: smooth ones with cuts, ones full of exact ties, ones of a few whole numbers."""

import torch
from hypothesis import strategies as st


def _smooth(frames, tokens, channels, seed, cuts):
    """A walk of changing speed that starts anew at every cut; similarities from about 0.2 to 1."""
    generator = torch.Generator().manual_seed(seed)

    def noise():
        return torch.randn(tokens, channels, generator=generator)

    base, current, video = 0.5 * noise(), noise(), []
    for t in range(frames):
        if t in cuts:
            current = noise()
        video.append(base + current)
        speed = torch.rand((), generator=generator)
        current = (1 - speed**2).sqrt() * current + 0.7 * speed * noise()
    return torch.stack(video)


@st.composite
def smooth_videos(draw, min_frames=1, max_frames=16):
    frames = draw(st.integers(min_frames, max_frames))
    cuts = draw(st.sets(st.integers(0, frames - 1), max_size=3))
    tokens, channels = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    return _smooth(frames, tokens, channels, draw(st.integers(0, 2**31)), cuts)


@st.composite
def repeating_videos(draw, min_frames=1, max_frames=16):
    """Every frame is one of a few pictures, so that similarities tie exactly."""
    pictures = draw(smooth_videos(min_frames=1, max_frames=3))
    order = draw(st.lists(st.integers(0, len(pictures) - 1), min_size=min_frames, max_size=max_frames))
    return pictures[order]


@st.composite
def whole_number_videos(draw, min_frames=1, max_frames=10):
    """Values from -2 to 2: zero tokens, orthogonal and opposite frames, and ties between different ones."""
    frames, tokens, channels = (
        draw(st.integers(min_frames, max_frames)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
    )
    count = frames * tokens * channels
    values = draw(st.lists(st.integers(-2, 2), min_size=count, max_size=count))
    return torch.tensor(values, dtype=torch.float32).view(frames, tokens, channels)


def videos(min_frames=1):
    return st.one_of(smooth_videos(min_frames), repeating_videos(min_frames), whole_number_videos(min_frames))


@st.composite
def segment_options(draw):
    return {
        "tau_seg": draw(st.sampled_from([-1.5, 0.0, 0.3, 0.5, 0.6, 0.8, 0.95, 1.0])),
        "alpha": draw(st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0])),
        "max_window": draw(st.sampled_from([None, None, 1, 2, 4, 7])),
    }


@st.composite
def merge_options(draw):
    return {
        **draw(segment_options()),
        "tau_merge": draw(st.sampled_from(["segment", "segment", -1.0, 0.0, 0.5, 0.9, 1.0])),
        "min_frames": draw(st.integers(1, 12)),
    }


@st.composite
def partitions(draw, frames):
    """Segments of ``frames`` frames, as ``[[first, last], ...]``."""
    firsts = [0, *sorted(draw(st.sets(st.integers(1, frames - 1))))] if frames > 1 else [0]
    return [[first, following - 1] for first, following in zip(firsts, [*firsts[1:], frames], strict=True)]


@st.composite
def importances(draw, frames):
    """Scores with and without ties."""
    tokens = draw(st.integers(1, 12))
    few, many = st.integers(0, 3).map(float), st.floats(0, 1, width=32)
    values = st.lists(draw(st.sampled_from([few, many])), min_size=tokens, max_size=tokens)
    return torch.tensor(draw(st.lists(values, min_size=frames, max_size=frames)))
