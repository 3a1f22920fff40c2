"""Qwen2.5-VL, Qwen3-VL and Qwen3.5 in place: tokens and logits equal to those of the oracle."""

from itertools import product

import pytest
import torch
from effort import cases, examples
from generating import new_tokens, share_vision_paths, trace_of_video_rows
from hypothesis import given
from hypothesis import strategies as st
from oracle_qwen import compressed_rows, compressed_videos
from qwen_calls import (
    EVERYTHING,
    PROMPTS,
    SMALL,
    WIDE,
    assert_rows_of_the_oracle,
    compressing,
    oracle_options,
    oracle_tokens,
    prompt_of,
)
from tiny_qwen import KINDS, PLAIN_KINDS, Clip, has_deepstack, qwen_inputs, row_alone, tiny_qwen
from torch.nn import functional as F
from torch.testing import assert_close

import earlytom_compile
from earlytom_compile import report, reporting

VARIANTS = ("paper", "released", "plus")


@pytest.fixture(scope="module")
def models():
    return {kind: tiny_qwen(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def one_trace():
    return trace_of_video_rows()


@pytest.fixture
def sharing(one_trace, monkeypatch):
    share_vision_paths(one_trace, monkeypatch)


@pytest.fixture(params=PLAIN_KINDS)
def model(request, models, sharing):
    yield models[request.param]
    earlytom_compile.restore(models[request.param])
    reporting._RESTORED.clear()


def counts_of(model):
    return [(video["frames"], video["tokens"]) for video in report(model).to_dict()["videos"]]


@pytest.mark.parametrize(
    "kind, variant",
    cases(
        ("one video", "plus"), ("one video", "released"), ("two sizes", "plus"), ("padding", "released"),
        ("an image beside", "paper"), ("everything", "paper"),
        among=list(product(PROMPTS, VARIANTS)),
    ),
)  # fmt: skip
def test_tokens_logits_and_counts_are_the_oracles(model, kind, variant):
    inputs = prompt_of(model, kind)
    got = new_tokens(compressing(model, variant=variant), inputs)
    counts = counts_of(model)
    assert torch.equal(got, oracle_tokens(model, inputs, variant=variant))
    videos = compressed_videos(model, inputs, **oracle_options(variant=variant))
    frames = inputs["video_grid_thw"][:, 0].tolist()
    assert counts == [
        ([count, *video.frames_after], [video.placeholders, len(video.kept)])
        for count, video in zip(frames, videos, strict=True)
    ]
    assert_rows_of_the_oracle(model, inputs, variant=variant)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in PLAIN_KINDS])
def test_models_with_experts(models, kind, sharing):
    inputs = prompt_of(models[kind], "everything")
    got = new_tokens(compressing(models[kind]), inputs)
    assert torch.equal(got, oracle_tokens(models[kind], inputs))
    assert_rows_of_the_oracle(models[kind], inputs)


@pytest.mark.parametrize("merge_layers", [(), (0,), (2,), (5,), (0, 3), (1, 2, 4), (2, 5), (0, 1, 2, 3, 4, 5)])
@pytest.mark.parametrize("variant", ["paper", "plus"])
def test_any_layers_merge(model, merge_layers, variant):
    """Those of full attention and those of windows, before and behind those that reach the language model."""
    inputs = qwen_inputs(model, [[3, Clip(9, *WIDE, scenes=2), 4]])
    assert_rows_of_the_oracle(model, inputs, variant=variant, merge_layers=merge_layers)


def test_the_layers_that_merge_by_default(model):
    inputs = prompt_of(model, "one video")
    got = new_tokens(compressing(model, merge_layers=None), inputs)
    layers = report(model).to_dict()["merge_layers"]
    assert layers
    assert torch.equal(got, oracle_tokens(model, inputs, merge_layers=layers))


