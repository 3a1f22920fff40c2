"""Fewer video tokens inside the language model of a Qwen model: between time stamps and under DeepStack, too. Where
some layers have linear attention it is refused."""

from itertools import product

import pytest
import torch
from effort import cases
from generating import new_tokens
from oracle_qwen import compressed_sequences
from oracle_qwen_inner import InnerStep, generated_with_fewer, reduced_logits
from qwen_calls import assert_as_the_oracle, compressing, model_of, oracle_options, prompt_of, supported, twin_of
from torch.testing import assert_close

import earlytom_compile
from earlytom_compile import EarlyTomCompileError, EarlyTomFallbackWarning, report


@pytest.fixture(scope="module", params=supported(("qwen2_5_vl", "qwen3_vl"), long=("qwen2_5_vl",)))
def kind(request, sharing):
    """A prompt of Qwen2.5-VL has each video in one run, one of Qwen3-VL a run for each frame."""
    yield request.param
    earlytom_compile.restore(model_of(request.param))


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
def test_logits_and_tokens_are_the_oracles(kind, prompt, variant, drop_ratio):
    """DeepStack adds to what layers 1 and 2 give, of fewer tokens."""
    inputs, step = prompt_of(model_of(kind), prompt), InnerStep(1, drop_ratio, variant)
    model = compressing(model_of(kind), variant=variant, inner_layer=1, inner_drop_ratio=drop_ratio, strict=True)
    with torch.no_grad():
        logits = model(**inputs).logits
    tokens, twin = new_tokens(model, inputs, max_new_tokens=3), twin_of(kind)
    rows = compressed_sequences(twin, inputs, **oracle_options(variant=variant))
    for got, chosen, (row, video_of) in zip(logits, tokens, rows, strict=True):
        expected = reduced_logits(twin, row, video_of, step)
        assert_close(got[len(got) - len(expected) :], expected, atol=1e-4, rtol=1e-4)
        assert chosen.tolist() == generated_with_fewer(twin, row, video_of, step, len(chosen))


def test_where_attention_is_linear_no_tokens_go(sharing):
    model, twin = model_of("qwen3_5"), twin_of("qwen3_5")
    inputs = prompt_of(model, "one video")
    with pytest.warns(EarlyTomFallbackWarning, match="no tokens go inside the language model: .*linear attention"):
        assert_as_the_oracle(compressing(model, inner_layer=2), twin, inputs)
    assert report(model).to_dict()["last_call"] == "compressed"
    with pytest.raises(EarlyTomCompileError, match="linear attention.*no inner_layer"):
        new_tokens(compressing(model, inner_layer=2, strict=True), inputs)
    earlytom_compile.restore(model)
