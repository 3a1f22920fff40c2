"""``earlytom_compile.compile(model)``: the three promises, and greedy tokens equal to the oracle's."""

import copy
import inspect
from itertools import product

import pytest
import torch
from effort import cases
from generating import (
    LAYOUTS,
    NEW,
    OPTIONS,
    compiled,
    given,
    new_tokens,
    oracle_tokens,
)
from oracle import compressed_forward
from tiny_models import tiny_llava_onevision, tokens_per_frame, video_inputs
from transformers import (
    LlavaOnevisionForConditionalGeneration,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from without_inductor import leave_pieces_as_they_are

import earlytom_compile
from earlytom_compile import (
    EarlyTomCompileError,
    EarlyTomConfigError,
    EarlyTomFallbackWarning,
    report,
)
from earlytom_compile.integrations.caches import cache_name, cache_of

NEW_NAME = cache_name(LlavaOnevisionForConditionalGeneration.forward) == "cache"
takes_features = pytest.mark.skipif(
    "mm_encoder_outputs" not in inspect.signature(LlavaOnevisionForConditionalGeneration.forward).parameters,
    reason="this transformers takes no features in place of pixels",
)


def test_only_models_can_be_restored():
    with pytest.raises(EarlyTomConfigError, match="got a int"):
        earlytom_compile.restore(3)


@pytest.mark.parametrize(
    "layout, variant",
    cases(
        ("one", "plus"), ("batch of different prompts", "released"), ("two videos in a row", "paper"),
        ("different numbers of videos", "paper"), ("different numbers of videos", "released"),
        ("different numbers of videos", "plus"), ("left padding", "plus"), ("images beside videos", "paper"),
        among=list(product(LAYOUTS, ["paper", "released", "plus"])),
    ),
)  # fmt: skip
def test_greedy_tokens_equal_the_oracle(model, layout, variant):
    inputs = video_inputs(model, 12, **LAYOUTS[layout])
    got = new_tokens(compiled(model, variant=variant), inputs)
    assert torch.equal(got, oracle_tokens(model, inputs, variant=variant))


@pytest.mark.long  # test_backend.py has pieces of the whole model, test_compiled_prompt.py those of a prompt
@pytest.mark.parametrize("variant, lowering", [("paper", "whole"), ("paper", "staged"), ("plus", "staged")])
def test_inductor_gives_the_same_tokens(variant, lowering):
    model = tiny_llava_onevision(vision_layers=2, text_layers=1)
    options = {"variant": variant, "merge_layers": (0,)}
    inputs = video_inputs(model, 12, videos_per_row=(1, 1), before=(1, 4))
    got = new_tokens(compiled(model, lowering=lowering, **options), inputs)
    assert torch.equal(got, oracle_tokens(model, inputs, **options))


def test_each_row_equals_that_row_alone(model):
    inputs = video_inputs(model, 12, videos_per_row=(1, 2, 1), before=(1, 6, 3))
    together = new_tokens(compiled(model), inputs)
    first_video = 0
    for row, videos in enumerate((1, 2, 1)):
        real = inputs["attention_mask"][row].bool()
        alone = {
            "input_ids": inputs["input_ids"][row : row + 1, real],
            "attention_mask": inputs["attention_mask"][row : row + 1, real],
            "pixel_values_videos": inputs["pixel_values_videos"][first_video : first_video + videos],
        }
        first_video += videos
        assert torch.equal(new_tokens(model, alone)[0], together[row])


def test_prompts_of_other_lengths_do_not_recompile(unshared):
    compiled(unshared)
    for seed, after in enumerate((4, 9, 30, 2)):
        new_tokens(unshared, video_inputs(unshared, 12, after=after, seed=seed))
        new_tokens(unshared, video_inputs(unshared, 12, videos_per_row=(1, 1), after=after, seed=seed))
    content = report(unshared).to_dict()
    assert (content["graphs"], content["recompiles"]) == (1, 0)
    new_tokens(unshared, video_inputs(unshared, 8))
    assert report(unshared).to_dict()["graphs"] == 1, "nor do videos"


@torch.no_grad()
def test_many_frame_counts_stay_compressed(unshared):
    """More lengths than Dynamo's recompile limit, among them the one that has a compiled function of its own."""
    inputs = {frames: video_inputs(unshared, frames, scenes=1) for frames in (1, 4, 7)}
    expected = {frames: compressed_forward(unshared, x, **OPTIONS) for frames, x in inputs.items()}
    compiled(unshared)
    with torch._dynamo.config.patch(recompile_limit=2):
        for frames, x in inputs.items():
            torch.testing.assert_close(unshared(**x).logits, expected[frames].logits, atol=1e-4, rtol=1e-4)
            (video,) = report(unshared).to_dict()["videos"]
            assert video["tokens"][1] == max(1, round(0.2 * frames * tokens_per_frame(unshared)))


def test_beams(model):
    inputs = video_inputs(model, 12, videos_per_row=(1, 1), before=(2, 5))
    compiled(model)
    both = new_tokens(model, inputs, num_beams=3, num_return_sequences=2)
    assert len(both) == 4
    for row in range(2):
        real = inputs["attention_mask"][row].bool()
        alone = {
            "input_ids": inputs["input_ids"][row : row + 1, real],
            "attention_mask": inputs["attention_mask"][row : row + 1, real],
            "pixel_values_videos": inputs["pixel_values_videos"][row : row + 1],
        }
        assert torch.equal(new_tokens(model, alone, num_beams=3, num_return_sequences=2), both[2 * row : 2 * row + 2])


def test_num_return_sequences_when_sampling(model):
    inputs = video_inputs(model, 12)
    torch.manual_seed(0)
    got = new_tokens(compiled(model), inputs, do_sample=True, num_return_sequences=3, temperature=2.0)
    assert got.shape == (3, NEW) and len({tuple(row.tolist()) for row in got}) > 1


def test_streamer_sees_the_callers_prompt_and_every_token(model):
    class Collect(BaseStreamer):
        def __init__(self):
            self.seen, self.ended = [], False

        def put(self, value):
            self.seen.append(value.flatten())

        def end(self):
            self.ended = True

    inputs, streamer = video_inputs(model, 12), Collect()
    got = new_tokens(compiled(model), inputs, streamer=streamer)
    assert streamer.ended
    assert torch.equal(streamer.seen[0], inputs["input_ids"][0])
    assert torch.equal(torch.cat(streamer.seen[1:]), got[0])


def test_dict_output_and_input_as_first_argument(model):
    inputs = video_inputs(model, 12)
    compiled(model)
    ids = inputs.pop("input_ids")
    output = model.generate(
        ids, **inputs, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    assert torch.equal(output.sequences[:, : ids.shape[1]], ids) and len(output.scores) == NEW


@pytest.mark.parametrize("give", ["argument", "config", "model"])
def test_max_length_counts_the_callers_prompt(model, give):
    inputs = video_inputs(model, 12)
    limit = inputs["input_ids"].shape[1] + 4
    config = copy.deepcopy(model.generation_config)
    config.max_length, config.do_sample, config.pad_token_id = limit, False, 0
    kwargs = {"argument": {"max_length": limit, "do_sample": False}, "config": {"generation_config": config}}
    own, model.generation_config = model.generation_config, config if give == "model" else model.generation_config
    try:
        assert compiled(model).generate(**inputs, **kwargs.get(give, {})).shape[1] == limit
    finally:
        model.generation_config = own


def test_stopping_criteria_and_logits_processors_see_the_callers_prompt(model):
    inputs = video_inputs(model, 12, videos_per_row=(1, 1), before=(1, 4))
    length, seen = inputs["input_ids"].shape[1], []

    def stop_after_two(ids, scores, **kwargs):
        return torch.full((len(ids),), ids.shape[1] >= length + 2)

    def look(ids, scores):
        seen.append(ids[:, :length])
        return scores

    def only(row, ids):
        assert torch.equal(ids[:length], inputs["input_ids"][row])
        return [7]

    got = new_tokens(
        compiled(model),
        inputs,
        stopping_criteria=StoppingCriteriaList([stop_after_two]),
        logits_processor=LogitsProcessorList([look]),
        prefix_allowed_tokens_fn=only,
    )
    assert got.tolist() == [[7, 7], [7, 7]]
    assert all(torch.equal(ids, inputs["input_ids"]) for ids in seen)


def test_the_next_turn_cannot_continue_a_cut_cache(model):
    inputs = video_inputs(model, 12)
    output = compiled(model).generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    with pytest.raises(EarlyTomConfigError, match="Start the next turn without a cache"):
        model.generate(input_ids=output.sequences, max_new_tokens=2, **given(model, cache_of(output)))


def test_a_filled_cache_runs_uncompressed(model):
    inputs = video_inputs(model, 12)
    with torch.no_grad():
        cache = cache_of(model(inputs["input_ids"][:, :2], use_cache=True))
    with pytest.warns(EarlyTomFallbackWarning, match="already filled"):
        compiled(model).generate(**inputs, max_new_tokens=1, **given(model, cache))


@pytest.mark.filterwarnings("error::FutureWarning")
def test_names_that_transformers_deprecates_are_not_used(model, monkeypatch):
    leave_pieces_as_they_are(monkeypatch)
    inputs = video_inputs(model, 12)
    first = compiled(model, lowering="staged").generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    assert cache_of(first).get_seq_length() < inputs["input_ids"].shape[1]
    with torch.no_grad():
        model(**inputs)


@pytest.mark.skipif(not NEW_NAME, reason="transformers before 5.24 has one name only")
def test_a_cache_by_its_old_name_is_seen(model):
    inputs = video_inputs(model, 12)
    output = compiled(model).generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    with pytest.raises(EarlyTomConfigError, match="Start the next turn without a cache"):
        model.generate(input_ids=output.sequences, past_key_values=cache_of(output), max_new_tokens=2)


# --- Features that the caller encoded before the call ---------------------------------------------


def video_features(model, inputs):
    videos = inputs.pop("pixel_values_videos")
    with torch.no_grad():
        return {"video": model.model.get_video_features(videos, return_dict=True)}


@takes_features
@pytest.mark.parametrize("call", ["generate", "forward", "forward in another compile"])
def test_features_of_a_video_run_uncompressed_and_say_so(model, call):
    inputs = video_inputs(model, 12)
    inputs["mm_encoder_outputs"] = video_features(model, inputs)

    def run():
        if call == "generate":
            return model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        torch._dynamo.reset()
        with torch.no_grad():
            return (model if call == "forward" else torch.compile(model, backend="eager"))(**inputs).logits

    expected = run()
    compiled(model)
    with pytest.warns(EarlyTomFallbackWarning, match="given as features"):
        torch.testing.assert_close(run(), expected)
    assert "given as features" in report(model).to_dict()["reasons"][0]
    compiled(model, strict=True)
    with pytest.raises(EarlyTomCompileError, match="Pass pixel_values_videos"):
        run()


@takes_features
def test_features_of_an_image_beside_a_video(model):
    inputs = video_inputs(model, 12, videos_per_row=(1, 1), images_per_row=(1, 0))
    expected = new_tokens(compiled(model), inputs)
    names = ("pixel_values", "image_sizes")
    with torch.no_grad():
        image = model.model.get_image_features(**{name: inputs.pop(name) for name in names}, return_dict=True)
    assert torch.equal(new_tokens(model, inputs, mm_encoder_outputs={"image": image}), expected)


@takes_features
@pytest.mark.parametrize("call", ["generate", "forward"])
def test_pixels_and_features_of_one_video_are_refused_by_the_model(model, call):
    inputs = video_inputs(model, 12)
    inputs["mm_encoder_outputs"] = video_features(model, dict(inputs))
    with pytest.raises(ValueError, match="You cannot"):
        getattr(compiled(model), call)(**inputs)


@takes_features
def test_an_uncompressed_generate_gives_one_reason(model):
    """It encodes the video by itself and hands the features to forward()."""
    inputs = video_inputs(model, 12)
    inputs["input_ids"][0, [0, 30]] = inputs["input_ids"][0, [30, 0]]
    with pytest.warns(EarlyTomFallbackWarning) as warned:
        new_tokens(compiled(model), inputs)
    assert len(warned) == 1 and len(report(model).to_dict()["reasons"]) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values_videos": lambda x: x[0]}, r"must be \[videos, frames, channels, height, width\]"),
        ({"input_ids": lambda x: x[0]}, r"must be \[rows, prompt length\]"),
        ({"attention_mask": lambda x: x[:, 1:]}, "attention_mask has shape"),
    ],
)
def test_inputs_of_the_wrong_shape(model, change, message):
    inputs = video_inputs(model, 12)
    for name, spoil in change.items():
        inputs[name] = spoil(inputs[name])
    with pytest.raises(EarlyTomConfigError, match=message):
        compiled(model).generate(**inputs, max_new_tokens=1)


