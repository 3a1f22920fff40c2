"""What is compared does what its name says; the rows named earlytom are the installed code."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from oracle_reuse import ReusingEncoder

from earlytom_compile import reference
from earlytom_compile.config import EarlyTomConfig
from earlytom_compile.errors import EarlyTomConfigError
from earlytom_compile.toyworld import installed, merging, methods
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
    name = installed.PLUS_MERGING if variant == "plus" else f"earlytom {variant}"
    compress = methods.method(name, shallow, ratio)
    config = EarlyTomConfig(retain_ratio=ratio, variant=variant, reuse=False)
    for pixels in videos:
        found, expected = compress(pixels), methods.two_stages(shallow, config, pixels)
        torch.testing.assert_close(found.tokens, expected.tokens, rtol=1e-5, atol=1e-6)
        assert found.work == expected.work < 1
        assert found.flops == expected.flops  # of layers, similarities and scores, by two ways of counting


def reused(model, pixels, **options):
    """Tokens [8, 16, C] and the share of the layers' work, by the oracle's hooks on the tower's own layers."""
    layers = merging.encoder_layers(model)
    encoder = ReusingEncoder(layers, pixels, SHAPE.patch, **options)
    with encoder.hooked():
        model.model.vision_tower(pixels)
    # In full are the frames that differ from the one before them.
    distinct = 1 + sum(not torch.equal(before, frame) for before, frame in zip(pixels, pixels[1:], strict=False))
    changed, full = int(encoder.plan.computed) / 512, len(encoder.full_layers)
    work = (full * distinct / 8 + (len(layers) - full) * changed) / len(layers)
    return model.model.apply_pooling(model.model.multi_modal_projector(encoder.output)), work


@pytest.mark.parametrize(
    "given",
    [
        {"tau_reuse": 0.06, "full_layers": (1,)},
        pytest.param({"encode_ratio": 0.3, "full_layers": ()}, marks=pytest.mark.long),
    ],
)
@torch.no_grad()
def test_reuse_alone_keeps_every_token_and_costs_what_is_computed(shallow, videos, given):
    compress = methods.method(installed.REUSE, shallow, 0.1, **given)
    for pixels in videos:
        tokens, work = reused(shallow, pixels, **{"tau_reuse": 0.03, **given})
        found = compress(pixels)
        torch.testing.assert_close(found.tokens, tokens.flatten(0, 1), rtol=1e-4, atol=1e-5)
        assert found.work == pytest.approx(work, abs=1e-12) and work < 1


@torch.no_grad()
def test_plus_reuses_and_selects_what_represents_the_rest(shallow, videos):
    compress = methods.method("earlytom plus", shallow, 0.15, full_layers=(3,))
    for pixels in videos:
        tokens, work = reused(shallow, pixels, tau_reuse=EarlyTomConfig.tau_reuse, full_layers=(3,))
        kept = reference.select_representatives(tokens, frames_in=8, retain_ratio=0.15)
        found = compress(pixels)
        torch.testing.assert_close(found.tokens, tokens[kept[:, 0], kept[:, 1]], rtol=1e-4, atol=1e-5)
        assert found.work == pytest.approx(work, abs=1e-12)


EVERY = {"tau_seg": 0.5, "max_window": 4, "tau_merge": 0.9, "tau_reuse": 0.1, "full_layers": (7,)}


@pytest.mark.parametrize(
    "names, reuse, takes",
    [
        (("earlytom paper", "earlytom released"), {}, {"tau_seg", "max_window", "tau_merge"}),
        (("earlytom paper",), {"reuse": True}, {"reuse", "tau_seg", "max_window", "tau_reuse", "full_layers"}),
        (("earlytom plus", installed.REUSE), {}, {"tau_reuse", "full_layers"}),
        (("earlytom plus",), {"reuse": False}, {"reuse", "tau_seg", "max_window", "tau_merge"}),
        ((installed.PLUS_MERGING,), {"reuse": True}, {"tau_seg", "max_window", "tau_merge"}),
        ((methods.STAGE_1, "only stage 2", "random tokens"), {"reuse": True}, {"tau_seg", "tau_merge"}),
        ((methods.ALL_TOKENS, "frame subsampling", "average pooling"), {"reuse": True}, set()),
    ],
)
def test_each_method_takes_what_means_something_to_it(names, reuse, takes):
    for name in names:
        found = methods.taken(name, {**EVERY, **reuse})
        assert found == {option: value for option, value in {**EVERY, **reuse}.items() if option in takes}
        EarlyTomConfig.from_options(
            {**(installed.own_options(name) or {"variant": "paper"}), **found}
        )  # refuses what has no effect


