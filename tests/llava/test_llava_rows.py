"""Rows of one video: every newline mode, pooling and variant of LLaVA's own code against the oracle."""

from itertools import product

import pytest
import torch
from effort import cases, examples
from generating import share_vision_paths, trace_of_video_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llava_calls import CLOSE, NEWLINES, POOLS, VARIANTS, WAYS_TO_REUSE, check_rows, clip, compiled
from tiny_llava import tiny_llava

import earlytom_compile


@pytest.fixture(scope="module", params=POOLS)
def pooled(request):
    return tiny_llava(pool=request.param)


@pytest.fixture(scope="module")
def one_trace():
    return trace_of_video_rows()


@pytest.fixture
def model(pooled, one_trace, monkeypatch):
    share_vision_paths(one_trace, monkeypatch)
    yield pooled
    earlytom_compile.restore(pooled)
    pooled.config.mm_newline_position, pooled.config.mm_patch_merge_type = "one_token", "spatial_unpad"


@pytest.mark.parametrize(
    "newline, variant",
    cases(
        ("grid", "paper"), ("frame", "released"), ("one_token", "plus"), ("no_token", "paper"), ("grid", "plus"),
        ("grid", "released"),
        among=list(product(NEWLINES, VARIANTS)),
    ),
)  # fmt: skip
def test_rows_are_those_of_the_oracle(model, newline, variant):
    model.config.mm_newline_position = newline
    check_rows(model, clip(model), variant=variant)


def test_frames_of_these_videos_merge(model):
    compiled(model)
    earlytom_compile.encode_videos(model, [clip(model)])
    (told,) = earlytom_compile.report(model).to_dict()["videos"]
    assert 1 < told["frames"][-1] < 6


@pytest.mark.parametrize("way", WAYS_TO_REUSE)
@pytest.mark.parametrize("more", [{}, {"encode_ratio": 0.4}, {"full_layers": ()}])
def test_rows_where_unchanged_patches_are_reused(model, way, more):
    model.config.mm_newline_position = "grid"
    check_rows(model, clip(model, changing=0.3), **WAYS_TO_REUSE[way], **more)
    (told,) = earlytom_compile.report(model).to_dict()["videos"]
    assert 729 < sum(told["patches"]["by_frame"]) < 6 * 729


@pytest.mark.parametrize("newline", ["grid", "frame", "one_token"])
def test_flat_prompts_have_no_newlines(model, newline):
    model.config.mm_newline_position, model.config.mm_patch_merge_type = newline, "flat"
    check_rows(model, clip(model), variant="paper")


def test_one_token_needs_unpad(model):
    model.config.mm_patch_merge_type = "spatial"
    (rows,) = earlytom_compile.encode_videos(compiled(model, retain_ratio=1.0, tau_merge=2.0), [clip(model, 4)])
    side = 14 if model.config.mm_spatial_pool_mode == "bilinear" else 13
    assert len(rows) == 4 * side**2


@settings(examples(6), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    newline=st.sampled_from(NEWLINES),
    variant=st.sampled_from(VARIANTS),
    ratio=st.sampled_from([0.1, 0.15, 0.25, 0.5, 0.75, 1.0]),
    frames=st.integers(2, 9),
    scenes=st.integers(1, 4),
    seed=st.integers(0, 2**20),
)
def test_drawn_videos(model, newline, variant, ratio, frames, scenes, seed):
    model.config.mm_newline_position = newline
    check_rows(model, clip(model, frames, scenes=scenes, seed=seed), variant=variant, retain_ratio=ratio)


@pytest.mark.parametrize("newline", NEWLINES)
def test_a_video_that_keeps_everything_is_the_models_own(model, newline):
    model.config.mm_newline_position = newline
    pixels, ids = clip(model, 4), torch.tensor([[5, -200, 7]])
    own = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, [pixels], ["video"])[4][0, 1:-1]
    (rows,) = earlytom_compile.encode_videos(compiled(model, retain_ratio=1.0, tau_merge=2.0), [pixels])
    torch.testing.assert_close(rows, own, **CLOSE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_single_frame(model, variant):
    model.config.mm_newline_position = "grid"
    check_rows(model, clip(model, 1), variant=variant)


def test_a_frame_without_its_axis_is_a_video_of_one(model):
    """In a call, as for LLaVA's own code; encode_videos() would take the frames of a video for videos."""
    pixels, ids = clip(compiled(model), 1), torch.tensor([[5, 6, -200, 7]])
    with torch.no_grad():
        one, same = (model(ids, images=[each], modalities=["video"]).logits for each in (pixels[0], pixels))
    assert torch.equal(one, same)
    with pytest.raises(earlytom_compile.EarlyTomConfigError, match="images have shape"):
        earlytom_compile.encode_videos(model, [pixels[0]])


def test_videos_of_other_sizes_are_refused(model):
    with pytest.raises(earlytom_compile.EarlyTomConfigError, match=r"takes \(3, 54, 54\)"):
        earlytom_compile.encode_videos(compiled(model), [clip(model)[..., 2:]])


def test_one_compilation_for_all_lengths():
    model = compiled(tiny_llava(newline="grid"))
    for frames in (6, 4, 9):
        earlytom_compile.encode_videos(model, [clip(model, frames)])
    assert sum(graph["compressed"] for graph in earlytom_compile.report(model).to_dict()["compilations"]) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """Which tokens are kept may differ in the last bits; how many, and what they are made of, does not."""
    model = tiny_llava(newline="frame", dtype=dtype)
    (rows,) = earlytom_compile.encode_videos(compiled(model), [clip(model)])
    whole = tiny_llava(newline="frame")
    (exact,) = earlytom_compile.encode_videos(compiled(whole), [clip(model).float()])
    assert rows.dtype == dtype and rows.isfinite().all() and abs(len(rows) - len(exact)) <= 6


LOWERINGS = [
    pytest.param("staged", "grid", "average", "paper"),
    pytest.param("staged", "frame", "max", "released", marks=pytest.mark.long),
    pytest.param("staged", "one_token", "bilinear", "plus", marks=pytest.mark.long),
    pytest.param("whole", "grid", "bilinear", "paper", marks=pytest.mark.long),
]


def test_lowered_with_patches_reused():
    model = tiny_llava(newline="grid", pool="bilinear")
    check_rows(model, clip(model, changing=0.3), **WAYS_TO_REUSE["plus"], lowering="staged", compile_llm=False)


@pytest.mark.parametrize("lowering, newline, pool, variant", LOWERINGS)
def test_lowered(lowering, newline, pool, variant):
    model = tiny_llava(newline=newline, pool=pool)
    check_rows(model, clip(model), variant=variant, lowering=lowering, compile_llm=False)
