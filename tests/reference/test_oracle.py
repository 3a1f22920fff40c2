"""The oracle itself: where nothing is compressed it is the model, and rows do not know of each other."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from oracle import _attention_received, compressed_forward, compressed_generate  # noqa: E402
from tiny_models import tiny_llava_onevision, tokens_per_frame, video_inputs  # noqa: E402

PAPER = {"retain_ratio": 0.25, "variant": "paper"}
RELEASED = {"retain_ratio": 0.25, "variant": "released"}
NOTHING_COMPRESSED = {"retain_ratio": 1.0, "variant": "paper", "tau_seg": 2.0}


@pytest.fixture(scope="module")
def model():
    return tiny_llava_onevision()


def real(logits, inputs):
    """Logits of what is no padding; what padding positions compute is nobody's business."""
    mask = inputs["attention_mask"] if isinstance(inputs, dict) else inputs.cut_attention_mask
    return logits[mask.bool()]


def row_alone(inputs, row, videos):
    """One row of a batch as a batch of one, without its padding, with its own videos."""
    real_tokens = inputs["attention_mask"][row].bool()
    alone = {name: inputs[name][row][real_tokens][None] for name in ("input_ids", "attention_mask")}
    if videos:
        alone["pixel_values_videos"] = inputs["pixel_values_videos"][videos]
    return alone


@pytest.mark.parametrize("vision_feature_layer", [-1, -2, 3])
@torch.no_grad()
def test_nothing_compressed_is_the_model_itself(vision_feature_layer):
    model = tiny_llava_onevision(vision_feature_layer=vision_feature_layer)
    inputs = video_inputs(
        model,
        frames=8,
        videos_per_row=(1, 2, 0),
        images_per_row=(1, 0, 1),
        before=(0, 1, 2),
        left_padding=(0, 2, 0),
    )
    result = compressed_forward(model, inputs, **NOTHING_COMPRESSED)
    torch.testing.assert_close(real(result.logits, inputs), real(model(**inputs).logits, inputs))
    assert torch.equal(result.cut_input_ids, inputs["input_ids"])
    assert all(set(counts) == {8} for counts in result.frames_after)


@torch.no_grad()
def test_given_position_ids_reach_the_language_model(model):
    inputs = video_inputs(model, frames=4)
    inputs["position_ids"] = 3 * torch.arange(inputs["input_ids"].shape[1])[None]
    result = compressed_forward(model, inputs, **NOTHING_COMPRESSED)
    torch.testing.assert_close(result.logits, model(**inputs).logits)
    del inputs["position_ids"]
    assert (result.logits - model(**inputs).logits).abs().max() > 0.1


@torch.no_grad()
def test_position_ids_close_the_gap_that_dropped_tokens_leave(model):
    inputs = video_inputs(model, frames=8, left_padding=3)
    plain = compressed_forward(model, inputs, **PAPER)
    inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]
    torch.testing.assert_close(compressed_forward(model, inputs, **PAPER).logits, plain.logits)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    aligned = compressed_forward(model, inputs, **PAPER)
    alone = compressed_forward(model, row_alone(inputs, 0, [0]), **PAPER)
    torch.testing.assert_close(real(aligned.logits, aligned), alone.logits[0])


@pytest.mark.parametrize("options", [PAPER, RELEASED])
@torch.no_grad()
def test_a_row_alone_is_the_same_row_in_a_batch(model, options):
    inputs = video_inputs(model, frames=16, videos_per_row=(1, 2), before=(2, 0), after=(1, 4))
    batch = compressed_forward(model, inputs, **options)
    for row, videos in enumerate(([0], [1, 2])):
        alone = compressed_forward(model, row_alone(inputs, row, videos), **options)
        assert alone.frames_after == [batch.frames_after[v] for v in videos]
        assert all(torch.equal(alone.kept[i], batch.kept[v]) for i, v in enumerate(videos))
        mask = batch.cut_attention_mask[row].bool()
        assert torch.equal(alone.cut_input_ids[0], batch.cut_input_ids[row][mask])
        # Rotary positions are relative: a shift of all positions of a row changes rounding only, that of an angle at
        # position p by p units of float32, once in the query and once in the key.
        atol = 2 * batch.logits.shape[1] * 2.0**-24 * batch.logits.abs().max().item()
        torch.testing.assert_close(alone.logits[0], batch.logits[row][mask], atol=atol, rtol=0)