@pytest.mark.long  # compiles twice; the ratio and the variant reach it in the test above
@torch.no_grad()
def test_options_reach_the_installed_code(shallow, videos):
    none, many = (methods.method("earlytom paper", shallow, 0.25, merge_layers=layers) for layers in ((0,), (0, 1, 2)))
    assert not torch.equal(none(videos[0]).tokens, many(videos[0]).tokens)


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
        assert {len(compress(pixels).tokens) for pixels in videos} == {count}, name


def test_all_tokens_are_the_models_own(model, videos):
    compress = methods.method(methods.ALL_TOKENS, model, 0.1)
    tokens, work, _ = compress(videos[0])
    torch.testing.assert_close(tokens, uncompressed(model, videos[0]), rtol=1e-5, atol=1e-6)
    nothing = methods.method(methods.NO_TOKENS, model, 0.1)(videos[0])
    assert work == 1 and len(nothing.tokens) == nothing.work == nothing.flops == 0


def test_frame_subsampling_takes_whole_frames_from_the_middle_of_equal_parts(model, videos):
    kept, work, _ = methods.method("frame subsampling", model, 0.25)(videos[1])
    assert work == 2 / 8
    every = uncompressed(model, videos[1]).view(8, 16, -1)
    torch.testing.assert_close(kept, every[[2, 6]].flatten(0, 1), rtol=1e-4, atol=1e-5)


def test_average_pooling_averages_blocks(model, videos):
    kept, _, _ = methods.method("average pooling", model, 0.25)(videos[1])
    every = uncompressed(model, videos[1]).view(8, 2, 2, 2, 2, -1)  # frame, row, in block, column, in block
    torch.testing.assert_close(kept, every.mean((2, 4)).flatten(0, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["only stage 2", "frame subsampling"])
def test_what_selects_without_merging_takes_tokens_as_they_are(model, videos, name):
    kept, work, _ = methods.method(name, model, 0.1)(videos[2])
    assert work == (1 if name == "only stage 2" else 1 / 8)
    # Through a matrix product, as cdist computes large ones, equal rows would be 1e-2 apart.
    distances = torch.cdist(kept, uncompressed(model, videos[2]), compute_mode="donot_use_mm_for_euclid_dist")
    assert distances.min(1).values.max() < 1e-3


def test_random_tokens_differ_by_video_and_not_by_run(model, videos):
    compress = methods.method("random tokens", model, 0.1)
    first, again, other = (compress(pixels).tokens for pixels in (videos[0], videos[0], videos[1]))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.allclose(first, other)


def test_top_k_takes_the_most_attended_of_every_frame(model, videos):
    config = EarlyTomConfig(retain_ratio=0.25, variant="paper")
    with torch.no_grad():
        encoded = methods.encode(model, config, videos[0])
    frames = len(encoded.tokens)
    base, spare = divmod(round(0.25 * VIDEO_TOKENS), frames)
    expected = []
    for index in range(frames):
        best = encoded.importance[index].argsort(descending=True, stable=True)[: base + (index < spare)]
        expected.append(encoded.tokens[index, best.sort().values])
    found = methods.method("top-k without decoupling", model, 0.25)(videos[0])
    torch.testing.assert_close(found.tokens, torch.cat(expected))


def test_only_stage_1_keeps_every_token_of_the_frames_left(model):
    still = normalized(torch.from_numpy(sample_video("test", 0).frames()))[:1].expand(8, -1, -1, -1)
    kept, work, _ = methods.method(methods.STAGE_1, model, 0.1)(still)
    # 8 equal frames: 6 middle ones pair to 3, then 5 -> (1 + 1 + 1 of 3) 4.
    assert len(kept) == 16 * 4
    # Frames merge behind layers 1 and 6 of 0 to 7.
    assert work == (8 * 2 + 5 * 5 + 4) / 64


@torch.no_grad()
def test_importance_is_the_attention_of_transformers(model, videos):
    layer = merging.encoder_layers(model)[6]
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
