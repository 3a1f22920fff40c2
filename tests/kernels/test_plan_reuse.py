import math
from dataclasses import dataclass, replace

import numpy as np
import plain_python
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import active_places, clip, laid_out, layouts, native_dtypes, operator_settings, ops
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext


@dataclass(frozen=True)
class Call:
    """Arguments of the operator; ``pixels`` [V, F, C, H, W]."""

    pixels: torch.Tensor
    grid: list[int]
    patch: list[int]
    prefix: int
    tau: float
    budget: int

    def plan(self, run=ops.plan_reuse):
        return run(self.pixels, self.grid, self.patch, self.prefix, self.tau, self.budget)

    @property
    def places(self):
        return self.prefix + math.prod(self.grid)

    @property
    def fewest(self):
        return self.places + (self.pixels.shape[1] - 1) * self.prefix

    @property
    def every(self):
        return self.pixels.shape[1] * self.places

    def of(self, video):
        """The same of one video alone."""
        return replace(self, pixels=self.pixels[video])


@st.composite
def calls(draw, dtype=native_dtypes, side=4):
    """Odd grids, patches and margins, at most ``side`` of each; budgets from one frame to all of them, and none."""
    grid, patch = ([draw(st.integers(1, side)), draw(st.integers(1, side))] for _ in range(2))
    margin = [draw(st.integers(0, 3)), draw(st.integers(0, 3))]
    prefix = draw(st.sampled_from([0, 0, 1, 5]))
    videos, frames = draw(st.integers(1, side - 1)), draw(st.integers(1, 2 * side - 2))
    channels = draw(st.integers(1, 3))
    height, width = (grid[i] * patch[i] + margin[i] for i in range(2))
    seed, steps = draw(st.integers(0, 2**31)), draw(st.sampled_from([0, 2, 16]))
    pixels = torch.stack([clip(seed + v, frames, channels, height, width, steps) for v in range(videos)])
    call = Call(pixels.to(draw(dtype)), grid, patch, prefix, draw(st.sampled_from([0.0, 0.03, 0.125, 0.5])), 0)
    return replace(call, budget=draw(st.one_of(st.just(0), st.integers(call.fewest, call.every))))


def assert_plans_equal(one, other):
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@operator_settings
@given(call=calls(), layout=layouts)
def test_is_the_plan_of_the_definition(call, layout):
    laid = replace(call, pixels=laid_out(call.pixels, layout))
    source, change, computed, measured = laid.plan()
    assert [x.dtype for x in (source, change, computed, measured)] == [
        torch.int64, torch.float32, torch.int64, torch.float32
    ]  # fmt: skip
    assert all(x.is_contiguous() for x in (source, change, computed, measured))
    for v, pixels in enumerate(call.pixels.float().numpy()):
        expected = plain_python.plan_reuse(pixels, call.grid, call.patch, call.prefix, call.tau, call.budget)
        assert source[v].tolist() == expected[0]
        assert change[v].tolist() == expected[1]
        assert computed[v] == len(plain_python.active_places(expected[0]))
        assert measured[v].tolist() == [float(expected[2]), float(expected[3])]


@operator_settings
@given(call=calls())
def test_a_video_has_the_plan_it_has_alone(call):
    together = call.plan()
    for v in range(len(call.pixels)):
        assert_plans_equal(call.of(v).plan(), [part[v : v + 1] for part in together])
    assert_plans_equal(replace(call, pixels=call.pixels.flip(0)).plan(), [part.flip(0) for part in together])


@operator_settings
@given(call=calls())
def test_what_is_not_computed_reads_what_was_and_differs_by_at_most_the_threshold(call):
    source, change, computed, measured = call.plan()
    frames = source.shape[1]
    frame = torch.arange(frames)[:, None]
    assert (source[:, 0] == 0).all() and change[:, 0].isinf().all()
    assert (source == frame)[..., : call.prefix].all() and change[..., : call.prefix].isinf().all()
    assert ((source[:, 1:] == source[:, :-1]) | (source[:, 1:] == frame[1:])).all()
    active = source == frame
    assert torch.equal(active.flatten(1).sum(1), computed)
    assert (change <= measured[:, 1, None, None])[~active].all()
    if call.budget:
        assert (computed == call.budget).all()
    else:
        step = math.ceil((call.every - call.fewest) / 16)
        sizes = {min(call.fewest + i * step, call.every) for i in range(17)}
        for v, total in enumerate(computed.tolist()):
            assert total in sizes or nothing_else_changed(source[v], change[v])


