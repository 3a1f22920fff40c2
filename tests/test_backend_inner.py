"""Fewer tokens inside the language model where it is part of one graph: logits equal to the oracle's, in every lowering
there is, and a clear word where it cannot be done."""

from functools import partial
from itertools import product

import pytest
import torch
from effort import cases
from generating import LAYOUTS, OPTIONS
from one_trace import OneTrace
from oracle import reduced_rows
from tiny_models import tiny_llava_onevision, video_inputs

import earlytom_compile
from earlytom_compile import EarlyTomCompileError, EarlyTomConfigError, EarlyTomFallbackWarning, backend, report
from earlytom_compile.methods import Method, registry
from earlytom_compile.methods.base import Step

INNER = {**OPTIONS, "retain_ratio": 0.5, "inner_layer": 2}
MEAN = Step(2, 0.5, "mean")
TWO_STEPS = Method(
    "two steps",
    "None: two steps with both sorts of scores.",
    inside=lambda ratio, layers: (Step(1, 0.7, "mean", "all"), Step(2, ratio, "drop")),
)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """To tests in this file alone."""
    monkeypatch.setitem(registry._registered, TWO_STEPS.name, TWO_STEPS)


@pytest.fixture(scope="module")
def model():
    return tiny_llava_onevision(vision_layers=4, text_layers=4)


@pytest.fixture(scope="module")
def one_trace(model):
    return OneTrace(model.forward)


@pytest.fixture
def logits_of(one_trace):
    """Of the model, compiled with these options; Dynamo traces each shape once for all tests."""

    def logits_of(inputs, **options):
        options = {"strict": True, "lowering": "eager", **options}
        with torch.no_grad():
            return one_trace.through(partial(backend.earlytom, options=options))(**inputs).logits

    return logits_of


def logits_of_another(model, inputs, **options):
    fast = torch.compile(model, backend="earlytom", options={"strict": True, "lowering": "eager", **options})
    with torch.no_grad():
        return fast(**inputs).logits


def assert_equals_oracle(model, inputs, logits, steps, **options):
    options = {**OPTIONS, "variant": "paper", "retain_ratio": 0.5, **options}
    for row, expected in enumerate(reduced_rows(model, inputs, steps=steps, **options)):
        torch.testing.assert_close(logits[row, -len(expected) :], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "layout, variant",
    cases(
        ("two videos in a row", "plus"), ("left padding", "paper"),
        among=list(product(["one", "two videos in a row", "left padding"], ["paper", "plus"])),
    ),
)  # fmt: skip
def test_logits_equal_the_oracle(model, logits_of, layout, variant):
    inputs = video_inputs(model, 8, **LAYOUTS[layout])
    logits = logits_of(inputs, **{**INNER, "variant": variant})
    (step,) = report(model).to_dict()["inside"]
    assert step == {"layer": 2, "prompt": logits.shape[1]}
    assert_equals_oracle(model, inputs, logits, [MEAN], variant=variant)


@pytest.mark.long  # in_place/test_inner_steps.py has it in the quick suite
@pytest.mark.parametrize("lowering", ["staged", "whole"])
def test_inductor_gives_the_same_logits(lowering):
    model = tiny_llava_onevision(vision_layers=2, text_layers=3)
    inputs = video_inputs(model, 8, **LAYOUTS["left padding"])
    logits = logits_of_another(model, inputs, lowering=lowering, **{**INNER, "merge_layers": (0,)})
    assert_equals_oracle(model, inputs, logits, [MEAN], merge_layers=(0,))


def test_several_steps(model, logits_of):
    inputs = video_inputs(model, 6, **LAYOUTS["left padding"])
    logits = logits_of(inputs, method=TWO_STEPS.name, retain_ratio=0.3)
    assert [step["layer"] for step in report(model).to_dict()["inside"]] == [1, 2]
    steps = TWO_STEPS.inside(0.3, 4)
    assert_equals_oracle(model, inputs, logits, steps, retain_ratio=1.0, tau_seg=2.0)


def test_attention_spelled_out():
    model = tiny_llava_onevision(vision_layers=4, text_layers=4, attn_implementation="eager")
    inputs = video_inputs(model, 8, **LAYOUTS["left padding"])
    logits = logits_of_another(model, inputs, **INNER)
    model.set_attn_implementation("sdpa")
    assert_equals_oracle(model, inputs, logits, [MEAN])


def test_given_position_ids_stay_with_their_tokens(model, logits_of):
    inputs = video_inputs(model, 8, **LAYOUTS["left padding"])
    counted = logits_of(inputs, **INNER)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    given = logits_of({**inputs, "position_ids": positions}, **INNER)
    torch.testing.assert_close(given[0], counted[0], atol=1e-5, rtol=1e-5)


def test_rows_that_keep_different_numbers_have_a_reason(model, logits_of):
    inputs = video_inputs(model, 8, **LAYOUTS["different numbers of videos"])
    with pytest.raises(EarlyTomCompileError, match="rows of the batch keep different numbers.*compile\\(model\\)"):
        logits_of(inputs, **INNER)
    with pytest.warns(EarlyTomFallbackWarning, match="rows of the batch keep different numbers"):
        logits = logits_of(inputs, **{**INNER, "strict": False})
    assert logits.shape[1] == inputs["input_ids"].shape[1]
    with pytest.raises(EarlyTomCompileError, match="rows of the batch keep different numbers"):
        logits_of(video_inputs(model, 8), **{**INNER, "variant": "released"})


def test_a_layer_that_does_not_exist(model, logits_of):
    with pytest.raises(EarlyTomConfigError, match="inner_layer=9: the language model has layers 0 to 3"):
        logits_of(video_inputs(model, 8), **{**INNER, "inner_layer": 9})


def test_without_the_option_the_graph_has_nothing_of_it(model, logits_of):
    options = {name: value for name, value in INNER.items() if name != "inner_layer"}
    logits_of(video_inputs(model, 8), **options)
    found = report(model).to_dict()
    assert found["inside"] == [] and not {"keep_inner_tokens", "attention_paid"} & set(found["inserted"])
    earlytom_compile.restore(model)
