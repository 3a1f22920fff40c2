"""Fewer tokens inside the language model of LLaVA's own models: every position against an eager oracle, row by row."""

from itertools import combinations, product

import pytest
import torch
from effort import cases
from generating import trace_of_video_rows
from llava_calls import (
    CLOSE_LOGITS,
    NEWLINES,
    VARIANTS,
    WAYS_TO_REUSE,
    Call,
    check_generate,
    clip,
    compiled,
    expected,
    generated,
    shared,
    words,
)
from oracle_inner import reduced_logits
from tiny_llava import tiny_llava

import earlytom_compile
from earlytom_compile import EarlyTomCompileError, EarlyTomConfigError, EarlyTomFallbackWarning, report
from earlytom_compile.methods.base import Step

TEXT, VIDEO, IMAGE, CROPS = "text", "video", "image", "crops"
LAYOUTS = {
    "one": [[TEXT, VIDEO, TEXT]],
    "two videos": [[TEXT, VIDEO, VIDEO, TEXT]],
    "a video and images": [[TEXT, IMAGE, VIDEO, TEXT, CROPS]],
    "different prompts": [[TEXT, VIDEO, TEXT], [VIDEO, TEXT, TEXT, TEXT]],
    "different numbers": [[TEXT, VIDEO, TEXT], [VIDEO, TEXT, VIDEO, IMAGE, TEXT], [TEXT, IMAGE, TEXT]],
    "it ends in a video": [[TEXT, VIDEO], [TEXT, TEXT, VIDEO]],
}
LAYER, LAYERS = 1, 3
INNER = {"inner_layer": LAYER, "retain_ratio": 0.1}


@pytest.fixture(scope="module")
def pristine():
    return tiny_llava(newline="grid", pool="average", text_layers=LAYERS, tokenizer_padding_side="left")


@pytest.fixture(scope="module")
def one_trace():
    return trace_of_video_rows()


@pytest.fixture
def model(pristine, one_trace, monkeypatch):
    yield from shared(pristine, one_trace, monkeypatch)


def steps_of(variant="paper", drop=0.5):
    return [Step(LAYER, 1 - drop, "sequential" if variant == "released" else "mean")]


def check(model, call, variant="paper", **options):
    check_generate(model, call, variant=variant, oracle={"steps": steps_of(variant)}, **{**INNER, **options})


@pytest.mark.parametrize(
    "layout, variant",
    cases(
        ("one", "paper"), ("two videos", "released"), ("a video and images", "plus"), ("different prompts", "paper"),
        ("different numbers", "released"), ("it ends in a video", "paper"),
        among=list(product(LAYOUTS, VARIANTS)),
    ),
)  # fmt: skip
def test_layouts(model, layout, variant):
    check(model, Call.of(model, LAYOUTS[layout], left=True), variant)


@pytest.mark.parametrize("newline", NEWLINES)
def test_newlines_are_among_the_tokens_of_a_video(model, newline):
    """They compete with them, and merge into them."""
    model.config.mm_newline_position = newline
    call = Call.of(model, LAYOUTS["one"])
    check(model, call)
    prompt = expected(model, call, **INNER)
    generated(compiled(model, **INNER), call)
    size = len(prompt.videos[0].rows)
    assert (size > len(prompt.videos[0].kept)) == (newline != "no_token")
    left = len(prompt.rows[0]) - size + round(0.5 * size)
    assert report(model).to_dict()["inside"] == [{"layer": LAYER, "prompt": left}]


