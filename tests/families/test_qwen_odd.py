"""Calls of Qwen models that are seldom made: pictures of hardly any patches, threads that meet, tensors of before."""

import threading

import pytest
import torch
from generating import new_tokens, share_vision_paths
from oracle_qwen import compressed_rows
from qwen_calls import SMALL, assert_as_the_oracle, compressing, oracle_options, oracle_tokens, supported
from tiny_qwen import PLAIN_KINDS, VIDEO, Clip, Still, qwen_inputs, row_alone, tiny_qwen
from torch.testing import assert_close

import earlytom_compile
from earlytom_compile import report
from earlytom_compile.integrations.vision_path import VisionPath

LAYERS = {"merge_layers": (0, 1)}


def small(kind, **options):
    return tiny_qwen(kind, vision_layers=3, full=(0, 2), deepstack=(0, 1), **options)


@pytest.fixture(params=supported(PLAIN_KINDS, long=("qwen3_5",)))
def kind(request, one_trace, monkeypatch):
    share_vision_paths(one_trace, monkeypatch)
    return request.param


@torch.no_grad()
@pytest.mark.parametrize(
    "rows",
    [
        [[Clip(5, 2, 10), 1, Clip(5, 14, 2)], [1, Still(2, 4), Clip(1, 2, 2), 4]],
        pytest.param([[Clip(2, 2, 6), 1, Clip(6, 2, 2)]], marks=pytest.mark.long),
    ],
)
def test_pictures_of_few_patches_at_both_ends_of_a_prompt(kind, rows):
    model = compressing(small(kind), **LAYERS)
    assert_as_the_oracle(model, small(kind), qwen_inputs(model, rows), **LAYERS)
    assert report(model).to_dict()["last_call"] == "compressed"


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)])
def test_half_precision_with_pixels_as_the_processor_gives_them(kind, dtype):
    """float32: the model casts them."""
    model, twin = small(kind, dtype=dtype), small(kind, dtype=dtype)
    compressing(model, merge_layers=(), retain_ratio=1.0)
    inputs = qwen_inputs(model, [[2, Clip(5, *SMALL), 3, Still(4, 4)]])
    inputs = {name: value.float() if "pixel" in name else value for name, value in inputs.items()}
    assert torch.equal(model(**inputs).logits, twin(**inputs).logits)
    assert report(model).to_dict()["last_call"] == "compressed"


@torch.no_grad()
def test_positions_of_ones_own(kind):
    """Of three axes or of four, for each row or for all."""
    model = compressing(small(kind), **LAYERS)
    one = qwen_inputs(model, [[3, Clip(5, *SMALL), 4]])
    del one["attention_mask"]
    inputs = {name: torch.cat([value, value]) for name, value in one.items()}
    told = {name: value for name, value in one.items() if "pixel" not in name}
    positions, _ = model.model.get_rope_index(**told)
    counted = torch.cat([torch.arange(positions.shape[-1]).expand(1, 1, -1), positions])
    logits, tokens = model(**inputs).logits, new_tokens(model, inputs)
    del inputs["mm_token_type_ids"]
    for given in (positions, counted, positions.expand(-1, 2, -1), counted.expand(-1, 2, -1)):
        assert torch.equal(model(**inputs, position_ids=given).logits, logits)
        if given.shape[1] == 2:
            assert torch.equal(new_tokens(model, {**inputs, "position_ids": given}), tokens)
    assert report(model).to_dict()["last_call"] == "compressed"


@torch.no_grad()
def test_encoded_videos_outlive_the_options(kind):
    model = compressing(small(kind), **LAYERS)
    inputs = qwen_inputs(model, [[3, Clip(6, *SMALL), 4]])
    expected = model(**inputs).logits
    rows = earlytom_compile.encode_videos(model, inputs["pixel_values_videos"], video_grid_thw=inputs["video_grid_thw"])
    compressing(model, **LAYERS, retain_ratio=0.5)
    assert torch.equal(model(**{**inputs, "pixel_values_videos": rows}).logits, expected)
    assert model(**inputs).logits.shape[1] > expected.shape[1]


def test_tokens_stand_in_their_own_places_when_threads_meet(monkeypatch):
    """Another thread encodes a video of the same size while what this one kept is not yet looked at."""
    model, twin = compressing(small("qwen2_5_vl"), **LAYERS), small("qwen2_5_vl")
    inputs, others = (qwen_inputs(model, [[3, Clip(9, *SMALL), 4]], seed=seed) for seed in (1, 2))
    expected = oracle_tokens(twin, inputs, **LAYERS)
    new_tokens(model, inputs)
    own, met = VisionPath.__call__, []

    def interrupted(path, model, video):
        result = own(path, model, video)
        if not met:
            met.append(threading.Thread(target=new_tokens, args=(model, others)))
            met[0].start()
            met[0].join()
        return result

    monkeypatch.setattr(VisionPath, "__call__", interrupted)
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"][-3:, 0]), with_kwargs=True
    )
    got = new_tokens(model, inputs, max_new_tokens=1)
    positions_in_company = seen[-1]
    new_tokens(model, inputs, max_new_tokens=1)
    hook.remove()
    assert len(met) == 1
    assert torch.equal(positions_in_company, seen[-1])
    assert torch.equal(got, expected[:, :1])


@torch.no_grad()
def test_loss_is_that_of_what_stays(kind):
    model, twin = compressing(small(kind), **LAYERS), small(kind)
    inputs = qwen_inputs(model, [[6, Clip(5, *SMALL), 9]])
    labels = inputs["input_ids"].masked_fill(inputs["mm_token_type_ids"] != 0, -100)
    ((ids, logits),) = compressed_rows(twin, inputs, **oracle_options(**LAYERS))
    targets = ids.masked_fill(ids == VIDEO, -100)
    expected = torch.nn.functional.cross_entropy(logits[:-1], targets[1:])
    assert_close(model(**inputs, labels=labels).loss, expected)


@torch.no_grad()
def test_nothing_of_a_call_is_left_in_the_next(kind):
    """``rope_deltas``, which the model keeps, is of another batch and another prompt."""
    model, twin = compressing(small(kind), **LAYERS), small(kind)
    inputs = qwen_inputs(model, [[3, Clip(5, *SMALL), 4], [1, Clip(4, *SMALL), 2]])
    text = qwen_inputs(model, [[5], [9], [3]])
    for _ in range(2):
        expected = new_tokens(model, inputs)
        assert torch.equal(model(**text).logits, twin(**text).logits)
        assert torch.equal(new_tokens(model, row_alone(inputs, 0)), expected[:1])
        assert torch.equal(new_tokens(model, text), new_tokens(twin, text))
