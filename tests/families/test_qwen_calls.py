"""A Qwen model compiled in place, and all that can be asked of it besides ``generate()``."""

from contextlib import ExitStack
from functools import cache

import pytest
import torch
from generating import given, graphs_compiled, new_tokens, share_vision_paths
from oracle_qwen import compressed_rows, compressed_videos
from qwen_calls import SMALL, WIDE, compressing, oracle_options, oracle_tokens, prompt_of, supported
from tiny_qwen import KINDS, PLAIN_KINDS, Clip, qwen_inputs, tiny_qwen
from torch.testing import assert_close

import earlytom_compile
from earlytom_compile import EarlyTomCompileError, EarlyTomConfigError, EarlyTomFallbackWarning, report, reporting
from earlytom_compile.families.registry import family_of
from earlytom_compile.integrations.caches import cache_of

LAYERS = {"merge_layers": (0, 1)}


@cache
def small(kind, use="compressed"):
    """Of three vision layers; another with the same weights for each use."""
    return tiny_qwen(kind, vision_layers=3, full=(0, 2), deepstack=(0, 1))


@pytest.fixture(scope="module", params=supported(PLAIN_KINDS, long=("qwen3_5",)))
def kind(request):
    yield request.param
    earlytom_compile.restore(small(request.param))
    reporting._RESTORED.clear()


@pytest.fixture
def model(kind, one_trace, monkeypatch):
    """Compiled once for all tests, unless one does so with other options."""
    share_vision_paths(one_trace, monkeypatch)
    return compressing(small(kind), **LAYERS)


@pytest.fixture
def unshared(kind):
    """The same weights once more, not compiled yet, which trace for themselves."""
    yield small(kind, "unshared")
    earlytom_compile.restore(small(kind, "unshared"))


@pytest.fixture
def twin(kind):
    """What is never compiled."""
    return small(kind, "twin")


@pytest.mark.parametrize("each", supported(KINDS))
def test_their_families(each):
    model = small(each, "family")
    family = family_of(model)
    assert family.name == {"qwen2": "Qwen2.5-VL", "qwen3": "Qwen3-VL"}[each[:5]] if "vl" in each else "Qwen3.5"
    assert family.vision_tower(model) is model.model.visual
    assert family.language_model(model) is model.model.language_model
    assert family.encoder_layers(model.config) == 3
    with pytest.raises(EarlyTomConfigError, match="layer 3 does not exist; the vision encoder has layers 0 to 2"):
        earlytom_compile.compile(model, merge_layers=(0, 3))


# --- What is compiled -----------------------------------------------------------------------------


def test_one_compilation_for_all_videos_of_one_resolution(unshared):
    model = compressing(unshared, **LAYERS)
    for seed, (frames, scenes) in enumerate([(9, 2), (9, 1), (4, 1), (12, 3), (1, 1), (5, 2)]):
        new_tokens(model, qwen_inputs(model, [[seed + 1, Clip(frames, *SMALL, scenes=scenes), 3]], seed=seed))
        assert graphs_compiled() <= 2, f"{frames} frames"
    before = graphs_compiled()
    new_tokens(model, qwen_inputs(model, [[2, Clip(9, *WIDE), 1, Clip(6, *SMALL), 3]]))
    assert graphs_compiled() <= before + 2
    before = graphs_compiled()
    new_tokens(model, qwen_inputs(model, [[2, Clip(7, *WIDE), 1, Clip(5, *SMALL), 3], [9, Clip(3, *WIDE), 1]], seed=5))
    assert graphs_compiled() == before
    content = report(model).to_dict()
    assert content["last_call"] == "compressed" and len(content["videos"]) == 3


@pytest.mark.long
@pytest.mark.parametrize("lowering", ["staged", "whole"])
def test_lowered(unshared, twin, lowering):
    model = compressing(unshared, lowering=lowering, **LAYERS)
    inputs = qwen_inputs(model, [[3, Clip(9, *SMALL), 4]])
    got = new_tokens(model, inputs)
    assert torch.equal(got, oracle_tokens(twin, inputs, **LAYERS))


# --- forward() ------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_loop_of_forward_with_a_cache(model, twin):
    """Behind a prompt a token has the position that the plain model would give it there."""
    inputs = qwen_inputs(model, [[3, Clip(9, *SMALL, interval=0.25), 20]])
    expected = oracle_tokens(twin, inputs, **LAYERS)[0].tolist()
    output, tokens = model(**inputs, use_cache=True), []
    for _ in expected:
        tokens.append(int(output.logits[0, -1].argmax()))
        output = model(torch.tensor([[tokens[-1]]]), **given(model, cache_of(output)))
    assert tokens == expected


