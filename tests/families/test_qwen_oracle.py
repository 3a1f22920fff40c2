"""The oracle of the Qwen models, where what must come out is known without it."""

import pytest
import torch
from oracle_qwen import compressed_generate, compressed_rows, compressed_videos
from tiny_qwen import KINDS, PATCH, TEMPORAL, Clip, Still, patches_of, qwen_inputs, row_alone, tiny_qwen
from torch.testing import assert_close
from transformers import Qwen2VLVideoProcessor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

EVERYTHING = {"merge_layers": (), "retain_ratio": 1.0, "variant": "paper"}
MERGING = {"merge_layers": (1, 4), "tau_seg": 0.3, "variant": "paper"}


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return tiny_qwen(request.param)


def test_patches_are_cut_as_the_processor_cuts_them():
    pictures = Clip(3, 4, 6).pictures(torch.Generator().manual_seed(0))
    sizes = {"patch_size": PATCH, "temporal_patch_size": TEMPORAL, "merge_size": 2}
    untouched = {"do_resize": False, "do_rescale": False, "do_normalize": False, "do_sample_frames": False}
    own = Qwen2VLVideoProcessor(**sizes, **untouched)(videos=[pictures], return_tensors="pt")
    assert torch.equal(own["pixel_values_videos"], patches_of(pictures))
    assert own["video_grid_thw"].tolist() == [[3, 4, 6]]


def test_the_models_tell_videos_apart(model):
    row, logits = [3, Clip(4, 4, 6), 4], []
    for seed in (1, 2):
        inputs = {**qwen_inputs(model, [row], seed=1), **_pixels(qwen_inputs(model, [row], seed=seed))}
        with torch.no_grad():
            logits.append(model(**inputs).logits[0, -1])
    assert (logits[0] - logits[1]).std() > 0.2 * logits[0].std()


def _pixels(inputs):
    return {"pixel_values_videos": inputs["pixel_values_videos"]}


def test_with_everything_kept_it_is_the_model_itself(model):
    """Two videos of different sizes, an image beside them, and a row that is padded."""
    inputs = qwen_inputs(model, [[3, Clip(6, 4, 6), 4], [1, Still(4, 4), Clip(2, 8, 8), 2, Clip(5, 10, 6), 4]])
    for row, (ids, logits) in enumerate(compressed_rows(model, inputs, **EVERYTHING)):
        alone = row_alone(inputs, row)
        assert torch.equal(ids, alone["input_ids"][0])
        with torch.no_grad():
            assert_close(logits, model(**alone).logits[0], atol=1e-5, rtol=1e-5)
    own = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(own[:, inputs["input_ids"].shape[1] :], compressed_generate(model, inputs, 6, **EVERYTHING))


@pytest.mark.parametrize("height, width", [(4, 6), (10, 6)])
def test_frames_that_are_equal_become_one_that_is_the_same(model, height, width):
    """Of six the four in the middle become two, and then one; all tokens of the three that are left are kept, and all
    that the model makes of them is what it makes of frames 0, 1 and 5."""
    clip = Clip(6, height, width, still=True)
    (video,) = compressed_videos(model, qwen_inputs(model, [[3, clip, 4]]), retain_ratio=0.5, **MERGING)
    assert video.frames_after == [4, 3]
    first_frames, tokens = torch.tensor([0, 1, 5]), torch.arange(clip.tokens)
    assert torch.equal(video.columns, (first_frames[:, None] * clip.tokens + tokens).flatten())
    inputs = qwen_inputs(model, [[3, clip, 4]])
    with torch.no_grad():
        own = model.model.visual(inputs["pixel_values_videos"], grid_thw=inputs["video_grid_thw"])
    assert_close(video.features, own.pooler_output[video.columns], atol=1e-5, rtol=1e-5)
    for states, deep in zip(video.deepstack, getattr(own, "deepstack_features", []), strict=True):
        assert_close(states, deep[video.columns], atol=1e-5, rtol=1e-5)