def test_without_attention_mask(model):
    inputs = video_inputs(model, 12, videos_per_row=(1, 2))
    alone = video_inputs(model, 12)
    del alone["attention_mask"]
    compiled(model)
    new_tokens(model, alone)
    assert new_tokens(model, inputs).shape == (2, NEW)


# --- The other two promises -----------------------------------------------------------------------


def test_restore_undoes_it_exactly(model):
    inputs, before = video_inputs(model, 12), dict(model.__dict__)
    with torch.no_grad():
        logits = model(**inputs).logits
    compiled(model)
    new_tokens(model, inputs)
    assert earlytom_compile.restore(model) is model
    assert model.__dict__ == before
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)
    assert earlytom_compile.restore(model) is model


def test_restore_keeps_methods_that_were_already_replaced(model):
    def forward(*args, **kwargs):
        return type(model).forward(model, *args, **kwargs)

    model.forward = forward
    try:
        compiled(model)
        earlytom_compile.restore(model)
        assert model.__dict__["forward"] is forward
    finally:
        del model.forward


@pytest.mark.parametrize("layout", [{"videos_per_row": (0,)}, {"videos_per_row": (0,), "images_per_row": (1,)}])
def test_calls_without_a_video_are_bit_for_bit_as_before(model, layout):
    inputs = video_inputs(model, 12, **layout)
    with torch.no_grad():
        logits = model(**inputs).logits
    tokens = new_tokens(model, inputs)
    compiled(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(new_tokens(model, inputs), tokens)
    assert report(model).to_dict()["graphs"] == 0


def test_forward_in_place_equals_the_oracle(model):
    inputs = video_inputs(model, 12, videos_per_row=(1, 2), before=(2, 4))
    with torch.no_grad():
        logits = compiled(model)(**inputs).logits
        earlytom_compile.restore(model)
        expected = compressed_forward(model, inputs, **OPTIONS)
    mask = expected.cut_attention_mask.bool()
    torch.testing.assert_close(logits[mask], expected.logits[mask], atol=1e-4, rtol=1e-4)


def test_position_ids_given_close_the_gap_in_place(model):
    inputs = video_inputs(model, 12, videos_per_row=(1, 2), before=(2, 4))
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = compressed_forward(model, {**inputs, "position_ids": positions}, **OPTIONS)
        logits = compiled(model)(**inputs, position_ids=positions).logits
    mask = expected.cut_attention_mask.bool()
    torch.testing.assert_close(logits[mask], expected.logits[mask], atol=1e-4, rtol=1e-4)


def test_compiling_again_replaces_the_options(model):
    inputs = video_inputs(model, 12)
    compiled(model, retain_ratio=0.5)
    new_tokens(model, inputs)
    compiled(model, retain_ratio=0.1)
    new_tokens(model, inputs)
    (video,) = report(model).to_dict()["videos"]
    assert video["tokens"][1] == round(0.1 * 12 * tokens_per_frame(model))


@pytest.mark.long  # test_compiled_prompt.py copies a model whose prompt is compiled, too
def test_a_copy_is_compiled_on_its_own(unshared):
    inputs = video_inputs(unshared, 12)
    original = new_tokens(compiled(unshared), inputs)
    other = copy.deepcopy(unshared)
    with torch.no_grad():
        other.lm_head.weight.mul_(-1)
    assert not torch.equal(new_tokens(other, inputs), original)
    assert torch.equal(new_tokens(unshared, inputs), original)
    earlytom_compile.restore(other)


def test_state_dict_is_untouched(model):
    keys = list(model.state_dict())
    assert list(compiled(model).state_dict()) == keys


# --- Errors and fallbacks -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retian_ratio": 0.1}, "did you mean 'retain_ratio'"),
        ({"retain_ratio": 0.0}, r"\(0, 1\]"),
        ({"merge_layers": (0, 2)}, 'with variant="plus", the default, which reuses patches'),
        ({"variant": "paper", "merge_layers": (2, 4)}, "layer 4 does not exist; the vision encoder has layers 0 to 3"),
    ],
)
def test_bad_options_raise_at_compile_time_and_change_nothing(model, options, message):
    before = dict(model.__dict__)
    with pytest.raises(EarlyTomConfigError, match=message):
        earlytom_compile.compile(model, **options)
    assert model.__dict__ == before


