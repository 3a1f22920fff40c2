"""Fewer tokens inside the language model of a model that is compiled in place: answers equal to the oracle's, rows that
do not notice each other, and decoding that fits the shorter caches."""

import copy
import threading
from itertools import product

import pytest
import torch
import transformers
from effort import cases
from generating import (
    LAYOUTS,
    NEW,
    OPTIONS,
    compiled,
    graphs_compiled,
    new_tokens,
    oracle_tokens,
    share_vision_paths,
)
from oracle import reduced_rows
from oracle_inner import reduced_logits
from tiny_models import tiny_llava_next_video, tiny_llava_onevision, video_inputs
from torch.torch_version import TorchVersion
from without_inductor import leave_pieces_as_they_are

import earlytom_compile
from earlytom_compile import EarlyTomCompileError, EarlyTomConfigError, EarlyTomFallbackWarning, report
from earlytom_compile.integrations.caches import cache_of
from earlytom_compile.methods import Method, registry
from earlytom_compile.methods.base import Step

LAYER = 2
INNER = {"inner_layer": LAYER, "retain_ratio": 0.5}
MEAN, SEQUENTIAL = (Step(LAYER, 0.5, merge) for merge in ("mean", "sequential"))
THREE_STEPS = Method(
    "three steps",
    "None: what methods can ask for, all at once.",
    inside=lambda ratio, layers: (
        Step(1, 0.8, "drop", "all"),
        Step(2, 0.5, "mean"),
        Step(3, ratio, "sequential", "all"),
    ),
)
ALL = {"merge_layers": None, "tau_seg": 0.6, "retain_ratio": 1.0}
"""Options of the oracle for methods that let all tokens into the language model."""


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """To tests in this file alone."""
    monkeypatch.setitem(registry._registered, THREE_STEPS.name, THREE_STEPS)


def tiny(**options):
    return tiny_llava_onevision(vision_layers=4, text_layers=4, **options)


@pytest.fixture(scope="module")
def pristine():
    return tiny()


@pytest.fixture(scope="module")
def inner(one_trace):
    """The same model, compiled once for all tests: most of their time is Dynamo's, in the language model."""
    with pytest.MonkeyPatch.context() as patch:
        share_vision_paths(one_trace, patch)
        yield compiled(tiny(), strict=True, **INNER)


def steps_of(variant):
    return [SEQUENTIAL if variant == "released" else MEAN]


@pytest.mark.parametrize(
    "layout, variant",
    cases(
        ("different numbers of videos", "paper"), ("different numbers of videos", "released"),
        among=list(product(LAYOUTS, ["paper", "released", "plus"])),
    ),
)  # fmt: skip
def test_greedy_tokens_equal_the_oracle(model, inner, layout, variant):
    inputs = video_inputs(model, 12, **LAYOUTS[layout])
    fast = inner if variant == "paper" else compiled(model, variant=variant, strict=True, **INNER)
    got = new_tokens(fast, inputs)
    inside = report(fast).to_dict()["inside"]
    expected = oracle_tokens(model, inputs, variant=variant, retain_ratio=0.5, steps=steps_of(variant))
    assert torch.equal(got, expected)
    assert [step["layer"] for step in inside] == [LAYER]


def test_what_happens_inside_changes_the_answers(model, inner):
    """Else all the others could pass without it."""
    inputs = video_inputs(model, 12, **LAYOUTS["batch of different prompts"])
    with_all = new_tokens(compiled(model, retain_ratio=0.5), inputs)
    assert not torch.equal(with_all, new_tokens(inner, inputs))
    earlytom_compile.restore(model)
    options = {**OPTIONS, "variant": "paper", "retain_ratio": 0.5}
    ways = [
        reduced_rows(model, inputs, steps=[step], **options)[0] for step in (MEAN, SEQUENTIAL, Step(LAYER, 0.5, "drop"))
    ]
    assert all((one - other).abs().max() > 1e-2 for one, other in zip(ways, ways[1:], strict=False))