def test_a_merged_frame_is_the_weighted_mean_of_what_leaves_the_layer():
    """One merge behind the last layer: frames 0 and 4 stay, 1 and 2 become one, 3 is alone or they are 1, 2 and 3."""
    model = tiny_qwen("qwen3_vl", deepstack=(0, 5))
    inputs = qwen_inputs(model, [[3, Clip(5, 4, 6, scenes=1), 4]])
    left = {}
    hooks = [
        model.model.visual.blocks[layer].register_forward_hook(
            lambda module, args, output, layer=layer: left.update({layer: output.view(5, 24, -1)})
        )
        for layer in (0, 5)
    ]
    with torch.no_grad():
        model.model.visual(inputs["pixel_values_videos"], grid_thw=inputs["video_grid_thw"])
    for hook in hooks:
        hook.remove()
    options = {"merge_layers": (5,), "tau_seg": -1.0, "tau_merge": -1.0, "retain_ratio": 0.8, "variant": "paper"}
    (video,) = compressed_videos(model, inputs, **options)
    assert video.frames_after == [4] and len(video.kept) == 24  # all of them
    similarity = [torch.cosine_similarity(left[5][t], left[5][t + 1], dim=-1).mean() for t in range(4)]
    pair = 1 if similarity[1] >= similarity[2] else 2
    share = similarity[pair] / (similarity[pair] + similarity[pair + 1])
    with torch.no_grad():
        for states, merger, got in (
            (left[5], model.model.visual.merger, video.features),
            (left[0], model.model.visual.deepstack_merger_list[0], video.deepstack[0]),
            (left[5], model.model.visual.deepstack_merger_list[1], video.deepstack[1]),
        ):
            one = share * states[pair] + (1 - share) * states[pair + 1]
            frames = [*states[:pair], one, *states[pair + 2 :]]
            assert_close(got, merger(torch.cat(frames)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("scored", [4, 5])
def test_importance_is_the_attention_that_the_model_pays(kind, scored, monkeypatch):
    """``scored`` attends within windows in one of them. 10 x 6 patches: windows of 4 x 4, at the border smaller."""
    model, weights = tiny_qwen(kind), {}
    clip = Clip(3, 10, 6, scenes=1)
    inputs = qwen_inputs(model, [[3, clip, 4]])

    def recording(module, query, key, value, attention_mask, scaling, **kwargs):
        paid = (query @ key.transpose(-1, -2) * scaling).softmax(-1)
        weights.setdefault(module, []).append(paid[0].mean(0).sum(0))  # over the heads, over the queries
        return (paid @ value).transpose(1, 2), paid

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "recording", recording)
    monkeypatch.setattr(model.model.visual.config, "_attn_implementation_internal", "recording")
    keeping_one = {"merge_layers": (scored,), "retain_ratio": 1e-3, "variant": "paper"}
    (video,) = compressed_videos(model, inputs, **keeping_one)
    received = torch.cat(weights[model.model.visual.blocks[scored].attn]).view(3, clip.tokens, 4).mean(-1)
    windows = kind == "qwen2_5_vl" and scored == 4
    assert len(weights[model.model.visual.blocks[scored].attn]) == (3 * 6 if windows else 3)
    in_order = received[:, _places(model, clip)]
    assert video.kept.tolist() == [[0, int(in_order[0].argmax())]]
    with pytest.MonkeyPatch.context() as patch:
        seen = {}
        patch.setattr("oracle_qwen.select_tokens", lambda importance, *a, **k: seen.update(x=importance) or video.kept)
        compressed_videos(model, inputs, **keeping_one)
    assert_close(seen["x"], in_order / clip.patches, atol=1e-6, rtol=1e-5)


def _places(model, clip):
    """Where the tower has the tokens of a frame, row by row: window by window in Qwen2.5-VL, 2 x 2 tokens each."""
    rows, columns = clip.height // 2, clip.width // 2
    order = [(row, column) for row in range(rows) for column in range(columns)]
    if hasattr(model.config.vision_config, "window_size"):
        order.sort(key=lambda place: (place[0] // 2, place[1] // 2, place[0] % 2, place[1] % 2))
    return [order.index((row, column)) for row in range(rows) for column in range(columns)]


@pytest.mark.parametrize("variant", ["paper", "plus"])
def test_exactly_so_many_are_kept_and_text_stays(model, variant):
    clips = Clip(7, 6, 14, scenes=2), Clip(2, 4, 4)
    inputs = qwen_inputs(model, [[5, clips[0], 3, clips[1], 2]])
    videos = compressed_videos(model, inputs, **{**MERGING, "variant": variant}, retain_ratio=0.11)
    assert [len(video.kept) for video in videos] == [round(0.11 * 7 * 21), 1]
    ((ids, _),) = compressed_rows(model, inputs, **{**MERGING, "variant": variant}, retain_ratio=0.11)
    text = inputs["input_ids"][inputs["mm_token_type_ids"] == 0]
    assert torch.equal(ids[ids != model.config.video_token_id], text)
    assert int((ids == model.config.video_token_id).sum()) == round(0.11 * 7 * 21) + 1
