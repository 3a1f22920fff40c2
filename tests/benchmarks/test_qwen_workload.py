"""Prompts made for timing models of Qwen: laid out as transformers' own processors do it, and taken apart again."""

import numpy as np
import pytest
import torch
from scenes import spread
from torch.nn.functional import pad

from earlytom_compile.benchmarks.arms import _averaged, _subsampled
from earlytom_compile.benchmarks.floor import work_of
from earlytom_compile.benchmarks.load import left_padded, make_prompts
from earlytom_compile.benchmarks.model_parts import LLM, TOKENS, VISION, parts_of, weight_bytes
from earlytom_compile.benchmarks.qwen_workload import patches_of, words_of
from earlytom_compile.benchmarks.workload import (
    frames_of_inputs,
    make_inputs,
    random_model,
    tokens_beside,
    with_other_frames,
)
from earlytom_compile.shapes import config_of, shape_of

NAMES = ("cpu-tiny-qwen2.5", "cpu-tiny-qwen3", "cpu-tiny-qwen3.5")


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    made = random_model(config_of(request.param), device="cpu", dtype=torch.float32)
    spread(made)  # else every prompt gets the same answer
    return made


@pytest.mark.parametrize("frames", [1, 4, 5])
def test_patches_are_in_the_processors_order(frames):
    pytest.importorskip("torchvision")
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    pictures = torch.from_numpy(np.random.default_rng(0).normal(size=(frames, 3, 24, 40)).astype(np.float32))
    settings = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    own = Qwen2VLVideoProcessor().patchify(pictures[None], **settings)[0][0]
    assert torch.equal(patches_of(pictures, patch=4).flatten(0, 1), own)


def test_the_model_takes_them(model):
    inputs = make_inputs(model, frames=5, batch=2, prompt_length=11, picture_size=(16, 24))
    with torch.no_grad():
        logits = model(**inputs, logits_to_keep=1).logits
    assert logits.shape[:2] == (2, 1) and logits.isfinite().all()
    placeholders = inputs["input_ids"] == model.config.video_token_id
    assert placeholders.sum(1).tolist() == [3 * 6] * 2  # 5 pictures are 3 temporal patches of 2 x 3 tokens
    assert torch.equal(inputs["mm_token_type_ids"] == 2, placeholders)
    beside = tokens_beside(model, inputs)
    assert beside + 3 * 6 == inputs["input_ids"].shape[1]
    shape = next(shape for shape in map(shape_of, NAMES) if shape.model_type == model.config.model_type)
    assert beside == 11 + shape.tokens_beside(3)


def test_scenes_are_of_frames_as_the_encoder_sees_them(model):
    videos = frames_of_inputs(model, make_inputs(model, frames=16, scene_frames=4))
    assert videos.shape[:2] == (1, 8)
    same = [torch.equal(before, after) for before, after in zip(videos[0], videos[0, 1:], strict=False)]
    assert same == [True, True, True, False, True, True, True]


@pytest.mark.parametrize("fewer", [_subsampled, _averaged])
def test_prompts_with_fewer_frames_have_the_same_words(model, fewer):
    inputs = make_inputs(model, frames=12, batch=2, prompt_length=9, redundancy=0.5)
    videos = frames_of_inputs(model, inputs)
    shorter = with_other_frames(model, inputs, fewer(videos, 2))
    assert torch.equal(words_of(model, shorter), words_of(model, inputs)) and words_of(model, inputs).shape == (2, 9)
    left = frames_of_inputs(model, shorter)
    assert left.shape == (2, 2, *videos.shape[2:])
    wanted = (
        videos[:, [1, 4]] if fewer is _subsampled else torch.stack((videos[:, :3].mean(1), videos[:, 3:].mean(1)), 1)
    )
    assert torch.allclose(left, wanted)
    assert shorter["video_grid_thw"][:, 0].tolist() == [2, 2]
    with torch.no_grad():
        assert model(**shorter, logits_to_keep=1).logits.isfinite().all()


def test_a_batch_of_clients_answers_as_each_would_alone(model):
    prompts = make_prompts(model, 3, frames=4, prompt_length=12, picture_size=(16, 16))
    batch = left_padded(prompts)
    assert {name: len(value) for name, value in batch.items() if name.endswith(("ids", "mask"))} == {
        "input_ids": 3, "attention_mask": 3, "mm_token_type_ids": 3,
    }  # fmt: skip
    said = model.generate(**batch, max_new_tokens=3, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for row, prompt in enumerate(prompts):
        alone = model.generate(**prompt, max_new_tokens=3, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert torch.equal(pad(said[row], (0, len(alone) - len(said[row]))), alone)


def test_weights_are_counted_once_and_where_they_belong(model):
    inner, config = model.model, model.config
    counted, parts = weight_bytes(inner), parts_of(inner)
    everything = sum(parameter.nbytes for parameter in model.parameters())
    beside = (inner.language_model.embed_tokens.weight, inner.language_model.norm.weight, model.lm_head.weight)
    assert sum(counted.values()) + sum(weight.nbytes for weight in beside) == everything
    mergers = 1 + len(getattr(config.vision_config, "deepstack_visual_indexes", None) or ())
    assert len(parts[TOKENS]) == mergers and all(counted[stage] > 0 for stage in (VISION, TOKENS, LLM))


def test_the_floor_knows_linear_layers(model):
    shape = next(shape for shape in map(shape_of, NAMES) if shape.model_type == model.config.model_type)
    short, long = (work_of(model, schedules=[(4,)], prompt=length, shape=shape) for length in (100, 1000))
    attending = [layer for layer in range(shape.llm_layers) if shape.above_diagonal(layer, 9)]
    assert len(attending) == (1 if shape.linear else shape.llm_layers)
    triangle = 2 * 1000 * 999 * shape.llm_head * shape.llm_heads
    assert long["llm"].not_needed == len(attending) * triangle
    cached = 4 * 900 * 2 * shape.llm_head * shape.llm_kv_heads * len(attending)  # states do not grow
    assert long["llm"].bytes - short["llm"].bytes == 4 * 900 * 2 * shape.llm_width * shape.llm_layers + cached
