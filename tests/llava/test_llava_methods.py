"""Methods of other papers on LLaVA's own models: with their own rules in loops, between newlines of every layout."""

from itertools import product

import pytest
import test_dycoke
import test_fastvid
import test_holitom
import test_prunevid
import torch
from effort import cases
from generating import trace_of_video_rows
from llava_calls import CLOSE, NEWLINES, Call, check_generate, clip, compiled, expected, generated, shared
from oracle_llava import grid_side
from plain_visionzip import keep_in_python
from tiny_llava import tiny_llava

import earlytom_compile
from earlytom_compile import report
from earlytom_compile.methods.base import Step

TEXT, VIDEO, IMAGE = "text", "video", "image"
ONE, SEVERAL = [[TEXT, VIDEO, TEXT]], [[TEXT, VIDEO, VIDEO, TEXT], [VIDEO, TEXT, IMAGE]]
PLAIN = {"variant": None, "merge_layers": None, "reuse": None, "tau_seg": 0.6}
"""Nothing of what belongs to EarlyTom's own method."""
RULES = {
    "dycoke": lambda tokens, importance, budget: test_dycoke.by_the_rules(tokens, budget),
    "prunevid": lambda tokens, importance, budget: test_prunevid.by_the_rules(tokens, budget),
    "fastvid": test_fastvid.by_the_rules,
    "holitom": test_holitom.by_the_rules,
}
INSIDE = {
    "fastv": lambda ratio: [Step(2, ratio, "drop", "all")],
    "pyramiddrop": lambda ratio: [Step(stage, ratio ** (stage / 3), "drop", "last") for stage in (1, 2, 3)],
}
"""The steps in a language model of four layers."""


@pytest.fixture(scope="module")
def pristine():
    return tiny_llava(pool="average", text_layers=4, tokenizer_padding_side="left")


@pytest.fixture(scope="module")
def one_trace():
    return trace_of_video_rows()


@pytest.fixture
def model(pristine, one_trace, monkeypatch):
    yield from shared(pristine, one_trace, monkeypatch)


def rule(name):
    """What a method keeps of a video, for the oracle."""

    def zipped(features, importance, keys, budget):
        tokens, places = keep_in_python(features.tolist(), importance.tolist(), keys.tolist(), budget)
        return torch.tensor(tokens), torch.tensor(places)

    def keep(features, importance, keys, budget):
        kept = RULES[name](features.double().tolist(), importance.double().tolist(), budget)
        places = sorted(kept)
        return torch.tensor([kept[place] for place in places]).to(features), torch.tensor(places)

    return zipped if name == "visionzip" else keep


def everything(features, importance, keys, budget):
    frames, places = features.shape[:2]
    return features.flatten(0, 1), torch.cartesian_prod(torch.arange(frames), torch.arange(places))


def still(model, frames=4, seed=1):
    """A video whose first half stands still, so that something merges."""
    pixels = clip(model, frames, seed=seed)
    pixels[1 : frames // 2] = pixels[0]
    return pixels


@pytest.mark.parametrize(
    "name, newline",
    cases(
        ("visionzip", "grid"), ("visionzip", "frame"), ("visionzip", "one_token"), ("visionzip", "no_token"),
        ("dycoke", "grid"), ("prunevid", "frame"), ("fastvid", "one_token"), ("holitom", "grid"),
        among=list(product(["visionzip", *RULES], NEWLINES)),
    ),
)  # fmt: skip
def test_rows_of_a_video(model, name, newline):
    model.config.mm_newline_position = newline
    call = Call(torch.tensor([[5, -200, 6]]), [still(model)], ["video"])
    (video,) = expected(model, call, **PLAIN, keep=rule(name)).videos
    (rows,) = earlytom_compile.encode_videos(compiled(model, **PLAIN, method=name), call.images)
    torch.testing.assert_close(rows, video.rows, **CLOSE)
    every = 4 * grid_side(model) ** 2
    assert report(model).to_dict()["videos"] == [{"frames": [4], "tokens": [every, round(0.2 * every)]}]


@pytest.mark.parametrize("pool", ["bilinear", "max"])
@pytest.mark.parametrize("name", ["visionzip", "fastvid"])
def test_attention_and_keys_are_pooled_as_the_features_are(one_trace, monkeypatch, name, pool):
    for model in shared(tiny_llava(pool=pool, newline="grid"), one_trace, monkeypatch):
        call = Call(torch.tensor([[5, -200, 6]]), [still(model)], ["video"])
        (video,) = expected(model, call, **PLAIN, keep=rule(name)).videos
        (rows,) = earlytom_compile.encode_videos(compiled(model, **PLAIN, method=name), call.images)
        torch.testing.assert_close(rows, video.rows, **CLOSE)


@pytest.mark.parametrize("name", ["visionzip", "dycoke"])
def test_answers(model, name):
    model.config.mm_newline_position = "grid"
    call = Call.of(model, SEVERAL, frames=4, left=True)
    check_generate(model, call, oracle={"keep": rule(name)}, **PLAIN, method=name)


def test_what_is_left_behind_the_encoder_merges_inside(model):
    model.config.mm_newline_position = "frame"
    oracle = {"keep": rule("holitom"), "steps": [Step(2, 0.5, "mean")]}
    call = Call.of(model, SEVERAL, frames=4, left=True)
    check_generate(model, call, oracle=oracle, **PLAIN, method="holitom", inner_layer=2)


@pytest.mark.parametrize(
    "name, ratio, newline",
    cases(
        ("fastv", 0.1, "grid"), ("fastv", 0.6, "one_token"),
        ("pyramiddrop", 0.1, "frame"), ("pyramiddrop", 0.6, "grid"),
        among=list(product(INSIDE, [0.1, 0.6], NEWLINES)),
    ),
)  # fmt: skip
def test_answers_where_tokens_are_left_out_inside(model, name, ratio, newline):
    """Newlines are among a video's tokens there."""
    model.config.mm_newline_position = newline
    oracle, options = {"keep": everything, "steps": INSIDE[name](ratio)}, {"method": name, "retain_ratio": ratio}
    call = Call.of(model, SEVERAL, frames=2, left=True)
    check_generate(model, call, oracle=oracle, **PLAIN, **options)
    told = report(model).to_dict()
    assert told["prompt"][0] == told["prompt"][1] > told["inside"][-1]["prompt"]
    assert [step["layer"] for step in told["inside"]] == [step.layer for step in oracle["steps"]]


@pytest.mark.parametrize("name", ["visionzip", *RULES, *INSIDE])
def test_everything_kept_is_the_models_own(model, name):
    model.config.mm_newline_position = "grid"
    call = Call.of(model, SEVERAL, frames=2, left=True)
    own = generated(model, call)
    assert torch.equal(generated(compiled(model, **PLAIN, method=name, retain_ratio=1.0), call), own)