def test_what_happens_inside_changes_the_answers(model):
    call = Call.of(model, LAYOUTS["different prompts"], left=True)
    prompt = expected(model, call, retain_ratio=0.1)
    ways = [[], steps_of("paper"), steps_of("released"), [Step(LAYER, 0.5, "drop")]]
    logits = [reduced_logits(model, prompt.rows[0], prompt.video_of[0], steps)[-1] for steps in ways]
    for one, other in combinations(logits, 2):
        assert (one - other).abs().max() > 100 * CLOSE_LOGITS["atol"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_forward(model, side):
    model.config.tokenizer_padding_side = side
    call = Call.of(model, LAYOUTS["different prompts"], left=side == "left")
    prompt = expected(model, call, **INNER)
    rows = [reduced_logits(model, *each, steps_of()) for each in zip(prompt.rows, prompt.video_of, strict=True)]
    with torch.no_grad():
        logits = compiled(model, **INNER)(**call.forward()).logits
    left, before = logits.shape[1], prompt.embeddings.shape[1]
    assert left < before
    for got, row, whole in zip(logits, rows, prompt.rows, strict=True):
        # Padding stays where it is; a row of which more goes than of the others is padded on the left.
        begin = left - len(row) if side == "left" else left - (before - (len(whole) - len(row)))
        torch.testing.assert_close(got[begin : begin + len(row)], row, **CLOSE_LOGITS)


def test_each_row_equals_that_row_alone(model):
    rows = LAYOUTS["different numbers"]
    call = Call.of(model, rows, left=True)
    together = generated(compiled(model, **INNER), call)
    taken = 0
    for number, (row, ids, mask) in enumerate(zip(rows, call.ids, call.attention_mask, strict=True)):
        own = slice(taken, taken := taken + len(row) - row.count(TEXT))
        parts = call.images[own], call.modalities[own], call.image_sizes[own]
        assert torch.equal(generated(model, Call(ids[mask.bool()][None], *parts))[0], together[number])


@pytest.mark.parametrize("layout", ["one", "different numbers"])
def test_beams_have_the_scores_that_the_oracle_gives_them(model, layout):
    """Log-probabilities of the tokens of each beam, every one computed without a cache."""
    call = Call.of(model, LAYOUTS[layout], left=True)
    prompt = expected(model, call, **INNER)
    choices = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 1.0, "output_scores": True}
    output = generated(compiled(model, **INNER), call, return_dict_in_generate=True, **choices)
    earlytom_compile.restore(model)
    assert len(output.sequences) == 2 * len(prompt.rows)
    for number, sequence in enumerate(output.sequences):
        row, video_of = prompt.rows[number // 2], prompt.video_of[number // 2]
        with torch.no_grad():
            behind = model.get_input_embeddings()(sequence[:-1])
        logits = reduced_logits(model, torch.cat([row, behind]), video_of, steps_of())
        chosen = logits[-len(sequence) :].log_softmax(-1).gather(1, sequence[:, None]).sum()
        torch.testing.assert_close(output.sequences_scores[number], chosen / len(sequence), atol=1e-4, rtol=0)


def test_where_unchanged_patches_are_reused(model):
    options = WAYS_TO_REUSE["plus"]
    call = Call.of(model, LAYOUTS["different prompts"], changing=0.3, left=True)
    check_generate(model, call, oracle={"steps": steps_of()}, **INNER, **options)


@pytest.mark.parametrize("drop", [0.0, 0.3, 0.9])
def test_ratios(model, drop):
    call = Call.of(model, LAYOUTS["one"])
    check_generate(model, call, oracle={"steps": steps_of(drop=drop)}, **INNER, inner_drop_ratio=drop)


@pytest.mark.parametrize("layout", ["one", "different numbers"])
def test_staged(model, layout):
    check(model, Call.of(model, LAYOUTS[layout], left=True), lowering="staged")


def test_a_prompt_longer_than_the_model_takes(model):
    """It is cut behind compression, in the middle of a video."""
    model.config.tokenizer_model_max_length = 150
    call = Call.of(model, [[TEXT, VIDEO, TEXT], [VIDEO, VIDEO, TEXT]], left=True)
    assert expected(model, call, **INNER).embeddings.shape[1] == 150
    check(model, call)


def test_videos_that_were_encoded_before(model):
    call = Call.of(model, [[TEXT, VIDEO, TEXT, IMAGE, VIDEO]])
    tokens = generated(compiled(model, **INNER), call)
    first, image, second = call.images
    first, second = earlytom_compile.encode_videos(model, [first, second])
    assert torch.equal(generated(model, call.but(images=[first, image, second])), tokens)


def test_one_placeholder_too_many_is_the_last_video_once_more(model):
    ids, pixels = torch.tensor([[5, -200, 6, -200, *words(2, 1)]]), clip(model)
    twice = generated(compiled(model, **INNER), Call(ids, [pixels, pixels], ["video", "video"]))
    assert torch.equal(generated(model, Call(ids, [pixels], ["video"])), twice)


def test_a_call_without_a_video_runs_the_models_own_code(model):
    call = Call.of(model, [[TEXT, IMAGE, TEXT], [TEXT, TEXT, IMAGE, TEXT]], left=True)
    own = generated(model, call)
    assert torch.equal(generated(compiled(model, **INNER), call), own)
    assert report(model).to_dict()["inside"] == []


def test_one_call_after_another(model):
    """What one leaves behind, the next does not see."""
    calls = [Call.of(model, LAYOUTS[layout], left=True, seed=seed) for seed, layout in enumerate(LAYOUTS)]
    alone = []
    for call in calls:
        alone.append(generated(compiled(model, **INNER), call))
        earlytom_compile.restore(model)
    compiled(model, **INNER)
    for call, tokens in [*zip(calls, alone, strict=True), (calls[0], alone[0])]:
        assert torch.equal(generated(model, call), tokens)


def test_restored_it_is_the_models_own(model):
    call = Call.of(model, LAYOUTS["one"])
    before = [dict(layer.__dict__) for layer in model.model.layers]
    own = generated(model, call)
    generated(compiled(model, **INNER), call)
    assert torch.equal(generated(earlytom_compile.restore(model), call), own)
    assert [dict(layer.__dict__) for layer in model.model.layers] == before


def test_a_static_cache(model):
    """All its layers have one length."""
    call, static = Call.of(model, LAYOUTS["one"]), {"cache_implementation": "static"}
    plain = generated(compiled(model, retain_ratio=0.1), call)
    with pytest.warns(EarlyTomFallbackWarning, match="its cache is static"):
        assert torch.equal(generated(compiled(model, strict=False, **INNER), call, **static), plain)
    with pytest.raises(EarlyTomCompileError, match="its cache is static"):
        generated(compiled(model, **INNER), call, **static)


def test_labels_have_a_place_for_every_position(model):
    call = Call.of(model, LAYOUTS["one"])
    call = call.but(labels=call.ids.clamp_min(0))
    with torch.no_grad():
        plain = compiled(model, retain_ratio=0.1)(**call.forward())
        with pytest.warns(EarlyTomFallbackWarning, match="each of its labels"):
            output = compiled(model, strict=False, **INNER)(**call.forward())
        torch.testing.assert_close(output.loss, plain.loss, **CLOSE_LOGITS)
        with pytest.raises(EarlyTomCompileError, match="each of its labels"):
            compiled(model, **INNER)(**call.forward())


def test_a_layer_that_does_not_exist(model):
    with pytest.raises(EarlyTomConfigError, match=f"the language model has layers 0 to {LAYERS - 1}"):
        compiled(model, inner_layer=LAYERS)