@pytest.mark.parametrize(
    "layout, lowering",
    cases(
        ("left padding", "staged"),
        among=list(
            product(["two videos in a row", "different numbers of videos", "left padding"], ["eager", "staged"])
        ),
    ),
)
def test_methods_with_several_steps_equal_the_oracle(model, monkeypatch, layout, lowering):
    """In pieces, too, which Inductor would compile."""
    leave_pieces_as_they_are(monkeypatch)
    inputs = video_inputs(model, 6, **LAYOUTS[layout])
    options = {"lowering": lowering, "strict": True, "retain_ratio": 0.3}
    got = new_tokens(earlytom_compile.compile(model, method=THREE_STEPS.name, **options), inputs)
    inside = report(model).to_dict()["inside"]
    assert [step["layer"] for step in inside] == [1, 2, 3]
    if layout != "different numbers of videos":  # of which the row without one stays as long as it was
        assert inside[0]["prompt"] > inside[1]["prompt"] > inside[2]["prompt"]
    steps = THREE_STEPS.inside(0.3, 4)
    assert torch.equal(got, oracle_tokens(model, inputs, **{**ALL, "steps": steps, "merge_layers": (0,), "tau_seg": 2}))


def test_each_row_equals_that_row_alone(inner):
    inputs = video_inputs(inner, 12, **LAYOUTS["different numbers of videos"])
    together = new_tokens(inner, inputs)
    videos = iter(inputs["pixel_values_videos"].split([2, 1]))
    for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
        alone = {"input_ids": ids[None, mask.bool()], "attention_mask": mask[None, mask.bool()]}
        if row != 1:
            alone["pixel_values_videos"] = next(videos)
        assert torch.equal(new_tokens(inner, alone)[0], together[row])


