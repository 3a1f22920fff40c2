"""What was computed, in numbers that are those of the plan and in words that say why."""

from dataclasses import asdict, replace

import pytest
import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st

from earlytom_compile.config import EarlyTomConfig
from earlytom_compile.reused import ComputedPatches, computed_patches, patches_of, share_computed

PLUS = EarlyTomConfig(variant="plus")


@examples(40)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**31))
def test_numbers_are_those_of_the_plan(videos, frames, places, seed):
    generator = torch.Generator().manual_seed(seed)
    change = torch.rand(videos, frames, places, generator=generator)
    change[:, 0] = float("inf")
    change[torch.rand(change.shape, generator=generator) < 0.1] = float("nan")
    measured = torch.rand(videos, 2, generator=generator)
    own = torch.rand(change.shape, generator=generator) < 0.5
    own[:, 0] = True
    source = (torch.arange(frames)[:, None] * own).cummax(1).values
    for video, found in enumerate(computed_patches(source, change, measured)):
        rows = [[int(source[video, f, s]) == f for s in range(places)] for f in range(frames)]
        assert found.by_frame == tuple(map(sum, rows)) and found.places == places
        assert found.total == sum(map(sum, rows)) and found.every == frames * places
        unchanged = sum(float(x) <= float(measured[video, 1]) for x in change[video].flatten())
        assert found.changed == pytest.approx(1 - unchanged / (frames * places))
        assert (found.noise, found.threshold) == tuple(measured[video].tolist())


def test_what_was_computed_is_said_with_the_threshold_and_the_noise():
    found = ComputedPatches((729, 140, 152), 729, 0.45, 0.0071, 0.0613)
    text = found.told(PLUS, 26)
    assert text.startswith(
        "1,021 of 2,187 patches (46.7%) are computed: all of the first frame, then those that changed"
    )
    tau = f"tau_reuse={PLUS.tau_reuse:g} and the noise measured in this video, 0.0071."
    assert "by more than 0.0613, which comes of " + tau in text
    layers = PLUS.resolve_full_layers(26)
    assert f"layers {', '.join(map(str, layers))} computed every patch" in text
    alone = EarlyTomConfig(variant="plus", full_layers=(25,))
    assert found.told(alone, 26).endswith("Encoder layer 25 computed every patch.")
    assert "every patch" not in found.told(EarlyTomConfig(variant="plus", full_layers=()), 26)
    assert found.frame_by_frame() == "100 19 21"


def test_frames_that_layers_in_full_left_out_are_told():
    found = ComputedPatches((9, 2, 0, 0), 9, 0.3, 0.0, 0.06, distinct=2)
    text = found.told(PLUS, 8)
    assert text.endswith("computed every patch of 2 of the 4 frames; the others repeat one of these to the last pixel.")
    assert "repeat" not in replace(found, distinct=4).told(PLUS, 8)


def test_the_share_of_several_videos_is_that_of_all_their_patches():
    report = {
        "videos": [{"patches": asdict(ComputedPatches(by_frame, 10, 0.4, 0.0, 0.06))} for by_frame in [(10, 2), (10,)]]
    }
    assert share_computed(patches_of(report)) == 22 / 30
    assert share_computed(patches_of({"videos": [{"frames": [8]}]})) is None


def test_a_budget_is_named_instead_of_tau():
    text = ComputedPatches((9, 2), 9, 0.6, 0.0, 0.25).told(EarlyTomConfig(variant="plus", encode_ratio=0.6), 8)
    assert "encode_ratio=0.6 says how many" in text and "more than 0.25." in text and "tau_reuse" not in text


@pytest.mark.parametrize(
    "found, options, says",
    [
        (ComputedPatches((9, 9), 9, 0.931, 0.01, 0.04), {}, "93.1% of the patches changed"),
        (ComputedPatches((9,), 9, 1.0, 0.0, 0.03), {}, "the video has one frame"),
        (ComputedPatches((9, 9), 9, 0.6, 0.0, 0.0), {"encode_ratio": 1.0}, "encode_ratio=1 has every patch computed"),
    ],
)
def test_that_nothing_was_reused_is_said_plainly_and_why(found, options, says):
    text = found.told(EarlyTomConfig(variant="plus", **options), 8)
    assert text.startswith("Nothing was reused: ") and says in text and "taken over" not in text