def nothing_else_changed(source, change):
    """Whether the place that would be taken next, the last of a run, is equal to its source in all runs."""
    frames = len(source)
    return all(
        change[f, s] == 0
        for f, s in (source != torch.arange(frames)[:, None]).nonzero().tolist()
        if f + 1 == frames or source[f + 1, s] == f + 1
    )


@operator_settings
@given(call=calls())
def test_without_a_budget_what_has_not_changed_at_all_is_not_computed_again(call):
    """Unless all places are."""
    source, change, computed, _ = replace(call, budget=0).plan()
    active = source == torch.arange(source.shape[1])[:, None]
    for v, total in enumerate(computed.tolist()):
        assert total == call.every or (change[v][active[v]] > 0).all()


@operator_settings
@given(call=calls(), share=st.floats(0, 1))
def test_a_larger_budget_with_the_same_threshold_computes_more_of_the_same(call, share):
    """Filling up goes on where it would have stopped."""
    frames = call.pixels.shape[1]
    budget = call.fewest + int(share * (call.every - call.fewest))
    small, large = (replace(call.of(0), budget=b).plan() for b in (budget, min(budget + 1, call.every)))
    if torch.equal(small[3], large[3]):
        frame = torch.arange(frames)[:, None]
        assert ((large[0] == frame) | (small[0] != frame)).all()


def planned(pixels, grid=(2, 2), patch=(4, 4), prefix=0, tau=0.0, budget=0):
    return ops.plan_reuse(pixels, list(grid), list(patch), prefix, tau, budget)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("frames", [1, 2, 7])
def test_a_still_video_is_one_frame(frames, prefix):
    pixels = torch.randn(1, 3, 9, 10).expand(frames, 3, 9, 10)
    source, change, computed, measured = planned(pixels, prefix=prefix)
    assert (source[..., prefix:] == 0).all() and (change[:, 1:, prefix:] == 0).all()
    assert torch.equal(source[..., :prefix], torch.arange(frames)[None, :, None].expand(1, frames, prefix))
    assert change[..., :prefix].isinf().all()
    assert computed.tolist() == [frames * prefix + 4] and measured.tolist() == [[0, 0]]


@pytest.mark.parametrize("budget", [0, 5 * 7])
def test_where_everything_changes_everything_is_computed(budget):
    pixels = torch.randn(3, 9, 10) + torch.arange(7)[:, None, None, None]
    source, _, computed, _ = planned(pixels, prefix=1, budget=budget)
    assert torch.equal(source, torch.arange(7)[None, :, None].expand(1, 7, 5)) and computed.tolist() == [35]


def test_more_than_four_fifths_active_is_everything_and_four_fifths_is_not():
    """Ten places in two frames: 16 of 20 are four fifths."""
    pixels = torch.zeros(2, 1, 1, 10)
    for changing, total in ((6, 16), (7, 20)):
        pixels[1, ..., :changing] = 1
        assert planned(pixels, (1, 10), (1, 1))[2].tolist() == [total]


def test_slow_drift_adds_up_to_a_change():
    """Compared is with the frame of the last computation, not with the one before."""
    pixels = torch.arange(9).float()[:, None, None, None].expand(9, 1, 8, 8) / 8
    source, change, _, _ = planned(pixels, tau=0.25)
    assert source[0, :, 0].tolist() == [0, 0, 0, 3, 3, 3, 6, 6, 6]
    assert change[0, 1:, 0].tolist() == [0.125, 0.25, 0.375] * 2 + [0.125, 0.25]


def test_a_change_of_exactly_the_threshold_is_none():
    pixels = torch.zeros(2, 1, 2, 4)
    pixels[1, 0, :, 2:] = 0.5
    just_below = float(np.nextafter(np.float32(0.5), np.float32(0)))
    assert planned(pixels, (1, 2), (2, 2), tau=0.5)[0].tolist() == [[[0, 0], [0, 0]]]
    assert planned(pixels, (1, 2), (2, 2), tau=just_below)[0].tolist() == [[[0, 0], [0, 1]]]


def test_what_lies_beside_the_grid_belongs_to_no_place():
    pixels = torch.zeros(3, 2, 9, 11)
    pixels[1, :, 8:], pixels[2, :, :, 8:] = 1, 2
    assert planned(pixels, prefix=1)[2].tolist() == [3 + 4]


