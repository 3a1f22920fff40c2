"""Reuse: every rule of the plan, as a property or a known answer."""

import math

import brute_force_reuse
import pytest
import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from pixel_strategies import budgets, fewest_of, places_of, reuse_arguments, thresholds

from earlytom_compile import reference
from earlytom_compile.errors import EarlyTomConfigError
from earlytom_compile.reference import plan_reuse, reuse_budget

some = examples(60)


@st.composite
def planned(draw, **kinds):
    """Arguments of plan_reuse, with a threshold or with a budget."""
    arguments = draw(reuse_arguments(**kinds))
    if draw(st.booleans()):
        return {**arguments, "tau_reuse": draw(thresholds)}
    return {**arguments, "budget": draw(budgets(arguments))}


def flat(values, patch=(2, 2)):
    """[F, 1, H, W] of one row of patches: ``values[f][s]`` everywhere in patch s of frame f."""
    rows = torch.tensor(values, dtype=torch.float32)[:, None, None, :]
    return rows.repeat_interleave(patch[0], 2).repeat_interleave(patch[1], 3)


def plan_of(values, **options):
    return plan_reuse(flat(values), (1, len(values[0])), (2, 2), **options)


# --- All of it ------------------------------------------------------------------------------------


@some
@given(planned())
def test_the_plan_is_that_of_brute_force(arguments):
    source, change, noise, threshold = brute_force_reuse.plan(**arguments)
    plan = plan_reuse(**arguments)
    assert plan.source.tolist() == source
    assert plan.change.tolist() == change
    assert (plan.noise, plan.threshold) == (noise, threshold)


@some
@given(planned())
def test_a_source_is_that_of_the_frame_before_or_the_frame_itself(arguments):
    plan = plan_reuse(**arguments)
    source = plan.source.tolist()
    assert source[0] == [0] * places_of(arguments)
    assert all(row[: arguments["prefix"]] == [f] * arguments["prefix"] for f, row in enumerate(source))
    for f in range(1, len(source)):
        assert all(now in (before, f) for now, before in zip(source[f], source[f - 1], strict=True))
    active = [(f, s) for f, row in enumerate(source) for s, g in enumerate(row) if g == f]
    assert plan.computed == len(active) == int(plan.active.sum())


@some
@given(planned())
def test_what_is_not_computed_differs_by_no_more_than_the_threshold_from_its_source(arguments):
    plan = plan_reuse(**arguments)
    patches = brute_force_reuse.cut(*(arguments[name] for name in ("pixels", "grid", "patch")))
    for f, row in enumerate(plan.source[:, arguments["prefix"] :].tolist()):
        for p, g in enumerate(row):
            if g != f:
                change = plan.change[f, arguments["prefix"] + p]
                assert brute_force_reuse.apart(patches[f, p], patches[g, p]) == change <= plan.threshold


@some
@given(reuse_arguments(), st.data())
def test_a_budget_is_kept_exactly(arguments, data):
    budget = data.draw(budgets(arguments))
    assert plan_reuse(**arguments, budget=budget).computed == budget


@some
@given(reuse_arguments(), thresholds)
def test_without_a_budget_the_size_is_one_of_few_or_nothing_else_changed(arguments, tau_reuse):
    frames, places = len(arguments["pixels"]), places_of(arguments)
    allowed = brute_force_reuse.sizes(frames, places, arguments["prefix"])
    assert min(allowed) == fewest_of(arguments) and max(allowed) == frames * places
    plan = plan_reuse(**arguments, tau_reuse=tau_reuse)
    follows = torch.cat([plan.active[1:], torch.ones(1, places, dtype=torch.bool)])
    last_of_a_run = ~plan.active & follows
    assert len(allowed) <= 17 and (plan.computed in allowed or not plan.change[last_of_a_run].any())
    assert plan.active.all() or plan.change[plan.active].all(), "nothing is computed that has the pixels of its source"


@some
@given(planned())
def test_strides_do_not_matter_and_pixels_are_not_written_to(arguments):
    before = arguments["pixels"].clone()
    first = plan_reuse(**arguments)
    strided = arguments["pixels"].movedim(1, -1).contiguous().movedim(-1, 1)
    again = plan_reuse(**{**arguments, "pixels": strided})
    assert torch.equal(first.source, again.source) and torch.equal(arguments["pixels"], before)


