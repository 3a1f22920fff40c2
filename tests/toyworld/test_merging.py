"""Frames that merge inside the encoder: runs beside a loop over tokens, the paper's rule beside the specification."""

import math
from dataclasses import replace

import pytest
import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from torch_counter import counter

from earlytom_compile import reference
from earlytom_compile.config import EarlyTomConfig
from earlytom_compile.shapes import ModelShape
from earlytom_compile.toyworld import cost, methods
from earlytom_compile.toyworld.answers import normalized
from earlytom_compile.toyworld.checkpoint import build_model
from earlytom_compile.toyworld.language import build_tokenizer
from earlytom_compile.toyworld.merging import EMBEDDING, Merging, by_worst_token, encoder_layers, runs, worst_tokens
from earlytom_compile.toyworld.model import SHAPE
from earlytom_compile.toyworld.world import sample_video


@pytest.fixture(scope="module")
def model():
    return build_model(replace(SHAPE, vision_layers=4, text_layers=1), build_tokenizer(), seed=3).eval()


@pytest.fixture(scope="module")
def videos():
    return [normalized(torch.from_numpy(sample_video("test", seed).frames())) for seed in range(4)]


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def merged_in_runs(frames, counts, tau):
    """Loops over frames, places and channels: frames [T][S][D], how many frames each stands for [T]."""
    groups = []
    for number, frame in enumerate(frames):
        if groups and min(map(cosine, frames[groups[-1][0]], frame)) >= tau:
            groups[-1].append(number)
        else:
            groups.append([number])
    left = []
    for group in groups:
        total = sum(counts[number] for number in group)
        left.append([
            [sum(counts[number] * frames[number][place][channel] for number in group) / total for channel in range(3)]
            for place in range(len(frames[0]))
        ])  # fmt: skip
    return left, [sum(counts[number] for number in group) for group in groups]


@examples(80)
@given(st.integers(1, 8), st.integers(1, 4), st.floats(-0.9, 0.95), st.integers(0, 2**32 - 1), st.floats(0.05, 2))
def test_runs_are_those_of_a_loop(frames, places, tau, seed, change):
    generator = torch.Generator().manual_seed(seed)
    steps = change * torch.randn(frames, places, 3, generator=generator, dtype=torch.float64)
    hidden, counts = steps.cumsum(0) + 1, torch.randint(1, 4, (frames,), generator=generator).double()
    if (worst_tokens(hidden) - tau).abs().min() < 1e-9:
        return
    found, stands_for = by_worst_token(tau)(hidden, counts)
    left, frames_of = merged_in_runs(hidden.tolist(), counts.tolist(), tau)
    torch.testing.assert_close(found, torch.tensor(left, dtype=torch.float64))
    assert stands_for.tolist() == frames_of and sum(frames_of) == counts.sum()


def test_one_changed_token_keeps_a_frame_apart_whatever_its_mean_says():
    hidden = torch.ones(3, 16, 4)
    hidden[1, 5] = -1
    left, stands_for = by_worst_token(0.9)(hidden, torch.ones(3))
    assert torch.equal(left, hidden) and stands_for.tolist() == [1, 1, 1]
    assert reference.frame_similarity(hidden[0], hidden[1]) > 0.85


@torch.no_grad()
def by_hand(model, pixels, tau, layers):
    """Tokens [n, 16, C] and how many frames each layer computed: layer by layer, without hooks."""
    tower = model.model.vision_tower
    (embeddings,) = (module for name, module in tower.named_modules() if name.endswith("embeddings"))
    hidden, counts, computed = embeddings(pixels), torch.ones(len(pixels)), []
    rule = by_worst_token(tau)
    hidden, counts = rule(hidden, counts)
    for number, layer in enumerate(encoder_layers(model)):
        computed.append(len(hidden))
        output = layer(hidden, attention_mask=None)
        hidden = output[0] if isinstance(output, tuple) else output
        if number in layers:
            hidden, counts = rule(hidden, counts)
    return model.model.apply_pooling(model.model.multi_modal_projector(hidden)), computed


@pytest.mark.parametrize("tau", [0.99, 0.6, -1.0])
def test_runs_merge_behind_the_embedding_and_where_the_paper_merges(model, videos, tau):
    layers = EarlyTomConfig(variant="paper").resolve_merge_layers(4)
    compress = runs(model, tau)
    for pixels in videos:
        expected, computed = by_hand(model, pixels, tau, layers)
        found = compress(pixels)
        torch.testing.assert_close(found.tokens, expected.flatten(0, 1), rtol=1e-5, atol=1e-6)
        assert found.work == sum(computed) / 32
        if tau == -1:
            assert computed == [1] * 4 and len(found.tokens) == 16


@pytest.mark.parametrize("ratio", [0.25, 0.1])
def test_behind_runs_the_selection_of_plus_keeps_what_there_is_at_most(model, videos, ratio):
    for tau in (0.9, -1.0):
        every, some = runs(model, tau), runs(model, tau, ratio)
        for pixels in videos:
            rows = every(pixels).tokens.view(-1, 16, 128)
            budget = min(round(128 * ratio), 16 * len(rows))
            exact = budget / (8 * 16)
            kept = reference.select_representatives(rows, frames_in=8, retain_ratio=exact)
            torch.testing.assert_close(some(pixels).tokens, rows[kept[:, 0], kept[:, 1]])


@pytest.mark.parametrize("ratio", [None, 0.1])
def test_operations_of_runs_are_what_torch_counts(model, videos, ratio):
    compress = runs(model, 0.7, ratio)
    for pixels in videos:
        with counter() as counted:
            compress.tokens(pixels)
        found = compress(pixels)
        left = found.flops - counted.get_total_flops()
        # Inside an operator of ours torch sees nothing.
        frames = len(runs(model, 0.7)(pixels).tokens) // 16
        assert left == (0 if ratio is None else cost.representatives(ModelShape.from_config(model.config), frames))


@pytest.mark.parametrize("options", [{}, {"tau_seg": 0.9}, {"tau_merge": 0.97}, {"merge_layers": (0, 2)}])
def test_stage_1_by_operators_is_that_of_the_specification(model, videos, options):
    compress = methods.method(methods.STAGE_1, model, 0.1, **options)
    config = EarlyTomConfig(retain_ratio=0.1, variant="paper", **options)
    assert isinstance(compress, Merging)
    for pixels in videos:
        with torch.no_grad():
            encoded = methods.encode(model, config, pixels)
        found = compress(pixels)
        torch.testing.assert_close(found.tokens, encoded.tokens.flatten(0, 1), rtol=1e-5, atol=1e-6)
        assert found.work == sum(encoded.computed_frames) / 32 and found.flops == encoded.flops


def test_the_model_itself_has_no_hooks(model, videos):
    compress = Merging(model, by_worst_token(-1.0), (EMBEDDING,))
    with torch.no_grad():
        before = model.model.vision_tower(videos[0]).last_hidden_state
        assert len(compress(videos[0]).tokens) == 16
        assert torch.equal(model.model.vision_tower(videos[0]).last_hidden_state, before)