def test_a_change_of_one_quarter_counts_in_full():
    pixels = torch.zeros(2, 2, 5, 7)
    pixels[1, 1, 2:, 3:] = 0.5  # rows 2 to 4 and columns 3 to 6 are a quarter of 5 x 7
    assert planned(pixels, (1, 1), (5, 7), tau=0.5)[1][0, 1].tolist() == [0.5]
    pixels[1, 1, 2, 3] = -11 * 0.5
    assert planned(pixels, (1, 1), (5, 7))[1][0, 1].tolist() == [np.float32(11 / 70 / 3)], "their mean is 0"


def test_what_moves_inside_a_quarter_counts_a_third():
    """Text that scrolls: columns of 1 and -1 change places, and no mean changes."""
    stripes = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 8, 8)
    pixels = torch.stack([stripes, -stripes])
    source, change, _, _ = planned(pixels, tau=0.5)
    assert source[0, 1].tolist() == [1] * 4
    assert change[0, 1].tolist() == [np.float32(2 / 3)] * 4


def test_a_side_of_one_pixel_is_not_cut():
    pixels = torch.zeros(2, 1, 1, 4)
    pixels[1] = torch.tensor([0.5, 0, 0, 0])
    assert planned(pixels, (1, 1), (1, 4))[1][0, 1].tolist() == [0.25]
    assert planned(pixels.transpose(2, 3), (1, 1), (4, 1))[1][0, 1].tolist() == [0.25]
    assert planned(pixels, (1, 4), (1, 1))[1][0, 1].tolist() == [0.5, 0, 0, 0]


def noisy(sigma, size=112, seed=0):
    """Six frames of one picture."""
    generator = torch.Generator().manual_seed(seed)
    scene = torch.randn(1, 3, size, size, generator=generator).expand(6, 3, size, size)
    return scene + sigma * torch.randn(6, 3, size, size, generator=generator)


@pytest.mark.parametrize("sigma", [0.05, 0.3])
def test_white_noise_is_measured_and_does_not_count(sigma):
    """The difference of two frames has the standard deviation sigma sqrt(2), of which the mean size is 2 sigma /
    sqrt(pi); so has (a - b - c + d) / 2 of four of them. Means of 49 pixels have a seventh of it."""
    tau = 0.1 * sigma
    source, _, _, measured = planned(noisy(sigma), (8, 8), (14, 14), tau=tau)
    noise, threshold = measured[0].tolist()
    assert noise == pytest.approx(2 * sigma / math.sqrt(math.pi), rel=0.01)
    assert threshold == pytest.approx(math.hypot(tau, 4 * math.sqrt(2) * sigma / 7), rel=0.01)
    assert (source[0, 1:] == 0).all()


@pytest.mark.parametrize("patch, share", [((26, 24), 4 * math.sqrt(math.pi / 312)), ((26, 26), 0.4), ((56, 56), 0.4)])
def test_in_large_patches_the_noise_of_their_pixels_counts(patch, share):
    """A third of their mean absolute difference, which large quarters do not make smaller as they do means."""
    generator = torch.Generator().manual_seed(1)
    scene = torch.randn(1, 1, 112, 112, generator=generator).expand(4, -1, -1, -1)
    pixels = scene + 0.2 * torch.randn(4, 1, 112, 112, generator=generator)
    source, change, _, measured = planned(pixels, patch=patch)
    noise, threshold = measured[0].tolist()
    assert noise > 0.2 and threshold == pytest.approx(share * noise, rel=1e-6)
    assert (source == 0).all() and change[0, 1:].min() > 0.3 * noise


def test_filling_up_ends_where_nothing_changed():
    """Sizes of 5 frames of 8 places: 8 and steps of 2. One place is active in frame 2; others differ from their sources
    by less than the threshold: one in the last frame, one in the middle, where places of a run are never taken."""
    pixels = torch.zeros(5, 1, 1, 8)
    pixels[2:, ..., 0] = 1
    for changed, total in (((3, 5), 9), ((4, 5), 10)):
        other = pixels.clone()
        other[changed[0], ..., changed[1]] = 0.125
        source, _, computed, _ = planned(other, (1, 8), (1, 1), tau=0.25)
        active = plain_python.active_places(source[0].tolist())
        expected = {(2, 0), changed} if total == 10 else {(2, 0)}
        assert computed.tolist() == [total] and set(active) == {(0, s) for s in range(8)} | expected
        assert planned(other, (1, 8), (1, 1), budget=10)[2].tolist() == [10], "a budget is kept whatever changed"