# --- What does not matter -------------------------------------------------------------------------


@some
@given(planned(kinds=("whole numbers",)), st.permutations(range(3)))
def test_the_order_of_channels_does_not_matter(arguments, order):
    order = [channel for channel in order if channel < arguments["pixels"].shape[1]]
    other = plan_reuse(**{**arguments, "pixels": arguments["pixels"][:, order]})
    assert torch.equal(other.source, plan_reuse(**arguments).source)


@some
@given(planned(kinds=("whole numbers",)), st.integers(-8, 8))
def test_brightness_of_the_whole_video_does_not_matter(arguments, level):
    """Whole numbers, so that nothing is rounded; margins, which are not, belong to nobody but set the range."""
    arguments["pixels"] = arguments["pixels"].round()
    other = plan_reuse(**{**arguments, "pixels": arguments["pixels"] + level})
    assert torch.equal(other.source, plan_reuse(**arguments).source)


@some
@given(planned(), st.sampled_from([0.5, 2.0, 16.0]))
def test_contrast_scales_changes_noise_and_thresholds(arguments, factor):
    """A power of two, so that nothing is rounded."""
    plan = plan_reuse(**arguments)
    scaled = {**arguments, "pixels": arguments["pixels"] * factor}
    if "tau_reuse" in arguments:
        scaled["tau_reuse"] = arguments["tau_reuse"] * factor
    other = plan_reuse(**scaled)
    assert torch.equal(other.source, plan.source) and torch.equal(other.change, plan.change * factor)
    assert (other.noise, other.threshold) == (plan.noise * factor, plan.threshold * factor)


@some
@given(reuse_arguments(), thresholds)
def test_what_lies_beside_the_grid_belongs_to_nobody(arguments, tau_reuse):
    (rows, columns), (height, width) = arguments["grid"], arguments["patch"]
    plan = plan_reuse(**arguments, tau_reuse=tau_reuse)
    cropped = arguments["pixels"][:, :, : rows * height, : columns * width]
    other = plan_reuse(**{**arguments, "pixels": cropped}, tau_reuse=tau_reuse)
    assert torch.equal(other.source, plan.source)
    assert (other.noise, other.threshold) == (plan.noise, plan.threshold)


@some
@given(reuse_arguments(), thresholds, st.integers(1, 3))
def test_prefixes_are_active_in_every_frame_and_change_nothing_else(arguments, tau_reuse, prefix):
    """With a budget, since sizes and the share that is too much count them."""
    patches = plan_reuse(**{**arguments, "prefix": 0}, tau_reuse=tau_reuse)
    budget = patches.computed + prefix * len(arguments["pixels"])
    plan = plan_reuse(**{**arguments, "prefix": prefix}, budget=budget)
    alone = plan_reuse(**{**arguments, "prefix": 0}, budget=patches.computed)
    assert plan.active[:, :prefix].all() and plan.change[:, :prefix].isinf().all()
    assert torch.equal(plan.source[:, prefix:], alone.source) and torch.equal(plan.change[:, prefix:], alone.change)
    assert (plan.noise, plan.threshold) == (alone.noise, alone.threshold)


# --- Known answers --------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 2, 9])
@pytest.mark.parametrize("prefix", [0, 1])
def test_a_still_video_is_computed_once(frames, prefix):
    pixels = torch.randn(1, 3, 13, 11).expand(frames, -1, -1, -1)
    plan = plan_reuse(pixels, (3, 2), (4, 5), prefix=prefix, tau_reuse=0.0)
    assert plan.computed == 6 + prefix * frames and not plan.source[:, prefix:].any()
    assert (plan.noise, plan.threshold) == (0.0, 0.0)


@pytest.mark.parametrize("frames", [1, 2, 9])
def test_a_video_of_different_frames_is_computed_in_full(frames):
    pixels = torch.arange(frames).float()[:, None, None, None] + torch.rand(3, 12, 10)
    plan = plan_reuse(pixels, (3, 2), (4, 5), prefix=1, tau_reuse=0.5)
    assert plan.active.all() and plan.computed == frames * 7


def test_a_place_is_computed_where_it_changes_and_read_until_it_changes_again():
    plan = plan_of([[0, 5], [0, 5], [1, 5], [1, 5], [0, 5], [0, 5]], tau_reuse=0.03)
    assert plan.source.tolist() == [[0, 0], [0, 0], [2, 0], [2, 0], [4, 0], [4, 0]]
    assert plan.change.tolist() == [[math.inf] * 2, [0, 0], [1, 0], [0, 0], [1, 0], [0, 0]]


