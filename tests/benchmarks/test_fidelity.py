"""Features of cheaper encoders beside the full one's: cost and cosine against layers in a loop, and by hand."""

import numpy as np
import pytest
import torch
from effort import examples
from generating import trace_of_video_rows
from hypothesis import given
from hypothesis import strategies as st
from oracle_reuse import ReusingEncoder
from scenes import standing_camera, video
from shared_towers import share_towers
from transformers import Dinov2Config, Dinov2Model

from earlytom_compile.benchmarks.fidelity import (
    MERGING,
    REUSING,
    Row,
    Tower,
    arms,
    compiled,
    cost_at,
    equal_fidelity,
    full_features,
    measure,
)
from earlytom_compile.reference import plan_frame_merge

LAYERS, PATCH, SIZE = 5, 4, 24
PATCHES = (SIZE // PATCH) ** 2


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    module = Dinov2Model(Dinov2Config(**sizes, image_size=SIZE, patch_size=PATCH, layerscale_value=0.7)).eval()
    for parameter in module.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return Tower("tiny", module, LAYERS)


@pytest.fixture(scope="module")
def one_trace():
    return trace_of_video_rows()


@pytest.fixture
def measured(tower, one_trace, monkeypatch):
    share_towers(one_trace, monkeypatch)
    encoders = {}

    def measured(pixels, arm):
        if arm.key not in encoders:
            encoders[arm.key] = compiled(tower, arm)
        return measure(tower, encoders[arm.key], "clip", pixels, full_features(tower, pixels, 3), arm)

    return measured


@torch.no_grad()
def plain(tower, pixels):
    return tower.module(pixels).last_hidden_state


def numbers(ours, full):
    """(mean, 5th percentile, worst frame) of the cosines of [F, S, D], in NumPy and in double precision."""
    a, b = ours.double().numpy(), full.double().numpy()
    cosines = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return cosines.mean(), np.quantile(cosines, 0.05), cosines.mean(1).min()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def layer_output(output):
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def merged_in_a_loop(tower, pixels, merge_layers, tau_seg):
    """(features [F, S, D] of what stands for each frame, frames that went through all layers together)."""
    hidden, stands_for, work = tower.module.embeddings(pixels), list(range(len(pixels))), 0
    for index, layer in enumerate(tower.module.encoder.layer):
        work += len(hidden)
        hidden = layer_output(layer(hidden))
        if index in merge_layers:
            plan = plan_frame_merge(hidden, variant="paper", tau_seg=tau_seg)
            hidden = plan.apply(hidden)
            stands_for = [plan.weights[:, old].nonzero().item() for old in stands_for]
    return tower.module.layernorm(hidden)[stands_for], work


def test_a_merged_frame_stands_for_each_of_its_frames(tower, measured):
    pixels = video(12, SIZE, scenes=2, generator=seeded(0))
    (arm,) = arms((0.3,), (), (), ())
    got = measured(pixels, arm)
    # (6, 21, 23) of 26 layers, scaled to 5: behind the first, the fourth.
    hidden, work = merged_in_a_loop(tower, pixels, (0, 3), 0.3)
    assert got.cost == pytest.approx(work / (12 * LAYERS)) and got.cost < 0.95
    expected = numbers(hidden, plain(tower, pixels))
    assert (got.cosine, got.low, got.worst_frame) == pytest.approx(expected, abs=1e-5) and got.cosine < 0.999
    assert got.key == ("clip", MERGING, "tau_seg 0.3", ())


@pytest.mark.parametrize("full_layers", [(), (4,), (1, 3)])
def test_reuse_by_a_threshold(tower, measured, full_layers):
    places = 6 * (1 + PATCHES)
    for changing in (0.1, 0.4):
        pixels = standing_camera(6, SIZE, patch=PATCH, changing=changing, generator=seeded(1))
        (arm,) = arms((), (0.1,), (), (full_layers,))
        got = measured(pixels, arm)
        oracle = ReusingEncoder(tower.module.encoder.layer, pixels, PATCH, tau_reuse=0.1, full_layers=full_layers)
        with oracle.hooked():
            hidden = plain(tower, pixels)
        own = sum(int(oracle.plan.source[frame][place]) == frame for frame, place in np.ndindex(6, 1 + PATCHES))
        in_full = len(full_layers)
        assert got.cost == pytest.approx((in_full * places + (LAYERS - in_full) * own) / (LAYERS * places))
        expected = numbers(hidden, plain(tower, pixels))
        assert (got.cosine, got.low, got.worst_frame) == pytest.approx(expected, abs=1e-5)
        assert got.cost < 0.9 and got.cosine < 0.9999


def test_a_budget_is_what_it_costs(measured):
    pixels = standing_camera(8, SIZE, patch=PATCH, changing=0.6, generator=seeded(2))
    (arm,) = arms((), (), (0.5,), ((4,),))
    got = measured(pixels, arm)
    share = round(0.5 * 8 * (1 + PATCHES)) / (8 * (1 + PATCHES))
    assert got.cost == pytest.approx((1 + 4 * share) / 5)
    assert got.key == ("clip", REUSING, "encode_ratio 0.5", (4,))


def test_a_still_video_costs_one_frame_and_one_where_everything_changes_all_of_them(measured):
    still, moving = (
        standing_camera(6, SIZE, patch=PATCH, changing=changing, generator=seeded(3)) for changing in (0.0, 1.0)
    )
    share = (PATCHES + 6) / (6 * (1 + PATCHES))  # the class token is in every frame
    for full_layers in ((), (4,)):
        (arm,) = arms((), (0.1,), (), (full_layers,))
        got = [measured(still, arm), measured(moving, arm)]
        # A layer in full computes the frame that the others repeat.
        in_full = len(full_layers)
        assert got[0].cost == pytest.approx((in_full / 6 + (LAYERS - in_full) * share) / LAYERS) and got[1].cost == 1
        for each in got:
            assert (each.cosine, each.low, each.worst_frame) == pytest.approx((1, 1, 1), abs=1e-5)


def test_features_do_not_depend_on_how_many_frames_go_at_once(tower):
    pixels = video(7, SIZE, generator=seeded(5))
    torch.testing.assert_close(full_features(tower, pixels, 3), plain(tower, pixels), atol=1e-5, rtol=1e-4)


def test_arms_in_order():
    found = [arm.key for arm in arms((0.6, 0.8), (0.1,), (0.5,), ((4,), ()))]
    assert found == [
        (MERGING, "tau_seg 0.6", ()),
        (MERGING, "tau_seg 0.8", ()),
        (REUSING, "tau_reuse 0.1", (4,)),
        (REUSING, "encode_ratio 0.5", (4,)),
        (REUSING, "tau_reuse 0.1", ()),
        (REUSING, "encode_ratio 0.5", ()),
    ]


@pytest.mark.parametrize(
    "points, cosine, expected",
    [
        ([(0.4, 0.96), (0.5, 0.98)], 0.97, (0.45, False)),
        ([(0.5, 0.98), (0.4, 0.96)], 0.96, (0.4, False)),
        ([(0.4, 0.96), (0.5, 0.98)], 0.95, (0.4, True)),
        ([(0.4, 0.96), (0.6, 0.98)], 0.99, (0.8, False)),  # half way to the full encoder
        ([(0.4, 0.96), (0.5, 0.95), (0.6, 0.98)], 0.97, (0.5, False)),  # a dearer point that is worse is none
        ([(1.0, 1.0)], 0.9, (1.0, True)),  # it was left alone
        ([], 1.0, (1.0, False)),
        ([(0.4, 0.96)], 1.0, (1.0, False)),
    ],
)
def test_cost_where_lines_through_the_points_reach_a_cosine(points, cosine, expected):
    found = cost_at(points, cosine)
    assert found == (pytest.approx(expected[0]), expected[1])


@examples(100)
@given(
    st.lists(st.tuples(st.floats(0.05, 0.99), st.floats(0.5, 0.999)), min_size=1, max_size=6),
    st.floats(0.4, 1.0),
    st.floats(0.0, 0.5),
)
def test_more_fidelity_never_costs_less_and_no_point_that_is_as_good_is_cheaper(points, cosine, more):
    cost, _ = cost_at(points, cosine)
    assert min(cost for cost, _ in points) <= cost <= 1
    assert cost_at(points, min(1.0, cosine + more))[0] >= cost - 1e-9
    for measured_cost, measured_cosine in points:
        if measured_cosine >= cosine:
            assert cost <= measured_cost + 1e-9


def row(clip, method, setting, layers, cost, cosine):
    return Row(clip, method, setting, layers, cost, cosine, cosine - 0.1, cosine - 0.2)


def test_equal_fidelity_compares_within_a_video_and_a_set_of_layers():
    rows = [
        row("a", MERGING, "tau_seg 0.6", (), 0.8, 0.97),
        row("b", MERGING, "tau_seg 0.6", (), 0.6, 0.99),
        row("a", REUSING, "tau_reuse 0.1", (4,), 0.3, 0.96),
        row("a", REUSING, "tau_reuse 0.05", (4,), 0.5, 0.98),
        row("a", REUSING, "encode_ratio 0.2", (4,), 0.2, 0.99),  # no part of it
        row("b", REUSING, "tau_reuse 0.1", (4,), 0.4, 0.995),
        row("a", REUSING, "tau_reuse 0.1", (), 0.2, 0.95),
        row("a", REUSING, "tau_reuse 0.05", (), 0.4, 0.97),
    ]
    found = [(each.clip, each.full_layers, each.merging, each.reusing, each.at_most) for each in equal_fidelity(rows)]
    assert found == [
        ("a", (4,), 0.8, pytest.approx(0.4), False),
        ("a", (), 0.8, pytest.approx(0.4), False),
        ("b", (4,), 0.6, pytest.approx(0.4), True),
    ]
    assert [each.ratio for each in equal_fidelity(rows)] == pytest.approx([0.5, 0.5, 2 / 3])