def test_noise_as_loud_as_the_picture_is_none():
    """Of noise alone, nu is 2 / sqrt(pi) of the standard deviation; with a picture of the same it is 0.8 of both's."""
    assert planned(noisy(0.4), (8, 8), (14, 14))[3][0, 0] > 0.4  # nu 0.45 of 1.08
    assert planned(noisy(1.0), (8, 8), (14, 14), tau=0.25)[3].tolist() == [[0, 0.25]]


@pytest.mark.parametrize("other, noise", [(1.0, 0.5), (0.999, 0.0)])
def test_noise_of_exactly_half_the_standard_deviation_is_noise(other, noise):
    """Three pairs of patches, each the negative of the other, of pixels that are 1 and -1 in one channel."""
    channel = torch.tensor([[[1.0, 1, -1, -1], [-1, 1, -1, -1]], [[other, other, -other, -other]] * 2]).transpose(0, 1)
    patch = channel.view(2, 2, 2, 2)  # one of eight pixels changes by 2
    pixels = torch.cat([patch, -patch] * 3, 3) + 0.375
    assert planned(pixels, (1, 6), (2, 2))[3][0, 0] == noise


def test_light_that_changes_is_no_noise():
    ramp = torch.arange(64.0).view(1, 8, 8) / 64
    pixels = torch.stack([ramp * (f + 1) / 4 + f / 8 for f in range(4)])[:, None].squeeze(2)
    _, _, _, measured = planned(pixels)
    assert measured[0, 0] == 0


@pytest.mark.parametrize("patch", [(1, 4), (4, 1), (1, 1)])
def test_patches_without_a_block_of_four_pixels_measure_no_noise(patch):
    pixels = torch.randn(3, 2, 8, 8)
    assert planned(pixels, patch=patch)[3][0, 0] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("budget", [0, 4 + 5])
def test_what_is_not_finite_counts_as_changed(value, budget):
    pixels = torch.zeros(6, 1, 8, 8)
    pixels[2:4, 0, 5, 1] = value  # of place 2
    source, change, computed, _ = planned(pixels, tau=1e30, budget=budget)
    active = source[0] == torch.arange(6)[:, None]
    assert active[2:5, 2].all(), "also in the frame behind"
    assert not change[0, 2:5, 2].isfinite().any()
    assert computed.tolist() == [active.sum()]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_range_of_thresholds_is_that_of_the_finite_pixels(value):
    pixels = clip(2, 6, 1, 8, 8)
    pixels[2, 0, 5, 1] = value
    _, _, computed, measured = planned(pixels, budget=14)
    assert computed.tolist() == [14] and 0 < measured[0, 1] < pixels.nan_to_num(0, 0, 0).abs().max() * 2


def test_a_budget_that_what_is_not_finite_does_not_fit_is_refused():
    pixels = torch.zeros(3, 1, 8, 8)
    pixels[1] = float("nan")
    assert planned(pixels, budget=12)[2].tolist() == [12]
    with pytest.raises(ValueError, match=r"budget=11.*\[12\] active places.*without NaN"):
        planned(pixels, budget=11)


def test_the_whole_range_of_float32_can_be_compared():
    pixels = torch.full((2, 1, 8, 8), 3e38)
    pixels[1, :, :4, :4] = -3e38
    source, _, _, _ = planned(pixels, budget=5)
    assert source[0, 1].tolist() == [1, 0, 0, 0]


