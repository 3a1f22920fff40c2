"""Fewer video tokens inside the language model of a Qwen model: where that is right, and where it is refused."""

from itertools import product

import pytest
import torch
from effort import cases
from generating import new_tokens, share_vision_paths, trace_of_video_rows
from oracle_qwen import compressed_sequences
from oracle_qwen_inner import InnerStep, generated_with_fewer, reduced_logits
from qwen_calls import SMALL, assert_as_the_oracle, compressing, model_of, oracle_options, prompt_of, supported, twin_of
from tiny_qwen import Clip, qwen_inputs
from torch.testing import assert_close

import earlytom_compile
from earlytom_compile import EarlyTomCompileError, EarlyTomFallbackWarning, report


@pytest.fixture(scope="module")
def one_trace():
    return trace_of_video_rows()


@pytest.fixture(scope="module")
def sharing(one_trace):
    with pytest.MonkeyPatch.context() as patch:
        share_vision_paths(one_trace, patch)
        yield


@pytest.fixture
def one_run(sharing):
    """Qwen2.5-VL, whose prompt has each video in one run."""
    yield model_of("qwen2_5_vl")
    earlytom_compile.restore(model_of("qwen2_5_vl"))


@pytest.fixture(params=supported(("qwen3_vl", "qwen3_5")))
def with_time_stamps(request, sharing):
    yield request.param
    earlytom_compile.restore(model_of(request.param))


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_the_oracle_with_nothing_dropped_is_the_one_without(kind):
    twin = twin_of(kind)
    (row, video_of), *_ = compressed_sequences(twin, prompt_of(twin, "two sizes"), **oracle_options())
    with_step = reduced_logits(twin, row, video_of, InnerStep(1, 0.0))
    assert_close(with_step, reduced_logits(twin, row, video_of, InnerStep(99, 0.5)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "prompt, variant, drop_ratio",
    cases(
        ("padding", "paper", 0.5),
        among=list(product(("two sizes", "padding", "everything"), ("paper", "released"), (0.5, 0.9))),
    ),
)  # fmt: skip
def test_logits_and_tokens_are_the_oracles(one_run, prompt, variant, drop_ratio):
    inputs, step = prompt_of(one_run, prompt), InnerStep(1, drop_ratio, variant)
    model = compressing(one_run, variant=variant, inner_layer=1, inner_drop_ratio=drop_ratio)
    with torch.no_grad():
        logits = model(**inputs).logits
    tokens, twin = new_tokens(model, inputs), twin_of("qwen2_5_vl")
    rows = compressed_sequences(twin, inputs, **oracle_options(variant=variant))
    for got, chosen, (row, video_of) in zip(logits, tokens, rows, strict=True):
        expected = reduced_logits(twin, row, video_of, step)
        assert_close(got[len(got) - len(expected) :], expected, atol=1e-4, rtol=1e-4)
        assert chosen.tolist() == generated_with_fewer(twin, row, video_of, step, len(chosen))


@pytest.mark.parametrize("frames, reason", [(9, "a video has text between its tokens"), (1, "time stamps stand")])
def test_where_time_stamps_stand_between_frames_no_tokens_go(with_time_stamps, frames, reason):
    """Nor where there is one frame only: what DeepStack adds to its tokens would have to go with them."""
    model, twin = model_of(with_time_stamps), twin_of(with_time_stamps)
    inputs = qwen_inputs(model, [[3, Clip(frames, *SMALL), 4]])
    with pytest.warns(EarlyTomFallbackWarning, match=f"no tokens go inside the language model: {reason}"):
        assert_as_the_oracle(compressing(model, inner_layer=1), twin, inputs, tokens=False)
    assert report(model).to_dict()["last_call"] == "compressed"
    with pytest.raises(EarlyTomCompileError, match=f"{reason}.*Leave inner_layer out"):
        new_tokens(compressing(model, inner_layer=1, strict=True), inputs)