@examples(8)
@given(
    frames=st.integers(1, 12),
    scenes=st.integers(1, 3),
    drift=st.sampled_from([0.05, 0.25, 0.6]),
    still=st.booleans(),
    grid=st.sampled_from([SMALL, WIDE]),
    seed=st.integers(0, 1000),
)
def test_any_video(models, one_trace, frames, scenes, drift, still, grid, seed):
    clip = Clip(frames, *grid, scenes=scenes, drift=drift, still=still)
    with pytest.MonkeyPatch.context() as patch:
        share_vision_paths(one_trace, patch)
        for kind in PLAIN_KINDS:
            inputs = qwen_inputs(models[kind], [[2, clip, 3]], seed=seed)
            assert_rows_of_the_oracle(models[kind], inputs)


@pytest.mark.parametrize("retain_ratio", [0.001, 0.07, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("variant", ["paper", "plus"])
def test_exactly_so_many_tokens_are_kept(model, variant, retain_ratio):
    inputs = prompt_of(model, "two sizes")
    new_tokens(compressing(model, variant=variant, retain_ratio=retain_ratio), inputs)
    kept = [tokens[1] for _, tokens in counts_of(model)]
    assert kept == [max(1, round(retain_ratio * count)) for count in (9 * 6, 5 * 15)]


def test_no_segment_is_longer_than_128_frames_unless_asked_for(model):
    """Of 132 equal frames of one token, in segments of 128 and 4, or in one."""
    inputs = qwen_inputs(model, [[2, Clip(132, 2, 2, still=True), 2]])
    for max_window, expected in ((None, [132, 68, 35]), (200, [132, 67, 35])):
        options = {"retain_ratio": 0.25, "max_window": max_window}
        new_tokens(compressing(model, **options), inputs, max_new_tokens=1)
        assert counts_of(model) == [(expected, [132, 33])]
        assert_rows_of_the_oracle(model, inputs, **options)


def test_each_row_equals_that_row_alone(model):
    inputs = prompt_of(model, "everything")
    together = new_tokens(compressing(model), inputs)
    for row in range(len(together)):
        assert torch.equal(new_tokens(model, row_alone(inputs, row))[0], together[row])


@pytest.mark.parametrize("options", [EVERYTHING, {"retain_ratio": 1.0, "merge_layers": ()}])
@pytest.mark.parametrize("variant", ["paper", "plus"])
def test_with_everything_kept_it_is_the_model_itself(model, options, variant):
    inputs = prompt_of(model, "everything")
    tokens = new_tokens(model, inputs)
    with torch.no_grad():
        logits = model(**inputs).logits
        assert_close(compressing(model, variant=variant, **options)(**inputs).logits, logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(new_tokens(model, inputs), tokens)
    assert all(tokens[0] == tokens[1] for _, tokens in counts_of(model))


def test_images_beside_a_video_are_untouched_bit_for_bit(model):
    inputs = prompt_of(model, "everything")
    cut = [ids for ids, _ in compressed_rows(model, inputs, **oracle_options())]
    length = max(map(len, cut))
    ids = {"plain": inputs["input_ids"], "compressed": torch.stack([F.pad(row, (length - len(row), 0)) for row in cut])}
    rows = {}

    def look(module, args, kwargs):
        pictures = ids[call] == model.config.image_token_id
        rows[call] = [kwargs["inputs_embeds"][pictures]]
        if kwargs.get("deepstack_visual_embeds") is not None:
            among = pictures[kwargs["visual_pos_masks"]]
            rows[call] += [states[among] for states in kwargs["deepstack_visual_embeds"]]

    hook = model.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.no_grad():
            call = "plain"
            model(**inputs)
            call = "compressed"
            compressing(model)(**inputs)
    finally:
        hook.remove()
    assert len(rows["plain"]) == (4 if has_deepstack(model) else 1) and len(rows["plain"][0]) == 8 + 4
    assert all(map(torch.equal, rows["plain"], rows["compressed"]))
