"""The operators, one after another, on the outputs of the authors' code (``variant="released"``).

The small set in ``tests/golden`` is always there; the full one, which has the same cases and more, lies beside the
repository in CI.
"""

import json
import math
from pathlib import Path

import pytest
import rounding
import torch
from op_inputs import ops
from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parents[2]
SETS = {"vendored": REPOSITORY / "tests" / "golden", "shared": REPOSITORY.parent / "shared" / "golden"}


def golden(stage, quick_every=1):
    """Every case of a stage, (scalars, tensors), once; the quick suite takes one of ``quick_every``."""
    parameters, seen = [], set()
    for name, folder in SETS.items():
        if not (folder / f"{stage}.json").exists():
            continue
        tensors = load_file(folder / f"{stage}.safetensors")
        for scalars in json.loads((folder / f"{stage}.json").read_text())["cases"]:
            if scalars["case"] in seen:
                continue
            seen.add(scalars["case"])
            prefix = scalars["case"] + "."
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            marks = pytest.mark.long if len(parameters) % quick_every else ()
            parameters.append(pytest.param(scalars, own, id=f"{name}-{scalars['case']}", marks=marks))
    assert parameters, f"no golden {stage} in any of {list(map(str, SETS.values()))}"
    return pytest.mark.parametrize("scalars, tensors", parameters)


def segmentation(scalars):
    return {
        "variant": "released",
        "tau_seg": scalars["tau"],
        "alpha": scalars["ema"],
        "max_window": scalars["max_window"],
    }


def band(scalars):
    return max(1, scalars["max_window"] - 2)


def merge(hidden, scalars):
    """(source, weight, n) of one merge layer."""
    similarity = ops.frame_similarity(hidden, band(scalars))
    counts = torch.tensor([len(hidden)])
    source, weight, merged = ops.plan_merge(
        similarity, counts, **segmentation(scalars), tau_merge=math.nan, min_frames=1
    )
    return source, weight, int(merged.sum())


def dynamic(hidden, scalars):
    similarity = ops.frame_similarity(hidden, band(scalars))
    return ops.dynamic_frames(similarity, torch.tensor([len(hidden)]), **segmentation(scalars))


def ends(segments, frames):
    flags = torch.zeros(frames, dtype=torch.bool)
    flags[segments.flatten()] = True
    return flags


def as_matrix(source, weight, n, frames):
    matrix = torch.zeros(n, frames)
    for column in range(2):
        matrix[torch.arange(n), source[:n, column]] += weight[:n, column]
    return matrix


def assert_close(actual, expected, hidden, calls=1):
    """After ``calls`` merges of frames ``hidden`` [T, S, D], in float32 on either side.

    A cosine is a sum of D products over the root of two such sums, the similarity of two frames a mean of S; a weight
    has a sum and a division, what is merged with it two products and a sum. It is never more than the 1e-5 that the
    vectors are compared to by their README.
    """
    roundings = calls * (2 * hidden.shape[2] + hidden.shape[1] + 5)
    atol = min(1e-5, 2 * roundings * rounding.UNIT * max(1.0, expected.abs().max().item()))
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@golden("stage1")
def test_one_merge_layer(scalars, tensors):
    hidden = tensors["hidden"]
    source, weight, n = merge(hidden, scalars)
    assert n == scalars["n_out"]
    assert_close(as_matrix(source, weight, n, len(hidden)), tensors["source_weights"], hidden)
    merged, attention = ops.merge_frames([hidden, tensors["attention"]], source, weight, n)
    assert_close(merged, tensors["merged_hidden"], hidden)
    assert_close(attention, tensors["merged_attention"], hidden)
    assert torch.equal(dynamic(hidden, scalars), ends(tensors["coarse_frames"], len(hidden)))
    if scalars["last_layer"]:
        assert torch.equal(dynamic(merged, scalars), ends(tensors["selected_frames"], n))


@golden("stage1_chain")
def test_three_merge_layers(scalars, tensors):
    hidden, attention = tensors["hidden"], tensors["attention_1"]
    matrix = torch.eye(len(hidden))
    for call in (1, 2, 3):
        attention = tensors.get(f"attention_{call}", attention)
        source, weight, n = merge(hidden, scalars)
        matrix = as_matrix(source, weight, n, len(hidden)) @ matrix
        if call < 3:
            assert torch.equal(dynamic(hidden, scalars), ends(tensors[f"selected_frames_{call}"], len(hidden)))
        hidden, attention = ops.merge_frames([hidden, attention], source, weight, n)
        assert_close(hidden, tensors[f"merged_hidden_{call}"], hidden, call)
        assert_close(attention, tensors[f"merged_attention_{call}"], hidden, call)
    assert torch.equal(dynamic(hidden, scalars), ends(tensors["selected_frames_3"], len(hidden)))
    assert_close(matrix, tensors["source_weights"], hidden, calls=3)


@golden("stage2")
def test_selection(scalars, tensors):
    features = tensors["features"]
    tokens, kept, kept_counts = ops.select_tokens_released(
        features,
        tensors["attention"],
        ends(tensors["selected_frames"], len(features)),
        torch.tensor([len(features)]),
        scalars["init_frames"],
        scalars["retain_ratio"],
    )
    assert kept_counts.tolist() == [scalars["n_kept"]]
    assert torch.equal(kept[:, 1:], tensors["kept"]) and kept[:, 0].eq(0).all()
    assert torch.equal(tokens, tensors["out_features"])


def test_all_cases_of_stage_2_as_the_videos_of_one_call():
    cases = [case.values for mark in [golden("stage2")] for case in mark.args[1]]
    groups = {}
    for scalars, tensors in cases:
        key = (tensors["features"].shape[1:], scalars["init_frames"], scalars["retain_ratio"])
        groups.setdefault(key, []).append(tensors)
    for (_, frames, ratio), videos in groups.items():
        tokens, kept, _ = ops.select_tokens_released(
            torch.cat([video["features"] for video in videos]),
            torch.cat([video["attention"] for video in videos]),
            torch.cat([ends(video["selected_frames"], len(video["features"])) for video in videos]),
            torch.tensor([len(video["features"]) for video in videos]),
            frames,
            ratio,
        )
        assert torch.equal(tokens, torch.cat([video["out_features"] for video in videos]))
        assert torch.equal(kept[:, 1:], torch.cat([video["kept"] for video in videos]))