@torch.no_grad()
@pytest.mark.parametrize("interval", [0.25, 2.0])
def test_positions_behind_the_prompt_are_those_of_the_plain_model(model, twin, interval):
    """With 2 seconds a frame the last frame's time is far behind the text that follows."""
    inputs, seen = qwen_inputs(model, [[3, Clip(9, *SMALL, interval=interval), 5]]), []

    def look(module, args, kwargs):
        seen[-1].append(kwargs["position_ids"][-3:, 0, -1].tolist())

    for each in (twin, compressing(model, variant="plus", retain_ratio=0.02, **LAYERS)):
        seen.append([])
        hook = each.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
        output = each(**inputs, use_cache=True)
        for token in (5, 6):
            output = each(torch.tensor([[token]]), **given(each, cache_of(output)))
        hook.remove()
    assert seen[0] == seen[1] and len(seen[0]) == 3


@torch.no_grad()
def test_logits_of_the_last_position_only(model):
    inputs = prompt_of(model, "two sizes")
    every = model(**inputs).logits
    last = model(**inputs, logits_to_keep=1).logits
    assert last.shape[1] == 1
    assert_close(last, every[:, -1:])


def test_without_a_mask(model, twin):
    inputs = prompt_of(model, "two sizes")
    ((_, expected),) = compressed_rows(twin, inputs, **oracle_options(**LAYERS))
    del inputs["attention_mask"]
    with torch.no_grad():
        logits = model(**inputs).logits
    assert_close(logits[0], expected, atol=1e-4, rtol=1e-4)


def test_with_gradients_it_runs_uncompressed(model):
    inputs = prompt_of(model, "one video")
    with pytest.warns(EarlyTomFallbackWarning, match="gradients are enabled"):
        model(**inputs).logits.sum().backward()
    model.zero_grad(set_to_none=True)


# --- Videos that are encoded once -----------------------------------------------------------------


def encoded(model, inputs):
    return earlytom_compile.encode_videos(model, inputs["pixel_values_videos"], video_grid_thw=inputs["video_grid_thw"])


def test_encoded_videos_are_the_oracles(model, twin):
    inputs = prompt_of(model, "two sizes")
    expected = compressed_videos(twin, inputs, **oracle_options(**LAYERS))
    rows = encoded(model, inputs)
    assert report(model).to_dict()["last_call"] == "encoded"
    for got, video in zip(rows, expected, strict=True):
        assert_close(got, torch.cat([video.features, *video.deepstack], dim=1), atol=1e-4, rtol=1e-4)


def test_encoded_videos_answer_as_their_pixels_do(model):
    inputs = prompt_of(model, "everything")
    expected = new_tokens(model, inputs)
    with torch.no_grad():
        logits = model(**inputs).logits
        given_rows = {**inputs, "pixel_values_videos": encoded(model, inputs)}
        assert torch.equal(model(**given_rows).logits, logits)
    assert torch.equal(new_tokens(model, given_rows), expected)


def test_many_questions_about_one_video_in_one_batch(model, twin):
    clip = Clip(9, *SMALL)
    inputs, questions = (qwen_inputs(model, rows) for rows in ([[3, clip, 4]], [[3, clip, 4], [6, clip, 9]]))
    rows = encoded(model, inputs)
    got = new_tokens(model, {**questions, "pixel_values_videos": rows * 2})
    questions["pixel_values_videos"] = inputs["pixel_values_videos"].repeat(2, 1)
    assert torch.equal(got, oracle_tokens(twin, questions, **LAYERS))


def test_encoded_videos_that_cannot_be_placed(model):
    inputs = prompt_of(model, "one video")
    rows = encoded(model, inputs)

    def ask(videos, **changed):
        call = {**inputs, "pixel_values_videos": videos, **changed}
        model.generate(**{name: value for name, value in call.items() if value is not None}, max_new_tokens=1)

    with pytest.raises(EarlyTomConfigError, match="is not one that .*encode_videos.* returned"):
        ask([rows[0].clone()])
    with pytest.raises(EarlyTomConfigError, match="54 video placeholder tokens.*2 videos need 108"):
        ask(rows * 2)
    with pytest.raises(EarlyTomConfigError, match="encoded videos cannot be used: video_grid_thw is missing"):
        ask(rows, video_grid_thw=None)
    with pytest.raises(EarlyTomConfigError, match="encoded videos cannot be used: mm_token_type_ids are missing"):
        ask(rows, mm_token_type_ids=None)
    with pytest.raises(EarlyTomConfigError, match=r"must be \[rows, "):
        ask([rows[0][:, :3]])


