"""Videos for methods that keep tokens behind the encoder, and what must be true of all that they keep.

@given(case=cases())        ->   (FrameTokens, budget): scenes that repeat, drift, cut and tie; from 1 token to all
agrees(kept, {(0, 2): [1.0, 0.5]}, video)
"""

import torch
from hypothesis import strategies as st

from earlytom_compile.methods.base import FrameTokens

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
KINDS = ["numbers", "steps", "few"]


def video(seed, frames, tokens, channels, kind="numbers", speed=0.3, still=0.5, dtype=torch.float32):
    """Tokens of ``kind`` that drift by ``speed`` where they do not stand still, some frames repeated, and some cuts.

    "numbers" are normal ones; "steps" small whole numbers, so that similarities are equal and tokens zero; "few" copies
    of three tokens.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn():
        if kind == "few":
            three = torch.randn(3, channels, generator=torch.Generator().manual_seed(seed + 1))
            return three[torch.randint(3, (tokens,), generator=generator)]
        if kind == "steps":
            return torch.randint(-2, 3, (tokens, channels), generator=generator).float()
        return torch.randn(tokens, channels, generator=generator)

    now, out = drawn(), []
    for chance in torch.rand(frames, generator=generator).tolist():
        if chance > 0.85:
            now = drawn()
        elif chance > 0.2:
            moves = torch.rand(tokens, 1, generator=generator) >= still
            now = (
                torch.where(moves, now + speed * drawn(), now)
                if kind == "numbers"
                else torch.where(moves, drawn(), now)
            )
        out.append(now)
    importance = torch.rand(frames, tokens, generator=generator)
    if kind != "numbers":
        importance = (4 * importance).floor() / 4
    return FrameTokens(torch.stack(out).to(dtype), importance, None)


@st.composite
def cases(draw, most_frames=9, most_tokens=7):
    sizes = draw(st.integers(1, most_frames)), draw(st.integers(1, most_tokens)), draw(st.integers(1, 5))
    kind, dtype = draw(st.sampled_from(KINDS)), draw(st.sampled_from(DTYPES))
    speed, still = draw(st.sampled_from([0.0, 0.1, 1.0])), draw(st.sampled_from([0.0, 0.5, 0.9]))
    drawn = video(draw(st.integers(0, 2**32 - 2)), *sizes, kind, speed, still, dtype)
    return drawn, draw(st.integers(1, sizes[0] * sizes[1]))


def plain(given):
    """The features as lists, and the importance."""
    return given.features.double().tolist(), given.importance.double().tolist()


def agrees(kept, expected, given):
    """Whether exactly the ``expected`` {(frame, place): token} was kept, in time and raster order.

    Sums of floats may be added in another order and are then rounded to the dtype: one unit in the last place.
    """
    places = sorted(expected)
    assert kept.places.dtype == torch.int64 and kept.tokens.dtype == given.features.dtype
    assert [tuple(place) for place in kept.places.tolist()] == places
    wanted = torch.tensor([expected[place] for place in places], dtype=torch.float64).to(kept.tokens.dtype)
    rounding = torch.finfo(kept.tokens.dtype).eps
    largest = given.features.double().abs().max().item()
    torch.testing.assert_close(kept.tokens, wanted, rtol=rounding, atol=largest * 2.0**-46)