@pytest.mark.parametrize("frames", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("retain_ratio", [0.1, 0.5, 1.0])
@torch.no_grad()
def test_paper_keeps_exactly_k_tokens_a_video(model, frames, retain_ratio):
    inputs = video_inputs(model, frames, videos_per_row=(1, 2))
    result = compressed_forward(model, inputs, retain_ratio=retain_ratio, variant="paper")
    tokens = max(1, round(retain_ratio * frames * tokens_per_frame(model)))
    assert [len(kept) for kept in result.kept] == [tokens] * 3
    placeholders = (result.cut_input_ids == model.config.video_token_id).sum(-1)
    assert placeholders.tolist() == [tokens + 1, 2 * (tokens + 1)]
    assert all(counts[-1] >= math.ceil(retain_ratio * frames) for counts in result.frames_after)


@torch.no_grad()
def test_the_inputs_of_the_tests_make_frames_merge_and_logits_differ(model):
    """A guard for every test that compares with the oracle: there must be something to get wrong."""
    logits = []
    for seed in range(4):
        inputs = video_inputs(model, frames=16, seed=seed)
        result = compressed_forward(model, inputs, **PAPER)
        assert result.frames_after[0][-1] < result.frames_after[0][0] < 16
        logits.append(result.logits[0, -1])
        full = model(**inputs).logits[0, -1]
        assert (full - logits[-1]).abs().max() > 1e-2
    assert all((a - b).abs().max() > 0.1 for i, a in enumerate(logits) for b in logits[:i])


@torch.no_grad()
def test_a_static_video_merges_as_far_as_a_segment_can(model):
    inputs = video_inputs(model, frames=10, static=True)
    result = compressed_forward(model, inputs, retain_ratio=0.1, variant="paper")
    # Head and tail stay; of the 8, then 4 frames between them every second one goes.
    assert result.frames_after == [[6, 4]]


@torch.no_grad()
def test_an_image_is_not_touched(model):
    """What comes before the video does not see it (causal attention), so its logits are the model's."""
    inputs = video_inputs(model, frames=8, images_per_row=(1,))
    first = int((inputs["input_ids"][0] == model.config.video_token_id).nonzero()[0])
    result = compressed_forward(model, inputs, **PAPER)
    assert result.cut_input_ids.shape[1] < inputs["input_ids"].shape[1]
    torch.testing.assert_close(result.logits[:, :first], model(**inputs).logits[:, :first])


@torch.no_grad()
def test_generate_is_the_model_s_own_where_nothing_is_compressed(model):
    inputs = video_inputs(model, frames=4, videos_per_row=(1, 2), left_padding=(0, 2))
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(compressed_generate(model, inputs, 5, **NOTHING_COMPRESSED), expected)


@pytest.mark.parametrize("options", [PAPER, RELEASED])
@torch.no_grad()
def test_generate_goes_on_from_the_compressed_logits(model, options):
    inputs = video_inputs(model, frames=8, videos_per_row=(1, 1), before=(1, 3))
    tokens = compressed_generate(model, inputs, 4, **options)
    first = compressed_forward(model, inputs, **options).logits[:, -1].argmax(-1)
    assert tokens.shape == (2, 4)
    assert torch.equal(tokens[:, 0], first)
    ended = compressed_generate(model, inputs, 4, eos_token_id=int(first[0]), pad_token_id=1, **options)
    assert ended[0].tolist() == [int(first[0])] + [1] * (ended.shape[1] - 1)


def test_what_the_oracle_cannot_answer_is_an_error(model):
    inputs = video_inputs(model, frames=4)
    with pytest.raises(ValueError, match="layers 0 to 5"):
        compressed_forward(model, inputs, merge_layers=(6,), **PAPER)
    inputs["input_ids"] = inputs["input_ids"][:, 5:]
    inputs["attention_mask"] = inputs["attention_mask"][:, 5:]
    with pytest.raises(ValueError, match="placeholders"):
        compressed_forward(model, inputs, **PAPER)


@torch.no_grad()
def test_importance_is_the_attention_the_model_computes():
    """The oracle takes it from queries and keys; an eager model hands out its attention weights."""
    model = tiny_llava_onevision(attn_implementation="eager")
    frames = video_inputs(model, frames=4)["pixel_values_videos"][0]
    attention = model.model.vision_tower(frames, output_attentions=True).attentions[4]
    layer, seen = model.model.vision_tower.encoder.layers[4].self_attn, {}
    for name in ("q_proj", "k_proj"):
        getattr(layer, name).register_forward_hook(lambda m, args, out, name=name: seen.update({name: out}))
    model.model.vision_tower(frames)
    received = _attention_received(seen["q_proj"], seen["k_proj"], layer)
    torch.testing.assert_close(received, attention.mean((1, 2)))
    torch.testing.assert_close(received.sum(-1), torch.ones(4))
