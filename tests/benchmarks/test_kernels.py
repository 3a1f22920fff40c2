"""The operator benchmark runs on a CPU, and its arms compute what they are compared with."""

import json
import math
import sys

import pytest
import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st

from earlytom_compile.benchmarks import formulas, kernels

OF_PLUS = {
    "plan_reuse", "pack_places", "take_places", "reuse_attention", "return_places", "spread_places",
    "select_representatives",
}  # fmt: skip
OPS = {
    "frame_similarity", "merge_frames", "attention_received", "plan_merge", "dynamic_frames", "select_tokens",
    "plan_merge + select_tokens",
} | OF_PLUS  # fmt: skip
LATENCY_BOUND = {"plan_merge", "dynamic_frames", "plan_merge + select_tokens", "pack_places"}
MORE_ARMS = {"attention_received": {"sdpa"}, "select_tokens": {"host", "auto"}, "reuse_attention": {"sdpa"}}


def test_measures_every_operator_and_finds_that_the_arms_agree(tmp_path, monkeypatch, capsys):
    path = tmp_path / "kernels.json"
    command = ["--quick", "--device", "cpu", "--frames", "3", "10", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", [kernels.__file__, *command])
    assert kernels.main() == 0
    printed = capsys.readouterr().out
    result = json.loads(path.read_text())
    assert result["ceilings"].keys() == {"copy", "matmul"}
    for frames in (3, 10):
        rows = [row for row in result["rows"] if row["frames"] == frames]
        assert {row["op"] for row in rows} == OPS
        for op in OPS:
            arms = {row["arm"]: row for row in rows if row["op"] == op}
            assert arms.keys() == {"earlytom", "native" if op in OF_PLUS else "naive"} | MORE_ARMS.get(op, set())
            assert arms["earlytom"]["provider"] == "native"
        assert all(row["median_us"] > 0 for row in rows)
        assert all(row["error"] <= 1e-4 for row in rows if row["arm"] != "sdpa")
        assert all(("no GPU" in (row["note"] or "")) == (row["arm"] in ("host", "auto")) for row in rows)
    lines = [[cell.strip() for cell in line.split("│")] for line in printed.splitlines() if line.startswith("│")]
    for op in OPS:
        rates = [line[6] for line in lines if line[1] == op]
        assert len(rates) == 2 and all((rate == "latency bound") is (op in LATENCY_BOUND) for rate in rates)

    prefill = result["prefill"]
    merges = len(prefill["frames"]) - 1
    assert prefill["calls"] == {
        "frame_similarity": merges + 1, "plan_merge": merges, "merge_frames": merges,
        "first_of_merged": merges,
        "attention_received": 1, "dynamic_frames": 1, "select_tokens": 1, "video_budget": 1,
    }  # fmt: skip
    assert prefill["operators_ms"] > 0 and prefill["share"] * prefill["first_token_ms"] == pytest.approx(
        prefill["operators_ms"]
    )
    (line,) = (line for line in printed.splitlines() if line.startswith("all operators of one prefill take "))
    assert f"= {prefill['share']:.1%} of the time to first token" in line


some = examples(40)
seeds = st.integers(0, 2**32 - 1)


@some
@given(
    seed=seeds, frames=st.integers(1, 9), tokens=st.integers(1, 7), channels=st.integers(1, 20), band=st.integers(1, 10)
)
def test_what_inductor_gets_of_similarities_is_the_operator(seed, frames, tokens, channels, band):
    hidden = torch.randn(frames, tokens, channels, generator=torch.Generator().manual_seed(seed))
    expected = torch.ops.earlytom.frame_similarity(hidden, band)
    torch.testing.assert_close(formulas.plain_similarity(hidden, band), expected, atol=1e-6, rtol=0)


@some
@given(
    seed=seeds,
    frames=st.integers(1, 9),
    share=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_what_inductor_gets_of_merging_is_the_operator(seed, frames, share, dtype):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(frames, 3, 5, generator=generator).to(dtype)
    importance = torch.rand(frames, 3, generator=generator)
    source = torch.randint(frames, (frames, 2), generator=generator)
    first = torch.rand(frames, 1, generator=generator)
    weight = torch.where(source[:, :1] == source[:, 1:], torch.tensor([1.0, 0.0]), torch.cat([first, 1 - first], 1))
    n = max(1, round(share * frames))
    source[n:], weight[n:] = 0, 0
    expected = torch.ops.earlytom.merge_frames([hidden, importance], source, weight, n)
    torch.testing.assert_close(formulas.plain_merge([hidden, importance], source, weight, n), expected)


@some
@given(
    seed=seeds,
    frames=st.integers(1, 3),
    heads=st.integers(1, 3),
    tokens=st.integers(1, 9),
    width=st.integers(1, 9),
    scale=st.sampled_from([0.1, 1.0]),
)
def test_what_inductor_gets_of_attention_is_the_operator(seed, frames, heads, tokens, width, scale):
    query, key = torch.randn(2, frames, heads, tokens, width, generator=torch.Generator().manual_seed(seed))
    expected = torch.ops.earlytom.attention_received(query, key, scale)
    torch.testing.assert_close(formulas.plain_attention(query, key, scale), expected, atol=1e-6, rtol=1e-5)


@some
@given(
    seed=seeds,
    frames=st.integers(1, 9),
    tokens=st.integers(1, 12),
    levels=st.sampled_from([1, 3, 1000]),
    share=st.floats(0, 1),
)
def test_what_inductor_gets_of_selection_is_the_operator(seed, frames, tokens, levels, share):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(frames, tokens, 3, generator=generator)
    importance = torch.randint(levels, (frames, tokens), generator=generator) / levels
    dynamic = torch.rand(frames, generator=generator) < 0.5
    inputs = features, importance, dynamic, torch.tensor([frames])
    budget = max(1, round(share * frames * tokens))
    (expected,), _ = torch.ops.earlytom.select_tokens(*inputs, budget)
    assert torch.equal(formulas.plain_select(*inputs, budget), expected)


@some
@given(
    seed=seeds,
    frames=st.integers(1, 14),
    levels=st.sampled_from([4, 1000]),
    tau_seg=st.sampled_from([-1.0, 0.3, 0.6]),
    min_frames=st.integers(1, 6),
)
def test_what_inductor_gets_of_the_decisions_is_what_the_operators_decide(seed, frames, levels, tau_seg, min_frames):
    generator = torch.Generator().manual_seed(seed)
    shape = (frames, max(1, frames - 1))
    similarity = torch.randint(-levels // 4, levels + 1, shape, generator=generator) / levels
    counts = torch.tensor([frames])
    segmentation = {"variant": "paper", "tau_seg": tau_seg, "alpha": 0.9, "max_window": 0}
    planning = {**segmentation, "tau_merge": math.nan, "min_frames": min_frames}
    expected = torch.ops.earlytom.plan_merge(similarity, counts, **planning)
    torch.testing.assert_close(formulas.plain_plan(similarity, counts, **planning), expected)
    dynamic = torch.ops.earlytom.dynamic_frames(similarity, counts, **segmentation)
    assert torch.equal(formulas.plain_dynamic(similarity, counts, **segmentation), dynamic)