def test_model_of_another_kind():
    with pytest.raises(EarlyTomConfigError, match="got Linear"):
        earlytom_compile.compile(torch.nn.Linear(2, 2))


def test_placeholders_that_do_not_match(model):
    inputs = video_inputs(model, 12)
    inputs["input_ids"][0, 0] = model.config.video_token_id
    need = 12 * tokens_per_frame(model) + 1
    with pytest.raises(EarlyTomConfigError, match=f"has {need + 1} video placeholder tokens.*need {need}"):
        compiled(model).generate(**inputs, max_new_tokens=1)


def test_text_inside_a_video_runs_uncompressed(model):
    inputs = video_inputs(model, 12)
    inputs["input_ids"][0, [0, 30]] = inputs["input_ids"][0, [30, 0]]
    expected = new_tokens(model, inputs)
    with pytest.warns(EarlyTomFallbackWarning, match="not next to each other"):
        assert torch.equal(new_tokens(compiled(model), inputs), expected)
    content = report(model).to_dict()
    assert content["videos"] == [] and content["prompt"] is None
    assert "not next to each other" in content["reasons"][0]


def test_grad_mode_forward_runs_uncompressed(model):
    inputs = video_inputs(model, 12)
    with pytest.warns(EarlyTomFallbackWarning, match="gradients are enabled"):
        compiled(model)(**inputs).logits.sum().backward()
    model.zero_grad(set_to_none=True)


def test_strict(model):
    inputs = video_inputs(model, 12)
    inputs["input_ids"][0, [0, 30]] = inputs["input_ids"][0, [30, 0]]
    with pytest.raises(EarlyTomCompileError, match="not next to each other"):
        compiled(model, strict=True).generate(**inputs, max_new_tokens=1)
