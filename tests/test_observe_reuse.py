"""What an observation says was computed is what the specification plans, from the pixels that the model gets."""

import pytest
import torch
from effort import examples
from generating import trace_of_video_rows
from hypothesis import given
from hypothesis import strategies as st
from made_up import pictures
from scenes import standing_camera, video
from tiny_models import tiny_llava_onevision

from earlytom_compile import EarlyTomConfig
from earlytom_compile.families.base import Video
from earlytom_compile.families.registry import family_of
from earlytom_compile.integrations.observe import Observer, observe
from earlytom_compile.reference import plan_reuse

LAYERS, PATCH, IMAGE, SIDE = 3, 4, 26, 6  # 2 pixels of each side belong to no patch
FRAMES = 7


@pytest.fixture(scope="module")
def model():
    return tiny_llava_onevision(vision_layers=LAYERS, text_layers=1, image_size=IMAGE, patch_size=PATCH)


@pytest.fixture(scope="module")
def one_trace():
    return trace_of_video_rows()


def seen(one_trace, model, pixels, given):
    observer = Observer(EarlyTomConfig(**given))
    return observer.watch(one_trace.through(observer.backend), family_of(model), model, Video(pixels))


@examples(12)
@given(
    seed=st.integers(0, 2**31),
    changing=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    options=st.sampled_from([{}, {"encode_ratio": 0.4}, {"tau_reuse": 1.0}, {"full_layers": ()}]),
)
def test_it_is_what_the_specification_plans(one_trace, model, seed, changing, options):
    camera = {"patch": PATCH, "changing": changing, "generator": torch.Generator().manual_seed(seed)}
    pixels = standing_camera(FRAMES, IMAGE, **camera)
    places = SIDE**2
    budget = max(places, round(options["encode_ratio"] * FRAMES * places)) if "encode_ratio" in options else None
    tau = options.get("tau_reuse", EarlyTomConfig.tau_reuse)
    plan = plan_reuse(pixels, (SIDE, SIDE), (PATCH, PATCH), tau_reuse=tau, budget=budget)
    found = seen(one_trace, model, pixels, options)
    reuse, counts = found.reuse, found.reuse.counts
    assert torch.equal(torch.from_numpy(reuse.source), plan.source)
    assert torch.equal(torch.from_numpy(reuse.computed), plan.active.view(FRAMES, SIDE, SIDE))
    assert reuse.grid == (SIDE, SIDE) and reuse.covered == (24 / 26, 24 / 26)
    assert counts.total == plan.computed and counts.every == FRAMES * places
    assert counts.threshold == pytest.approx(plan.threshold) and counts.noise == pytest.approx(plan.noise)
    assert counts.changed == pytest.approx(float((plan.change > plan.threshold).float().mean()))
    assert found.merges == () and found.frame_counts == (FRAMES,)
    assert found.importance.shape == (FRAMES, 3, 3) and not found.importance_decides


def test_a_moving_camera_leaves_all_to_be_computed_and_the_words_say_why(model):
    slides = torch.from_numpy(pictures(FRAMES, height=IMAGE, width=IMAGE)).permute(0, 3, 1, 2)
    (found,) = observe(model, slides[None] / 127.5 - 1, variant="plus")
    counts = found.reuse.counts
    assert found.reuse.computed.all() and not counts.reused and counts.changed > 0.8
    said = f"Nothing was reused: {counts.changed:.1%} of the patches changed"
    assert counts.told(found.config, LAYERS).startswith(said)


def test_where_frames_merge_nothing_is_said_about_reuse(model):
    pixels = video(FRAMES, IMAGE, generator=torch.Generator().manual_seed(0))
    (found,) = observe(model, pixels[None], variant="paper", merge_layers=(0,))
    assert found.reuse is None and found.merges
