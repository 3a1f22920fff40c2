"""Methods of other papers, compiled, against the eager oracle with their own rules in loops."""

import pytest
import test_dycoke
import test_fastvid
import test_holitom
import test_prunevid
import torch
from effort import cases
from generating import new_tokens
from oracle import compressed_forward, compressed_generate, reduced_rows
from tiny_models import tiny_llava_onevision, tokens_per_frame, video_inputs

import earlytom_compile
from earlytom_compile import report
from earlytom_compile.methods.base import Step

RULES = {
    "dycoke": lambda tokens, importance, budget: test_dycoke.by_the_rules(tokens, budget),
    "prunevid": lambda tokens, importance, budget: test_prunevid.by_the_rules(tokens, budget),
    "fastvid": test_fastvid.by_the_rules,
    "holitom": test_holitom.by_the_rules,
}
EAGER = {"lowering": "eager", "strict": True}
FRAMES = 6


@pytest.fixture(scope="module")
def model():
    return tiny_llava_onevision(vision_layers=4, text_layers=1, image_size=32)


@pytest.fixture(scope="module")
def deeper():
    return tiny_llava_onevision(vision_layers=2, text_layers=4, image_size=32)


def rule(name):
    def keep(features, importance, keys, budget):
        expected = RULES[name](features.double().tolist(), importance.double().tolist(), budget)
        places = sorted(expected)
        return torch.tensor([expected[place] for place in places]).to(features), torch.tensor(places)

    return keep


@pytest.mark.parametrize(
    ("name", "ratio"),
    cases(
        *[("prunevid", 0.3), ("fastvid", 0.1)],
        among=[(name, ratio) for name in RULES for ratio in (0.1, 0.3, 0.9)],
    ),
)
def test_two_videos_in_a_row_equal_the_oracle(model, name, ratio):
    """The first half of the frames stands still, so that something merges."""
    inputs = video_inputs(model, FRAMES, videos_per_row=(2, 2))
    pixels = inputs["pixel_values_videos"]
    pixels[:, 1:3] = pixels[:, :1]
    options = {"method": name, "retain_ratio": ratio}
    fast = torch.compile(model, backend="earlytom", options={**EAGER, **options})
    with torch.no_grad():
        logits = fast(**inputs).logits
        expected = compressed_forward(model, inputs, variant="paper", retain_ratio=ratio, keep=rule(name))
    mask = expected.cut_attention_mask.bool()
    torch.testing.assert_close(logits[mask], expected.logits[mask], atol=1e-4, rtol=1e-4)
    every = FRAMES * tokens_per_frame(model)
    for video in report(model).to_dict()["videos"]:
        assert video["tokens"] == [every, round(ratio * every)]


INSIDE = {
    "fastv": lambda ratio: [Step(2, ratio, "drop", "all")],
    "pyramiddrop": lambda ratio: [Step(stage, ratio ** (stage / 3), "drop", "last") for stage in (1, 2, 3)],
}
"""The steps in a language model of four layers."""


def all_of_them(features, importance, keys, budget):
    frames, places = features.shape[:2]
    return features.flatten(0, 1), torch.cartesian_prod(torch.arange(frames), torch.arange(places))


@pytest.mark.parametrize(
    ("name", "ratio"),
    cases(("pyramiddrop", 0.6), among=[(name, ratio) for name in INSIDE for ratio in (0.125, 0.6)]),
)
def test_answers_what_the_oracle_answers_that_leaves_tokens_out_inside(deeper, name, ratio):
    inputs = video_inputs(deeper, FRAMES, videos_per_row=(1, 2), before=(5, 2))
    oracle = {"variant": "paper", "retain_ratio": ratio, "keep": all_of_them, "steps": INSIDE[name](ratio)}
    earlytom_compile.compile(deeper, method=name, retain_ratio=ratio, **EAGER)
    try:
        found = new_tokens(deeper, inputs, max_new_tokens=6)
        with torch.no_grad():
            logits = deeper(**inputs).logits[:, -1]
    finally:
        earlytom_compile.restore(deeper)
    expected = torch.stack([row[-1] for row in reduced_rows(deeper, inputs, **oracle)])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(found, compressed_generate(deeper, inputs, 6, **oracle))
