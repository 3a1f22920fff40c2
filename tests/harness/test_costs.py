"""The numbers beside accuracy, by hand."""

import pytest

from earlytom_compile.integrations.lmms_eval.costs import Costs, Shown


def test_means_over_questions_and_calls():
    costs = Costs(0.1)
    costs.add(seconds=2.0, rows=2, shown=[Shown(32, 16, 6272, 627), Shown(32, 32, 6272, 627)])
    costs.add(seconds=1.0, rows=1, shown=[Shown(16, 8, 3136, 314)])
    costs.add(seconds=50.0, rows=1, shown=[])  # no video, and no part in what videos cost
    assert costs.means() == pytest.approx(
        {
            "retain_ratio": 0.1,
            "ttft_ms": (2000 + 2000 + 1000) / 3,
            "video_frames": 80 / 3,
            "stage1_retention": 56 / 80,
            "video_tokens": (2 * 6272 + 3136) / 3,
            "video_tokens_kept": (2 * 627 + 314) / 3,
            "frames_per_second": 80 / 3.0,  # a call of two rows takes its time once
        }
    )


def test_the_share_of_patches_is_that_of_all_frames():
    costs = Costs(0.1)
    costs.add(seconds=1.0, rows=2, shown=[Shown(32, 32, 6272, 627, encoded=10.0), Shown(8, 8, 1568, 157, encoded=8.0)])
    assert costs.means()["patches_computed"] == 18 / 40
    costs.add(seconds=1.0, rows=1, shown=[Shown(20, 20, 3920, 3920)])  # ran uncompressed: all of its patches
    assert costs.means()["patches_computed"] == 38 / 60


def test_nothing_is_made_up():
    assert Costs(None).means() == {"retain_ratio": 1.0}
    words = Costs(0.2)
    words.add(seconds=0.5, rows=2, shown=[])
    assert words.means() == {"retain_ratio": 0.2, "ttft_ms": 500.0}


def test_what_others_counted_adds_up():
    one, two, both = Costs(0.2), Costs(0.2), Costs(0.2)
    for costs in (one, both):
        costs.add(1.0, 1, [Shown(8, 4, 128, 26)])
    for costs in (two, both):
        costs.add(3.0, 2, [Shown(8, 8, 128, 26)])
    one.take_in(two)
    assert one.means() == both.means()