def test_the_threshold_itself_is_no_change():
    values = [[0.0], [0.25], [0.0], [0.25], [0.0]]
    assert plan_of(values, tau_reuse=0.25).computed == 1
    assert plan_of(values, tau_reuse=0.2499).computed == 5


def test_slow_drift_adds_up():
    """An eighth a frame, with a threshold of a quarter: every third frame is a new one, however slow it was."""
    values = [[f / 8, 0, 0, 0] for f in range(10)]
    plan = plan_of(values, tau_reuse=0.25)
    assert plan.source[:, 0].tolist() == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9]
    assert plan.change[:, 0].tolist() == [math.inf] + [0.125, 0.25, 0.375] * 3


def test_where_more_than_four_fifths_change_nothing_is_reused():
    """10 frames of 10 places: 8 that change in every frame make 82 active ones of 100, 7 make 73."""
    for changing, reused in ((8, False), (7, True)):
        values = [[float(f)] * changing + [0.0] * (10 - changing) for f in range(10)]
        plan = plan_of(values, tau_reuse=0.5)
        assert plan.active.all() != reused


def test_exactly_four_fifths_are_reused():
    """5 frames of 4 places: 4 of the first, 12 of 16 of the others."""
    values = [[float(f)] * 3 + [0.0] for f in range(5)]
    plan = plan_of(values, tau_reuse=0.5)
    assert plan.computed == 16 and plan.source[:, 3].tolist() == [0] * 5


def test_sizes_are_a_sixteenth_of_what_may_repeat_apart():
    """9 frames of 4 places: sizes from 4 in steps of 2. One place that changes once makes 5, so 6 are computed."""
    values = [[0.0, 0.0, 0.0, 0.0] for _ in range(9)]
    for f in range(4, 9):
        values[f][2] = 1.0
    values[8][1] = 0.25
    plan = plan_of(values, tau_reuse=0.5)
    assert plan.computed == 6
    assert plan.source[8].tolist() == [0, 8, 4, 0], "what fills it up is what changed by less than the threshold"


def test_what_did_not_change_at_all_fills_up_a_budget_and_no_size():
    """As above, but the small change is gone again in the last frame, the only one that may be taken."""
    values = [[0.0, 0.0, 0.0, 0.0] for _ in range(9)]
    for f in range(4, 9):
        values[f][2] = 1.0
    values[7][1] = 0.25
    plan = plan_of(values, tau_reuse=0.5)
    assert plan.computed == 5 and plan.source[8].tolist() == [0, 0, 4, 0]
    assert plan.change[:, 1].tolist() == [math.inf] + [0] * 6 + [0.25, 0]
    budget = plan_of(values, budget=8)  # 7 at a threshold of 0
    assert (budget.computed, budget.threshold) == (8, 0) and budget.source[8].tolist() == [8, 8, 4, 0]


def test_where_nothing_repeats_what_did_not_change_is_computed_too():
    values = [[float(f)] * 9 + [0.0] for f in range(10)]
    assert plan_of(values, tau_reuse=0.5).active.all()


def test_what_fills_up_is_the_most_changed_of_the_last_ones():
    """Only the last of a run can be taken: the big change of place 0 lies behind a small one."""
    values = [[0.0, 0.0, 0.0], [0.75, 0.0, 0.0], [0.25, 0.5, 0.125]]

    def computed(budget):
        plan = plan_of(values, budget=budget)
        return [tuple(place) for place in plan.active.nonzero().tolist() if place[0]], plan.threshold

    full = [computed(budget)[0] for budget in range(3, 10)]
    assert full[0] == []
    assert full[1] == [(1, 0)]
    # With a threshold between, place 0 starts anew in frame 1, and in frame 2 it differs from that by a half.
    assert full[2] == [(1, 0), (2, 0)]
    assert full[3] == [(1, 0), (2, 0), (2, 1)]
    assert full[6] == [(f, s) for f in (1, 2) for s in range(3)]


