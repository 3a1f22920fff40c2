"""What vLLM's front end plans of a video before anything is encoded."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm.config", reason="vLLM is not installed: make test-vllm")

from transformers import AutoConfig
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY

from earlytom_compile import EarlyTomConfig, EarlyTomConfigError, EarlyTomError
from earlytom_compile.families.llava_onevision import LlavaOnevision
from earlytom_compile.integrations.vllm import register
from earlytom_compile.integrations.vllm.llava_onevision import EarlyTomLlavaOnevision
from earlytom_compile.integrations.vllm.models import ServesCompressed
from earlytom_compile.integrations.vllm.options import FIELD, unpacked
from earlytom_compile.integrations.vllm.tower import VideoPath

VIDEO, TOKENS = 4, 16  # its id; of a frame
ratios = st.floats(0.01, 1.0)


def processor(toy, **arguments):
    register()
    return MULTIMODAL_REGISTRY.create_processor(ModelConfig(model=str(toy), dtype="float32", **arguments))


@pytest.fixture(scope="module")
def planning(toy):
    return processor(toy, mm_processor_kwargs={"earlytom": {"retain_ratio": 0.1}})


@pytest.fixture(scope="module")
def plain(toy):
    return processor(toy)


def planned(by, *frames, **options):
    """What comes of a prompt with videos of so many frames."""
    videos = [np.full((count, 96, 96, 3), count, np.uint8) for count in frames]
    items = by.info.parse_mm_data({"video": videos})
    return by([5, *[VIDEO, 6] * len(videos)], items, hf_processor_mm_kwargs=options)


def placeholders(prepared):
    return [place.length for place in prepared["mm_placeholders"]["video"]]


def kept(ratio, frames):
    """K and a newline; Python rounds halves to even."""
    return max(1, round(ratio * frames * TOKENS)) + 1


@given(frames=st.lists(st.integers(1, 40), min_size=1, max_size=3), ratio=ratios)
def test_placeholders_are_those_that_stay(planning, frames, ratio):
    prepared = planned(planning, *frames, earlytom={"retain_ratio": ratio})
    assert placeholders(prepared) == [kept(ratio, count) for count in frames]
    assert prepared["prompt_token_ids"].count(VIDEO) == sum(placeholders(prepared))


@given(frames=st.lists(st.integers(1, 40), min_size=1, max_size=3))
def test_without_options_of_its_own_a_request_has_the_servers(planning, frames):
    prepared = planned(planning, *frames)
    assert placeholders(prepared) == [kept(0.1, count) for count in frames]
    options = [unpacked(item[FIELD].data) for item in prepared["mm_kwargs"]["video"]]
    assert options == [{"retain_ratio": 0.1}] * len(frames)


@given(frames=st.lists(st.integers(1, 40), min_size=1, max_size=3))
def test_all_tokens_are_those_that_vllm_plans(planning, plain, frames):
    without, off = planned(plain, *frames), planned(planning, *frames, earlytom=False)
    assert placeholders(off) == placeholders(without) == [count * TOKENS + 1 for count in frames]
    assert off["prompt_token_ids"] == without["prompt_token_ids"]
    assert FIELD not in without["mm_kwargs"]["video"][0]


def test_hash_tells_options_apart(planning, plain):
    chosen = [{}, {"earlytom": {"retain_ratio": 0.25}}, {"earlytom": False}, {"earlytom": {"tau_reuse": 0.5}}]
    hashes = [planned(planning, 8, **options)["mm_hashes"]["video"][0] for options in chosen]
    hashes.append(planned(plain, 8)["mm_hashes"]["video"][0])
    assert len(set(hashes)) == len(hashes)
    assert planned(planning, 8, earlytom={"retain_ratio": 0.1})["mm_hashes"]["video"] == hashes[:1]


def test_hash_tells_servers_apart(toy, planning):
    other = processor(toy, mm_processor_kwargs={"earlytom": {"retain_ratio": 0.2}})
    assert planned(other, 8)["mm_hashes"] != planned(planning, 8)["mm_hashes"]


def test_profile_counts_what_stays(planning, plain):
    """By which vLLM sizes the encoder's budget and cache."""
    full = plain.info.get_max_video_tokens(1024, {"video": 1})
    left = planning.info.get_max_video_tokens(1024, {"video": 1})
    assert (full, left) == (16 * TOKENS + 1, kept(0.1, 16))


def test_its_own_options_reach_no_processor_of_transformers(toy, recwarn):
    options = {"retain_ratio": 0.1, "full_layers": [1, 2]}
    prepared = planned(processor(toy, mm_processor_kwargs={"earlytom": options, "do_rescale": False}), 8)
    assert float(prepared["mm_kwargs"]["video"][0]["pixel_values_videos"].data.max()) > 1  # not rescaled
    assert not [each for each in recwarn if "earlytom" in str(each.message)]


def test_a_video_without_frames_is_refused(planning):
    items = planning.info.parse_mm_data({"video": [np.zeros((0, 96, 96, 3), np.uint8)]})
    with pytest.raises(EarlyTomConfigError, match="video 0 of the request: vLLM's decoder read no frame of it"):
        planning([5, VIDEO], items)


@pytest.mark.parametrize("made_by", [{"rescale_factor": 1e30}, {"rescale_factor": float("nan")}])
def test_pixels_without_a_similarity_are_refused(planning, made_by):
    with pytest.raises(EarlyTomConfigError, match="the pixels of a video go from .* Look at .* rescale_factor"):
        planned(planning, 8, **made_by)
    assert placeholders(planned(planning, 8, earlytom=False, **made_by)) == [8 * TOKENS + 1]


@pytest.mark.parametrize(("image", "patch"), [(384, 14), (96, 12), (70, 16)])
def test_rows_of_the_worker_are_those_of_sizes_without_a_whole_number_of_patches(image, patch):
    side = -(-(image // patch) // 2)
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=image, patch_size=patch), text_config=SimpleNamespace(hidden_size=64)
    )
    video = SimpleNamespace(pixels=torch.zeros(8, 1))
    shape = EarlyTomLlavaOnevision.planned_shape(SimpleNamespace(config=config), video, EarlyTomConfig(retain_ratio=1))
    assert shape == (8 * side**2 + 1, 64)


def test_a_worker_whose_weights_were_not_loaded_does_not_start(toy):
    """Not all loaders of vLLM's call load_weights()."""
    path = VideoPath(AutoConfig.from_pretrained(toy), LlavaOnevision(), eager=True)
    model = SimpleNamespace(_video_path=path, _options={}, _has_random_weights=False, forward=None)
    with pytest.raises(EarlyTomError, match=r"weights of the LLaVA-OneVision vision path .* --load-format"):
        ServesCompressed._first_forward(model)
