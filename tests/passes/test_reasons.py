"""A graph with a picture in it hears which operator was not understood, where it is, and what it was taken for."""

import pytest
import torch
import torch.nn.functional as F
from spelled_towers import Tower, video
from test_spelled_towers import compiled

from earlytom_compile import EarlyTomFallbackWarning
from earlytom_compile.passes.reasons import NothingToCompress


def reason_of(tower, pixels, **options):
    """The warning that a call gives; its result is that of the tower itself."""
    run, _ = compiled(tower, **options)
    with torch.no_grad(), pytest.warns(EarlyTomFallbackWarning) as caught:
        torch.testing.assert_close(run(pixels), tower(pixels))
    (text,) = {str(each.message) for each in caught}
    assert "ass a video" not in text  # nobody who passed one wants to hear that
    return text


class Before(Tower):
    """Something happens to the pixels first."""

    def __init__(self, step, **how):
        super().__init__(**how)
        self.step = step

    def forward(self, pixels):
        return super().forward(self.step(pixels))


class Behind(Tower):
    """Something happens to the features of the frames."""

    def __init__(self, step, **how):
        super().__init__(**how)
        self.step = step

    def finish(self, h):
        return self.step(super().finish(h))


class Pictures(Tower):
    """Rows are taken apart, as those of image crops are."""

    def forward(self, pixels):
        h = self.embed(pixels.flatten(0, 1))
        for layer in self.layers:
            h = layer(h)
        h = self.finish(h)
        return torch.cat((h[0], h[1:].flatten(0, 1)))


class Convolutions(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)

    def forward(self, pixels):
        return F.relu(self.conv(pixels.flatten(0, 1))).flatten(1)


class Rows(Tower):
    """Rows are joined with others in a way of its own."""

    def __init__(self, join):
        super().__init__()
        self.join = join

    def forward(self, pixels):
        return self.join(super().forward(pixels))


CASES = {
    "an attention that is masked": (
        lambda: Tower(attention=lambda q, k, v, scale: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
        "scaled_dot_product_attention .* in layers.0 was taken for attention without a mask",
    ),
    "an attention in an unknown spelling": (
        lambda: Tower(attention=lambda q, k, v, s: torch.einsum("thqk,thkd->thqd", (q @ k.mT * s).softmax(-1), v)),
        "softmax .* in layers.0 was taken for a part of an attention that is spelled in an unknown way",
    ),
    "post-norm": (
        lambda: PostNorm(),
        "no vision encoder was understood: .* in layers.0.* was taken for the attention's half of a block",
    ),
    "attention among frames": (
        lambda: Tower(attention=lambda q, k, v, scale: among_frames(q, k, v)),
        "was taken for attention of the tokens .* of each frame among themselves",
    ),
    "no attention": (Convolutions, "pictures of this graph go through no attention; the last operator they reach is"),
    "frames that come from nowhere": (
        lambda: Before(lambda x: torch.cat((x[:, :1], x[:, 2:]), 1)),
        r"cannot be followed back to a graph input \[videos, frames, .*they begin at",
    ),
    "images": (Pictures, "frames flow into .*getitem.*Images, whose patches are taken apart there"),
    "frames that meet behind the encoder": (
        lambda: Behind(lambda h: h + h.roll(1, 0)),
        "roll .* mixes the frames of a video behind the vision encoder .*taken for a part of the projector",
    ),
    "a convolution along the frames": (
        lambda: Behind(lambda h: h + F.avg_pool1d(h.transpose(0, 2), 3, 1, 1).transpose(0, 2)),
        "avg_pool1d .* mixes the frames",
    ),
    "a time embedding behind the encoder": (
        lambda: Behind(lambda h: h + torch.arange(h.shape[0])[:, None, None] * 0.1),
        "add .* mixes the frames of a video behind the vision encoder|tells the frames",
    ),
    "a time embedding in the layers": (
        lambda: TimeInLayers(),
        "was taken for a part of the query, key and value projections",
    ),
    "frames in pairs": (
        lambda: Behind(lambda h: h.reshape(-1, 2, *h.shape[1:]).transpose(1, 2).flatten(1, 2)),
        "frames flow into",
    ),
    "a row in front": (
        lambda: Rows(lambda rows: torch.cat((rows[:, :1] * 0, rows), 1)),
        "video features flow into|joined with other tokens in an unknown way",
    ),
    "two rows behind": (
        lambda: Rows(lambda rows: torch.cat((rows, torch.ones(1, 2, rows.shape[2])), 1)),
        "separator of .* has shape",
    ),
}


class TimeInLayers(Tower):
    """Queries, keys and values know which frame they are of."""

    def __init__(self):
        super().__init__()
        self.times = torch.nn.Parameter(torch.randn(64, 16))
        for layer in self.layers:
            layer.first = Timed(self.times)


class Timed(torch.nn.Module):
    def __init__(self, times):
        super().__init__()
        self.times = times

    def forward(self, h):
        return F.layer_norm(h + self.times[: h.shape[0], None], h.shape[-1:])


class PostNorm(Tower):
    def __init__(self):
        super().__init__()
        for layer in self.layers:
            layer.forward = post_norm.__get__(layer)


def post_norm(self, h):
    q, k, v = self.split(h)
    h = self.first(h + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(h.shape)))
    return self.second(h + self.down(F.gelu(self.up(h))))


def among_frames(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(0, 2) for x in (q, k, v))).transpose(0, 2)


@pytest.mark.parametrize("case", CASES)
def test_reasons(case):
    make, reason = CASES[case]
    text = reason_of(make(), video(8))
    import re

    assert re.search(reason, text), text


def test_a_step_of_decoding_is_no_news():
    """Keys and values of a cache have as many axes as pictures have."""

    def step(x, keys, values):
        q, k, v = (x[:, None] @ torch.eye(8) for _ in range(3))
        keys, values = torch.cat((keys, k), 2), torch.cat((values, v), 2)
        return F.scaled_dot_product_attention(q, keys, values, is_causal=False)

    run, graphs = compiled(step)
    x, cache = torch.randn(1, 1, 8), torch.randn(2, 1, 1, 5, 8)
    with torch.no_grad():
        torch.testing.assert_close(run(x, *cache), step(x, *cache))  # a warning would be an error
    assert NothingToCompress("a", "b").reason == "a" and len(graphs) == 1


def test_frames_packed_into_one_sequence():
    """As in Qwen-VL's towers, whose lengths are known by their values alone, which ends a graph of Dynamo's."""
    weight = torch.randn(24, 8)

    def packed(x, lengths):
        query, key, value = (
            part.unflatten(1, (2, 4)).transpose(0, 1)[None] for part in F.linear(x, weight).chunk(3, 1)
        )
        parts = [torch.split(part, lengths, dim=2) for part in (query, key, value)]
        mixed = [F.scaled_dot_product_attention(*each) for each in zip(*parts, strict=True)]
        return x + torch.cat(mixed, 2)[0].transpose(0, 1).flatten(1)

    run, _ = compiled(packed)
    x = torch.randn(12, 8)
    with torch.no_grad(), pytest.warns(EarlyTomFallbackWarning, match=r"stand in one sequence .*compile\(model\)"):
        torch.testing.assert_close(run(x, [4, 4, 4]), packed(x, [4, 4, 4]))