@pytest.mark.parametrize("budget", [3, 4, 7, 11, 12])
def test_ties_go_to_the_lower_place_then_to_the_later_frame(budget):
    plan = plan_of([[1.0, 2.0, 3.0]] * 4, budget=budget)
    order = [(f, s) for s in range(3) for f in (3, 2, 1)]
    expected = sorted([*((0, s) for s in range(3)), *order[: budget - 3]])
    assert [tuple(place) for place in plan.active.nonzero().tolist()] == expected


def test_ties_of_a_place_with_several_runs_go_to_the_later_frame():
    plan = plan_of([[0.0], [0.0], [1.0], [1.0], [2.0], [2.0]], budget=4)
    assert plan.source.flatten().tolist() == [0, 0, 2, 2, 4, 5]


def test_a_budget_finds_the_threshold_between_large_changes_and_small_ones():
    values = [[0.0] * 4] + [[0.01 * s * f for s in range(3)] + [float(f % 2)] for f in range(1, 9)]
    plan = plan_of(values, budget=4 + 8)
    assert plan.source[:, 3].tolist() == list(range(9))
    assert not plan.source[:, :3].any() and 0.16 <= plan.threshold < 1.0


# --- Budgets and bad input ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "places", "ratio", "budget"),
    [(8, 729, 0.5, 2916), (8, 729, 0.1, 729), (1, 5, 1.0, 5), (4, 5, 0.46, 9), (2, 5, 0.55, 6), (3, 3, 1.0, 9)],
)
def test_the_budget_of_a_ratio(frames, places, ratio, budget):
    assert reuse_budget(frames, places, ratio) == budget


@pytest.mark.parametrize(("ratio", "budget"), [(0.1, 730 + 7), (0.126, 737), (0.127, 742), (0.5, 2920), (1.0, 5840)])
def test_a_budget_holds_the_prefixes_of_every_frame(ratio, budget):
    assert reuse_budget(8, 730, ratio, prefix=1) == budget


def test_a_budget_of_the_fewest_is_each_patch_once_and_its_prefixes_in_every_frame():
    arguments = {"pixels": torch.randn(4, 1, 4, 4), "grid": (2, 2), "patch": (2, 2), "prefix": 2}
    plan = plan_reuse(**arguments, budget=reuse_budget(4, 6, 0.01, prefix=2))
    assert plan.computed == 12 and not plan.source[:, 2:].any()


PIXELS = torch.zeros(2, 3, 8, 8)
BAD_INPUT = {
    "no frames": ({"pixels": torch.zeros(0, 3, 8, 8)}, "pixels has shape"),
    "two videos": ({"pixels": torch.zeros(2, 2, 3, 8, 8)}, "of one video"),
    "whole numbers": ({"pixels": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, "uint8"),
    "NaN": ({"pixels": PIXELS / 0}, "NaN or inf"),
    "grid too large": ({"grid": (2, 3)}, "needs 8 x 12 pixels"),
    "no grid": ({"grid": (0, 2)}, "grid="),
    "one side": ({"patch": (4,)}, "patch="),
    "negative prefix": ({"prefix": -1}, "prefix=-1"),
    "negative tau": ({"tau_reuse": -0.1}, "tau_reuse=-0.1"),
    "NaN tau": ({"tau_reuse": math.nan}, "tau_reuse=nan"),
    "tau that is none": ({"tau_reuse": True}, "tau_reuse=True"),
    "budget below a frame": ({"budget": 3}, "budget=3.* from 4 to 8"),
    "budget without the prefix of every frame": ({"prefix": 1, "budget": 5}, "budget=5.* from 6 to 10"),
    "budget above all": ({"budget": 9}, "budget=9.* from 4 to 8"),
    "budget in parts": ({"budget": 4.0}, "budget=4.0"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_an_error(name):
    changes, message = BAD_INPUT[name]
    with pytest.raises(EarlyTomConfigError, match=message):
        plan_reuse(**{"pixels": PIXELS, "grid": (2, 2), "patch": (4, 4), **changes})


@pytest.mark.parametrize(
    "bad",
    [(0, 4, 0.5), (2, 0, 0.5), (2, 4, 0.0), (2, 4, 1.1), (2, 4, math.nan), (2, 4, 0.5, 4), (2, 4, 0.5, -1)],
)
def test_bad_ratios_are_errors(bad):
    with pytest.raises(EarlyTomConfigError, match="must be"):
        reuse_budget(*bad)


def test_it_is_part_of_the_reference():
    assert reference.plan_reuse is plan_reuse and "plan_reuse" in reference.__all__