def test_of_equal_changes_the_lower_place_is_taken_and_of_it_the_later():
    """Nothing changes: all that is filled up is a tie."""
    pixels = torch.zeros(4, 1, 8, 8)
    source, _, _, _ = planned(pixels, budget=4 + 4)
    assert source[0].T.tolist() == [[0, 1, 2, 3], [0, 0, 0, 3], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_the_last_of_a_run_is_taken_before_larger_changes_inside_it():
    # Each place one pixel, frame by frame. A pixel beside the grid makes the range so wide that the threshold, at least
    # a 4096th of it, is above all changes: all places but the first frame's are filled up.
    light = torch.tensor([[0, 0.75, 0.25], [0, 0.5, 0.5], [0, 0.375, 0.125], [40960, 0, 0]])
    pixels = light.T[:, None, None, :]
    taken = [(2, 1), (1, 1), (2, 0), (1, 0), (2, 2)]  # 0.5, 0.5, 0.25, then 0.75 that waited for it, 0.125
    for number in range(len(taken)):
        source, change, _, measured = planned(pixels, (1, 3), (1, 1), budget=3 + number)
        assert measured[0, 1] == 10 and change[0, 1:].tolist() == [[0.75, 0.5, 0.375], [0.25, 0.5, 0.125]]
        active = plain_python.active_places(source[0].tolist())
        assert sorted(active) == sorted([(0, 0), (0, 1), (0, 2), *taken[:number]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_has_the_same_bits_in_20_runs(dtype):
    pixels = torch.stack([clip(v, 6, 3, 70, 70) for v in range(2)]).to(dtype)
    for budget in (0, 60):
        expected = planned(pixels, (5, 5), (14, 14), 1, 0.03, budget)
        for _ in range(20):
            assert_plans_equal(planned(pixels, (5, 5), (14, 14), 1, 0.03, budget), expected)


def test_what_was_compared_at_other_thresholds_changes_no_plan():
    """Halving takes differences from the scans at both ends; one that starts from nothing finds the same."""
    from earlytom_compile.kernels import plan_reuse

    for seed in range(5):
        video = plan_reuse._Video(clip(seed, 7, 2, 12, 12, steps=8), [3, 3], [4, 4], 2)
        known = [video.scan(torch.tensor(tau)) for tau in (0.0, 0.4)]
        for tau in (0.05, 0.2, 0.7):
            fresh, helped = video.scan(torch.tensor(tau)), video.scan(torch.tensor(tau), known)
            assert torch.equal(fresh.source, helped.source) and torch.equal(fresh.change, helped.change)


def test_frames_may_have_a_symbolic_number():
    environment = ShapeEnv()
    with FakeTensorMode(shape_env=environment) as mode:
        dynamic = [DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * 3]
        context = StatelessSymbolicContext(dynamic_sizes=dynamic)
        pixels = mode.from_tensor(torch.empty(8, 3, 9, 10), symbolic_context=context)
        source, change, computed, measured = planned(pixels, prefix=1)
        assert not environment.guards
        assert source.shape[1] is not None and str(source.shape[1]) == str(pixels.shape[0])
        assert (source.shape[2], change.shape[0]) == (5, 1) and computed.shape == (1,) and measured.shape == (1, 2)


def test_counts_places_as_the_plan_says_on_a_real_grid():
    """27 x 27 patches of 14 pixels in 384: a strip of 6 pixels is left over."""
    pixels = clip(3, 4, 3, 384, 384)
    source, _, computed, _ = planned(pixels, (27, 27), (14, 14), tau=0.03)
    assert source.shape == (1, 4, 729) and active_places(source) == computed


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"pixels": torch.ones(2, 3, 8)}, "float32 with 3 axes"),
        ({"pixels": torch.ones(2, 3, 8, 8, dtype=torch.uint8)}, "uint8"),
        ({"pixels": torch.ones(2, 3, 7, 8)}, r"needs 8 x 8, pixels are \[2, 3, 7, 8\]"),
        ({"pixels": torch.ones(0, 3, 8, 8)}, "empty axes"),
        ({"grid": [2, 2, 1]}, r"grid=\[2, 2, 1\]"),
        ({"patch": [4]}, r"patch=\[4\]"),
        ({"grid": [0, 2]}, r"\[0, 2\] patches"),
        ({"patch": [4, -4]}, r"\[4, -4\] pixels"),
        ({"prefix": -1}, "prefix=-1"),
        ({"tau": -0.1}, "tau=-0.1"),
        ({"tau": math.nan}, "tau=nan"),
        ({"tau": math.inf}, "tau=inf"),
        ({"budget": 3}, "budget=3; 2 frames of 4 places.* from 4, .* to 8"),
        ({"prefix": 2, "budget": 7}, "budget=7; 2 frames of 6 places, 2 of them leading, .* from 8, .* to 12"),
        ({"budget": 9}, "budget=9"),
        ({"budget": -4}, "budget=-4"),
    ],
)
def test_refuses_what_means_nothing(changes, says):
    arguments = {"pixels": torch.ones(2, 3, 8, 8), "grid": [2, 2], "patch": [4, 4], "prefix": 0, "tau": 0.0}
    arguments |= {"budget": 0} | changes
    with pytest.raises(ValueError, match=f"plan_reuse.*{says}"):
        ops.plan_reuse(*arguments.values())
