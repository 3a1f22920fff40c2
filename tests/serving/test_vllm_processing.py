"""What vLLM's front end plans of a video before anything is encoded."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm.config", reason="vLLM is not installed: make test-vllm")

from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY

from earlytom_compile import EarlyTomConfigError
from earlytom_compile.integrations.vllm import register
from earlytom_compile.integrations.vllm.options import unpacked
from earlytom_compile.integrations.vllm.processing import FIELD

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
    chosen = [{}, {"earlytom": {"retain_ratio": 0.25}}, {"earlytom": False}, {"earlytom": {"tau_seg": 0.5}}]
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
    options = {"retain_ratio": 0.1, "merge_layers": [1, 2]}
    prepared = planned(processor(toy, mm_processor_kwargs={"earlytom": options, "do_rescale": False}), 8)
    assert float(prepared["mm_kwargs"]["video"][0]["pixel_values_videos"].data.max()) > 1  # not rescaled
    assert not [each for each in recwarn if "earlytom" in str(each.message)]


def test_a_video_without_frames_is_refused(planning):
    items = planning.info.parse_mm_data({"video": [np.zeros((0, 96, 96, 3), np.uint8)]})
    with pytest.raises(EarlyTomConfigError, match="video 0 of the request: vLLM's decoder read no frame of it"):
        planning([5, VIDEO], items)
