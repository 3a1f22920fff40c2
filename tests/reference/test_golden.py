"""``variant="released"`` against the outputs of the authors' code.

Two sets of the same format: the small one in ``tests/golden`` is always there, the full one lies beside the
repository in CI and is run where it exists.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from earlytom_compile.reference import merge_inner_tokens, plan_frame_merge, segment_frames, select_tokens

REPOSITORY = Path(__file__).resolve().parents[2]
SETS = {"vendored": REPOSITORY / "tests" / "golden", "shared": REPOSITORY.parent / "shared" / "golden"}
# How many cases each file must hold at least: a set that shrank tests nothing, silently.
LEAST_CASES = {
    "vendored": {"stage1": 17, "stage1_chain": 3, "stage2": 19, "inner": 6},
    "shared": {"stage1": 24, "stage1_chain": 8, "stage2": 24, "inner": 8},
}


UNIT = 2.0**-24
"""The relative error of one rounding to float32."""


class Case(dict):
    """The scalars of one case, by key; its tensors, by attribute."""

    def __init__(self, scalars, tensors):
        super().__init__(scalars)
        prefix = scalars["case"] + "."
        self.__dict__.update({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})

    def stage1_options(self):
        return {
            "variant": "released",
            "tau_seg": self["tau"],
            "alpha": self["ema"],
            "max_window": self["max_window"],
        }


def golden(stage):
    """Every case of a stage, in every set that is here, as pytest parameters."""
    parameters = []
    for name, folder in SETS.items():
        if name == "shared" and not folder.is_dir():
            continue
        scalars = json.loads((folder / f"{stage}.json").read_text())["cases"]
        tensors = load_file(folder / f"{stage}.safetensors")
        assert len(scalars) >= LEAST_CASES[name][stage], f"{folder}/{stage} holds only {len(scalars)} cases"
        parameters += [pytest.param(Case(s, tensors), id=f"{name}-{s['case']}") for s in scalars]
    return pytest.mark.parametrize("case", parameters)


def assert_close(actual, expected, roundings):
    """``roundings`` of float32 on either side, of numbers that are no larger than the largest or 1; and never more than
    the 1e-5 that the vectors are compared to by their README."""
    atol = min(1e-5, 2 * roundings * UNIT * max(1.0, expected.abs().max().item()))
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def roundings_of_a_merge(case):
    """A cosine is a sum of D products over the root of two such sums, the similarity of frames [S, D] a mean of S;
    a weight has a sum and a division, what is merged with it two products and a sum."""
    _, tokens, channels = case.hidden.shape
    return 2 * channels + tokens + 5


def assert_same_indices(actual, expected):
    assert actual.dtype == torch.int64
    assert actual.tolist() == expected.tolist()


@golden("stage1")
def test_one_call_of_frame_merging(case):
    plan = plan_frame_merge(case.hidden, **case.stage1_options())
    assert_same_indices(plan.segments, case.coarse_frames)
    roundings = roundings_of_a_merge(case)
    assert_close(plan.weights, case.source_weights, roundings)
    merged = plan.apply(case.hidden)
    assert_close(merged, case.merged_hidden, roundings)
    assert_close(plan.apply(case.attention), case.merged_attention, roundings)
    segments = segment_frames(merged, **case.stage1_options()) if case["last_layer"] else plan.segments
    assert_same_indices(segments, case.selected_frames)


@golden("stage1_chain")
def test_three_calls_one_after_another(case):
    hidden, attention, weights = case.hidden, case.attention_1, torch.eye(case["T"])
    for call in (1, 2, 3):
        if case["attention_source"] == "fresh":
            attention = getattr(case, f"attention_{call}")
        plan = plan_frame_merge(hidden, **case.stage1_options())
        hidden, attention, weights = plan.apply(hidden), plan.apply(attention), plan.weights @ weights
        roundings = call * roundings_of_a_merge(case)
        assert_close(hidden, getattr(case, f"merged_hidden_{call}"), roundings)
        assert_close(attention, getattr(case, f"merged_attention_{call}"), roundings)
        segments = segment_frames(hidden, **case.stage1_options()) if call == 3 else plan.segments
        assert_same_indices(segments, getattr(case, f"selected_frames_{call}"))
    assert_close(weights, case.source_weights, roundings + 3 * case["T"])  # their product: sums of T


@golden("stage2")
def test_token_selection(case):
    kept = select_tokens(
        case.attention,
        case.selected_frames,
        frames_in=case["init_frames"],
        retain_ratio=case["retain_ratio"],
        variant="released",
    )
    assert_same_indices(kept, case.kept)
    assert torch.equal(case.features[kept[:, 0], kept[:, 1]], case.out_features)


@golden("inner")
def test_merging_inside_the_llm(case):
    scores = case.attention[0].mean(0)[-1]
    hidden, kept = merge_inner_tokens(
        case.hidden,
        scores,
        image_start=case["image_start"],
        image_length=case["image_length"],
        drop_ratio=case["r"],
        variant="released",
    )
    assert_same_indices(kept, case.kept_indices)
    assert_close(hidden, case.merged_hidden, case.hidden.shape[1])  # a mean of two for each token that goes


def test_the_vendored_set_is_part_of_the_clone():
    assert sorted(p.name for p in SETS["vendored"].glob("*.safetensors")) == [
        f"{stage}.safetensors" for stage in sorted(LEAST_CASES["vendored"])
    ]