@pytest.mark.parametrize("layout", ["one", "left padding", "different numbers of videos"])
def test_beams_have_the_scores_that_the_oracle_gives_them(model, inner, layout):
    """Log-probabilities of the tokens of each beam, every one computed without a cache."""
    inputs = video_inputs(model, 8, **LAYOUTS[layout])
    choices = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": NEW, "do_sample": False}
    output = inner.generate(
        **inputs, **choices, pad_token_id=0, length_penalty=1.0, return_dict_in_generate=True, output_scores=True
    )
    prompts = _rows(model, inputs)
    for number, sequence in enumerate(output.sequences[:, inputs["input_ids"].shape[1] :]):
        embeddings, video_of = prompts[number // 2]
        behind = model.get_input_embeddings()(sequence[:-1])
        logits = reduced_logits(model, torch.cat([embeddings, behind]), video_of, [MEAN])
        chosen = logits[-len(sequence) :].log_softmax(-1).gather(1, sequence[:, None]).sum()
        torch.testing.assert_close(output.sequences_scores[number], chosen / len(sequence), atol=1e-4, rtol=0)


def _rows(model, inputs):
    """(embeddings, which video each belongs to) of each row as it enters the language model, without padding."""
    from oracle import Options, _compress

    with torch.no_grad():
        _, rows = _compress(model, inputs, Options(**{**OPTIONS, "variant": "paper", "retain_ratio": 0.5}))
    masks = [row.attention_mask.bool() for row in rows]
    return [(row.embeddings[m], row.video_of[m].tolist()) for row, m in zip(rows, masks, strict=True)]


def test_samples_of_one_prompt(inner):
    inputs = video_inputs(inner, 12, **LAYOUTS["different numbers of videos"])
    greedy = new_tokens(inner, inputs)
    samples = new_tokens(inner, inputs, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(samples, greedy.repeat_interleave(2, 0))


@pytest.mark.parametrize("padding", [{"left_padding": (0, 5)}, {"right_padding": (5, 0)}])
def test_logits_of_forward(model, inner, padding):
    inputs = video_inputs(model, 12, videos_per_row=(1, 1), **{"left_padding": 0, **_left(padding)})
    if "right_padding" in padding:
        inputs = _padded_on_the_right(inputs, padding["right_padding"])
    with torch.no_grad():
        logits = inner(**inputs).logits
    expected = reduced_rows(model, inputs, steps=[MEAN], **{**OPTIONS, "retain_ratio": 0.5})
    for row, rows in enumerate(expected):
        places = slice(-len(rows), None) if "left_padding" in padding else slice(0, len(rows))
        torch.testing.assert_close(logits[row, places], rows, atol=1e-4, rtol=1e-4)


def _left(padding):
    return padding if "left_padding" in padding else {}


def _padded_on_the_right(inputs, counts):
    pads = [torch.nn.functional.pad(ids, (0, max(counts))) for ids in inputs["input_ids"]]
    masks = [torch.nn.functional.pad(mask, (0, max(counts))) for mask in inputs["attention_mask"]]
    return {**inputs, "input_ids": torch.stack(pads), "attention_mask": torch.stack(masks)}


def test_a_prompt_that_ends_in_its_video(model, inner):
    inputs = video_inputs(model, 12, after=0)
    got = new_tokens(inner, inputs)
    assert torch.equal(got, oracle_tokens(model, inputs, retain_ratio=0.5, steps=[MEAN]))


@pytest.mark.long  # tests/families/test_support_table.py has each family
@pytest.mark.skipif(TorchVersion(transformers.__version__) < "5.21", reason="LLaVA-NeXT-Video needs transformers 5.21")
def test_llava_next_video():
    model = tiny_llava_next_video(text_layers=3)
    inputs = video_inputs(model, 8, **LAYOUTS["left padding"])
    got = new_tokens(compiled(model, strict=True, merge_layers=(0,), **INNER), inputs)
    options = {"retain_ratio": 0.5, "merge_layers": (0,), "steps": [MEAN]}
    assert torch.equal(got, oracle_tokens(model, inputs, **options))


@pytest.mark.long
def test_nothing_dropped_is_nothing_changed(model):
    inputs = video_inputs(model, 12, **LAYOUTS["left padding"])
    plain = new_tokens(compiled(model, retain_ratio=0.5), inputs)
    assert torch.equal(new_tokens(compiled(model, **INNER, inner_drop_ratio=0.0), inputs), plain)


def test_a_call_without_a_video_runs_the_models_own_code(model):
    inputs = video_inputs(model, 8, videos_per_row=(0, 0), left_padding=(0, 3))
    inputs.pop("pixel_values_videos", None)
    own = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    compiled(model, **INNER)
    again = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    assert torch.equal(own, again) and report(model).to_dict()["inside"] == []


def test_videos_that_were_encoded_before(inner):
    inputs = video_inputs(inner, 12, videos_per_row=(1, 1), before=(2, 5))
    at_once = new_tokens(inner, inputs)
    rows = earlytom_compile.encode_videos(inner, inputs["pixel_values_videos"])
    given = {**inputs, "pixel_values_videos": rows}
    assert torch.equal(new_tokens(inner, given), at_once)


def test_later_layers_have_a_shorter_cache(inner):
    inputs = video_inputs(inner, 12, **LAYOUTS["two videos in a row"])
    output = inner.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    first, later = report(inner).to_dict()["prompt"][1], report(inner).to_dict()["inside"][0]["prompt"]
    lengths = [layer.keys.shape[2] for layer in cache_of(output).layers]
    assert lengths == [first + 2] * LAYER + [later + 2] * (4 - LAYER) and later < first


@pytest.mark.long
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_attentions_that_compile(attention):
    model = tiny(attn_implementation=attention)
    inputs = video_inputs(model, 12, **LAYOUTS["left padding"])
    got = new_tokens(compiled(model, strict=True, **INNER), inputs)
    model.set_attn_implementation("sdpa")
    assert torch.equal(got, oracle_tokens(model, inputs, retain_ratio=0.5, steps=[MEAN]))


def test_one_trace_serves_prompts_of_every_length(inner):
    for frames, after in ((8, 5), (9, 5)):
        new_tokens(inner, video_inputs(inner, frames, after=after))
    before = graphs_compiled()
    for frames, after in ((12, 5), (7, 9), (16, 31)):
        new_tokens(inner, video_inputs(inner, frames, after=after))
    assert graphs_compiled() == before


def test_inductor_gives_the_same_tokens():
    model = tiny_llava_onevision(vision_layers=1, text_layers=2)
    inputs = video_inputs(model, 6)
    options = {**OPTIONS, "merge_layers": (0,), "retain_ratio": 0.5}
    got = new_tokens(compiled(model, lowering="staged", strict=True, inner_layer=1, **options), inputs)
    assert torch.equal(got, oracle_tokens(model, inputs, steps=[Step(1, 0.5, "mean")], **options))


@pytest.mark.long
@pytest.mark.parametrize("lowering", ["staged", "whole"])
def test_inductor_gives_the_same_tokens_of_all_sorts_of_steps(lowering):
    """Each reads what compiled pieces leave."""
    model = tiny_llava_onevision(vision_layers=2, text_layers=4)
    inputs = video_inputs(model, 6, videos_per_row=(1, 1), before=(1, 4))
    options = {"lowering": lowering, "strict": True, "retain_ratio": 0.3}
    got = new_tokens(earlytom_compile.compile(model, method=THREE_STEPS.name, **options), inputs)
    steps = THREE_STEPS.inside(0.3, 4)
    assert torch.equal(got, oracle_tokens(model, inputs, **{**ALL, "steps": steps, "merge_layers": (0,), "tau_seg": 2}))


# --- Where it cannot be done ------------------------------------------------------------------------


def test_a_layer_that_does_not_exist(model):
    with pytest.raises(EarlyTomConfigError, match="inner_layer=4: the language model has layers 0 to 3"):
        compiled(model, inner_layer=4)
    assert "_earlytom" not in model.__dict__


@pytest.mark.parametrize("cure", ["cache_implementation", "no_grad", "hooks"])
def test_what_stands_in_the_way_is_said_and_the_rest_is_compressed(model, cure):
    inputs = video_inputs(model, 8)
    without = new_tokens(compiled(model, retain_ratio=0.5), inputs)
    compiled(model, **INNER)
    hook, more, says = None, {}, "it has hooks.*without hooks"
    if cure == "cache_implementation":
        more, says = {"cache_implementation": "static"}, "its cache is static.*Leave cache_implementation out"
    elif cure == "hooks":
        hook = model.model.language_model.layers[0].register_forward_hook(lambda *_: None)
    if cure == "no_grad":
        with pytest.warns(EarlyTomFallbackWarning, match="gradients are enabled.*inference_mode"):
            model(**inputs)
        return
    with pytest.warns(EarlyTomFallbackWarning, match=f"no tokens go inside the language model: {says}"):
        assert torch.equal(new_tokens(model, inputs, **more), without)
    compiled(model, strict=True, **INNER)
    with pytest.raises(EarlyTomCompileError, match="no tokens go inside the language model"):
        new_tokens(model, inputs, **more)
    if hook is not None:
        hook.remove()


# --- What compile() promises ------------------------------------------------------------------------


def test_restore_undoes_it_exactly(model):
    layers = model.model.language_model.layers
    before = [dict(module.__dict__) for module in (model.model.language_model, *layers)]
    compiled(model, **INNER)
    assert "forward" in layers[LAYER].__dict__ and "forward" not in layers[LAYER - 1].__dict__
    compiled(model, inner_layer=3, retain_ratio=0.5)
    assert "forward" not in layers[LAYER].__dict__
    earlytom_compile.restore(model)
    assert [module.__dict__ for module in (model.model.language_model, *layers)] == before


@pytest.mark.long  # test_compiled_prompt.py copies a model, too
def test_a_copy_goes_its_own_way(inner):
    inputs = video_inputs(inner, 8, **LAYOUTS["left padding"])
    expected = new_tokens(inner, inputs)
    twin = copy.deepcopy(inner)
    with torch.no_grad():
        twin.model.language_model.norm.weight.mul_(torch.linspace(-1, 1, 48))
    other = new_tokens(twin, inputs)
    assert torch.equal(new_tokens(inner, inputs), expected) and not torch.equal(other, expected)
    earlytom_compile.restore(twin)
    assert torch.equal(other, oracle_tokens(twin, inputs, retain_ratio=0.5, steps=[MEAN]))


@pytest.mark.long
@pytest.mark.parametrize("fresh", [True, False])
def test_a_layer_that_is_replaced_gets_the_mask_that_fits(fresh):
    model = tiny()
    inputs = video_inputs(model, 8, **LAYOUTS["different numbers of videos"])
    before = new_tokens(compiled(model, strict=True, **INNER), inputs)
    layers = model.model.language_model.layers
    other = tiny(seed=1).model.language_model.layers[3]
    layers[3] = other if fresh else copy.deepcopy(layers[3])
    got = new_tokens(model, inputs)
    assert torch.equal(got, before) != fresh
    earlytom_compile.restore(model)
    assert all("forward" not in layer.__dict__ for layer in layers)
    assert torch.equal(got, oracle_tokens(model, inputs, retain_ratio=0.5, steps=[MEAN]))


def test_threads_do_not_meet(inner):
    inputs = [video_inputs(inner, frames, **LAYOUTS["left padding"], seed=frames) for frames in (6, 9, 12)]
    expected = [new_tokens(inner, each) for each in inputs]
    got = [None] * len(inputs)

    def answer(number):
        got[number] = new_tokens(inner, inputs[number])

    threads = [threading.Thread(target=answer, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(mine, alone) for mine, alone in zip(got, expected, strict=True))
