"""What is compared does what its name says; the rows named earlytom are the installed code."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from earlytom_compile.config import EarlyTomConfig
from earlytom_compile.errors import EarlyTomConfigError
from earlytom_compile.toyworld import methods
from earlytom_compile.toyworld.answers import normalized
from earlytom_compile.toyworld.checkpoint import build_model as build_tiny_model
from earlytom_compile.toyworld.language import build_tokenizer
from earlytom_compile.toyworld.model import SHAPE, VIDEO_TOKENS, build_model
from earlytom_compile.toyworld.world import sample_video

RATIOS = (0.25, 0.2, 0.15, 0.1)


@pytest.fixture(scope="module")
def model():
    return build_model(seed=1).eval()


@pytest.fixture(scope="module")
def shallow():
    """The same with half the vision encoder, to be compiled: two layers where frames merge, and one behind them."""
    return build_tiny_model(replace(SHAPE, vision_layers=4, text_layers=1), build_tokenizer(), seed=1).eval()


@pytest.fixture(scope="module")
def videos():
    return [normalized(torch.from_numpy(sample_video("test", seed).frames())) for seed in range(4)]


def uncompressed(model, pixels):
    with torch.no_grad():
        rows = model.model.get_video_features(pixels[None], return_dict=True).pooler_output[0]
    return rows[:VIDEO_TOKENS]


VARIANTS = ("paper", "released", "plus")
# Each ratio and each variant once; the variants differ most where they keep least.
QUICK = {(0.2, "released"), (0.15, "plus"), (0.1, "paper")}


@pytest.mark.parametrize(
    "ratio, variant",
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.long)
        for case in itertools.product(RATIOS, VARIANTS)
    ],
)
@torch.no_grad()
def test_the_installed_code_agrees_with_hooks_and_specification(shallow, videos, variant, ratio):
    compress = methods.method(f"earlytom {variant}", shallow, ratio)
    config = EarlyTomConfig(retain_ratio=ratio, variant=variant)
    for pixels in videos:
        expected = methods.two_stages(shallow, config, pixels)
        torch.testing.assert_close(compress(pixels), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.long  # compiles twice; the ratio and the variant reach it in the test above
@torch.no_grad()
def test_options_reach_the_installed_code(shallow, videos):
    none, many = (methods.method("earlytom paper", shallow, 0.25, merge_layers=layers) for layers in ((0,), (0, 1, 2)))
    assert not torch.equal(none(videos[0]), many(videos[0]))


@pytest.mark.parametrize("ratio", RATIOS)
def test_how_many_tokens_each_leaves(model, videos, ratio):
    budget = round(ratio * VIDEO_TOKENS)
    expected = {
        "only stage 2": budget,
        "top-k without decoupling": budget,
        "random tokens": budget,
        "frame subsampling": 16 * max(1, round(budget / 16)),
        "average pooling": 4 * round(budget / 4),
    }
    for name, count in expected.items():
        compress = methods.method(name, model, ratio)
        assert {len(compress(pixels)) for pixels in videos} == {count}, name


def test_all_tokens_are_the_models_own(model, videos):
    compress = methods.method(methods.ALL_TOKENS, model, 0.1)
    torch.testing.assert_close(compress(videos[0]), uncompressed(model, videos[0]), rtol=1e-5, atol=1e-6)
    assert len(methods.method(methods.NO_TOKENS, model, 0.1)(videos[0])) == 0


def test_frame_subsampling_takes_whole_frames_from_the_middle_of_equal_parts(model, videos):
    kept = methods.method("frame subsampling", model, 0.25)(videos[1])
    every = uncompressed(model, videos[1]).view(8, 16, -1)
    torch.testing.assert_close(kept, every[[2, 6]].flatten(0, 1), rtol=1e-4, atol=1e-5)


def test_average_pooling_averages_blocks(model, videos):
    kept = methods.method("average pooling", model, 0.25)(videos[1])
    every = uncompressed(model, videos[1]).view(8, 2, 2, 2, 2, -1)  # frame, row, in block, column, in block
    torch.testing.assert_close(kept, every.mean((2, 4)).flatten(0, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["only stage 2", "frame subsampling"])
def test_what_selects_without_merging_takes_tokens_as_they_are(model, videos, name):
    kept = methods.method(name, model, 0.1)(videos[2])
    # Through a matrix product, as cdist computes large ones, equal rows would be 1e-2 apart.
    distances = torch.cdist(kept, uncompressed(model, videos[2]), compute_mode="donot_use_mm_for_euclid_dist")
    assert distances.min(1).values.max() < 1e-3


def test_random_tokens_differ_by_video_and_not_by_run(model, videos):
    compress = methods.method("random tokens", model, 0.1)
    torch.testing.assert_close(compress(videos[0]), compress(videos[0]), rtol=0, atol=0)
    assert not torch.allclose(compress(videos[0]), compress(videos[1]))


def test_top_k_takes_the_most_attended_of_every_frame(model, videos):
    config = EarlyTomConfig(retain_ratio=0.25)
    with torch.no_grad():
        encoded = methods.encode(model, config, videos[0])
    frames = len(encoded.tokens)
    base, spare = divmod(round(0.25 * VIDEO_TOKENS), frames)
    expected = []
    for index in range(frames):
        best = encoded.importance[index].argsort(descending=True, stable=True)[: base + (index < spare)]
        expected.append(encoded.tokens[index, best.sort().values])
    torch.testing.assert_close(methods.method("top-k without decoupling", model, 0.25)(videos[0]), torch.cat(expected))


def test_only_stage_1_keeps_every_token_of_the_frames_left(model):
    still = normalized(torch.from_numpy(sample_video("test", 0).frames()))[:1].expand(8, -1, -1, -1)
    kept = methods.method(methods.STAGE_1, model, 0.1)(still)
    # 8 equal frames: 6 middle ones pair to 3, then 5 -> (1 + 1 + 1 of 3) 4.
    assert len(kept) == 16 * 4


@torch.no_grad()
def test_importance_is_the_attention_of_transformers(model, videos):
    layer = methods._encoder_layers(model)[6]
    hidden = model.model.vision_tower(videos[0], output_hidden_states=True).hidden_states[6]
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden)
    expected = torch.zeros(8, 64)
    for head in range(attention.num_heads):
        part = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        for frame in range(8):
            query, key = attention.q_proj(normed[frame])[:, part], attention.k_proj(normed[frame])[:, part]
            scores = (query @ key.T / math.sqrt(attention.head_dim)).exp()
            expected[frame] += (scores / scores.sum(1, keepdim=True)).mean(0) / attention.num_heads
    torch.testing.assert_close(methods.attention_received(layer, hidden), expected, rtol=1e-4, atol=1e-6)


def test_hooks_are_gone_afterwards(model, videos):
    before = uncompressed(model, videos[0])
    methods.method(methods.STAGE_1, model, 0.1)(videos[0])
    with pytest.raises(EarlyTomConfigError):
        methods.method("top-k without decoupling", model, 0.1)(videos[0] * math.nan)
    torch.testing.assert_close(uncompressed(model, videos[0]), before, rtol=0, atol=0)


def test_an_unknown_option_is_refused(model):
    with pytest.raises(EarlyTomConfigError, match="tau"):
        methods.method("only stage 2", model, 0.1, tau=0.5)