# --- Restored -------------------------------------------------------------------------------------


def test_restore_undoes_it_exactly(unshared):
    model, inputs = unshared, prompt_of(unshared, "one video")
    with torch.no_grad():
        logits = model(**inputs).logits
        before, buffers = dict(model.__dict__), dict(model.model.__dict__)
        compressing(model, **LAYERS)(**inputs)
        new_tokens(model, inputs)
        assert earlytom_compile.restore(model) is model
        assert model.__dict__ == before
        assert {k: v for k, v in model.model.__dict__.items() if k != "rope_deltas"} == {
            k: v for k, v in buffers.items() if k != "rope_deltas"
        }
        assert torch.equal(model(**inputs).logits, logits)


# --- What does not fit ----------------------------------------------------------------------------


def _fewer_pixels(inputs):
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"][:-24]


def _odd_grid(inputs):
    inputs["video_grid_thw"] = torch.tensor([[9, 3, 8]])


def _another_video_in_the_prompt(inputs):
    token = inputs["input_ids"].max()
    inputs["input_ids"][0, 0], inputs["mm_token_type_ids"][0, 0] = token, 2


def _no_grid(inputs):
    del inputs["video_grid_thw"]


@pytest.mark.parametrize("call", ["generate", "forward"])
@pytest.mark.parametrize(
    "spoil, message",
    [
        (_fewer_pixels, r"\(192, 96\) and video_grid_thw is \[\[9, 4, 6\]\]"),
        (_odd_grid, r"\[\[9, 3, 8\]\].*rows and columns multiples of 2"),
        (_another_video_in_the_prompt, "55 video placeholder tokens.*need 54"),
        (_no_grid, "video_grid_thw"),
    ],
)
def test_what_does_not_fit_is_named(model, call, spoil, message):
    inputs = prompt_of(model, "one video")
    spoil(inputs)
    with torch.no_grad(), pytest.raises(EarlyTomConfigError, match=message):
        getattr(model, call)(**inputs)


@pytest.mark.parametrize("call", ["generate", "forward"])
def test_without_the_kinds_of_tokens_it_runs_uncompressed(model, twin, call):
    """Qwen2.5-VL then counts positions as if all were text; the others refuse in forward()."""
    inputs = prompt_of(model, "one video")
    del inputs["mm_token_type_ids"]
    results = []
    for each in (twin, model):
        with torch.no_grad(), ExitStack() as stack:
            if each is model:
                stack.enter_context(pytest.warns(EarlyTomFallbackWarning, match="mm_token_type_ids are missing"))
            try:
                given = {"max_new_tokens": 3, "do_sample": False} if call == "generate" else {}
                output = getattr(each, call)(**inputs, **given)
                results.append(getattr(output, "logits", output).tolist())
            except ValueError as error:
                results.append(str(error))
    assert results[0] == results[1]
    with torch.no_grad(), pytest.raises(EarlyTomCompileError, match="mm_token_type_ids are missing.*processor"):
        getattr(compressing(model, strict=True, **LAYERS), call)(**inputs)


@pytest.mark.parametrize("variant", ["plus", pytest.param("paper", marks=pytest.mark.long)])
def test_reuse_of_patches_is_refused_with_its_cure(kind, twin, variant):
    """Places of these towers are no raster of patches."""
    model, inputs = small(kind), prompt_of(twin, "one video")
    reusing = {"merge_layers": None, "reuse": True, "variant": variant}
    with pytest.warns(EarlyTomFallbackWarning, match="not known|unknown which of them did not change.*reuse=False"):
        got = new_tokens(compressing(model, **reusing), inputs)
    assert torch.equal(got, new_tokens(twin, inputs))
    with pytest.raises(EarlyTomCompileError, match="reuse=False"):
        new_tokens(compressing(model, strict=True, **reusing), inputs)


def test_the_report_says_frames_and_tokens(model):
    inputs = prompt_of(model, "two sizes")
    new_tokens(model, inputs)
    content = report(model).to_dict()
    assert content["state"] == "compressing" and content["merge_layers"] == [0, 1]
    assert [video["tokens"] for video in content["videos"]] == [[54, 11], [75, 15]]
    assert [video["frames"][0] for video in content["videos"]] == [9, 5]
    whole, cut = content["prompt"]
    assert whole == inputs["input_ids"].shape[1] and cut == whole - (54 - 11) - (75 - 15)
    text = str(report(model))
    assert "54 -> 11" in text and "75 -> 15" in text
