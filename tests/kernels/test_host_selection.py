"""Static frames selected on the CPU: the same result, whatever the device does meanwhile."""

from functools import partial

import pytest
import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import DEVICE, RUNS, ops
from test_triton_select_tokens import selection, selections

pytest.importorskip("triton")
from earlytom_compile.kernels import host_selection, triton_select_tokens, triton_select_tokens_released  # noqa: E402
from earlytom_compile.kernels import select_tokens as declared  # noqa: E402
from earlytom_compile.kernels.select_tokens import paper_quotas, released_quotas  # noqa: E402

pytestmark = pytest.mark.gpu

DECLARED = {"paper": declared.select_tokens, "released": declared.select_tokens_released}
PROVIDERS = {"paper": triton_select_tokens, "released": triton_select_tokens_released}
OPERATORS = {"paper": ops.select_tokens, "released": ops.select_tokens_released}
both_variants = pytest.mark.parametrize("variant, amount", [("paper", (8,)), ("released", (6, 0.4))])


def select(inputs, *amount, place, variant="paper"):
    moved = [x.to(DEVICE) for x in inputs]
    return [x.cpu() for x in PROVIDERS[variant].run(*moved, *amount, static_selection=place)]


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def most(counts, per_frame):
    return min(counts) * per_frame


@examples(5)
@given(inputs=selections(), share=st.floats(0, 1))
def test_is_what_the_device_selects(inputs, share):
    values, _, _, counts = inputs
    budget = max(1, round(share * most(counts.tolist(), values.shape[1])))
    assert_same(select(inputs, budget, place="host"), ops.select_tokens(*inputs, budget))


@examples(5)
@given(inputs=selections(), merged=st.integers(0, 9), ratio=st.floats(0.01, 1))
def test_released_is_what_the_device_selects(inputs, merged, ratio):
    amount = int(inputs[3].max()) + merged, ratio
    actual = select(inputs, *amount, place="host", variant="released")
    assert_same(actual, ops.select_tokens_released(*inputs, *amount))


@both_variants
@pytest.mark.parametrize("flag", [True, False], ids=["all dynamic", "all static"])
def test_frames_of_one_kind(flag, variant, amount):
    values, scores, _, counts = selection(3, [5, 4], 12, 8)
    inputs = values, scores, torch.full((9,), flag), counts
    assert_same(select(inputs, *amount, place="host", variant=variant), OPERATORS[variant](*inputs, *amount))


@both_variants
def test_the_device_leaves_static_frames_alone(variant, amount):
    """Else ``host`` would only do once more what the device has done."""
    values, scores, dynamic, counts = inputs = selection(5, [6], 8, 4)
    expected = OPERATORS[variant](*inputs, *amount)
    static = torch.isin(expected[1][..., -2], (~dynamic).nonzero())
    assert static.any() and not static.all()
    moved = tuple(x.to(DEVICE) for x in inputs)

    def dynamic_only():
        tokens, kept, *rest = PROVIDERS[variant].select_on_device(*moved, *amount, only_dynamic=True)
        rows = static.to(DEVICE)
        assert not torch.equal(kept[rows].cpu(), expected[1][static])
        tokens[rows], kept[rows] = float("nan"), -9
        return (tokens, kept, *rest)

    quotas = {
        "paper": partial(paper_quotas, budget=8, tokens=8),
        "released": partial(released_quotas, frames=6, retain_ratio=0.4, tokens=8),
    }[variant]
    assert_same([x.cpu() for x in host_selection.select(moved, quotas, dynamic_only)], expected)


@both_variants
def test_refuses_counts_as_the_native_body_does(variant, amount):
    values, scores, dynamic, _ = selection(7, [3, 2], 6, 4)
    with pytest.raises(ValueError, match=r"select_tokens.*counts=\[3, 3\]"):
        select((values, scores, dynamic, torch.tensor([3, 3])), *amount, place="host", variant=variant)


def test_refuses_a_budget_as_the_native_body_does():
    values, scores, dynamic, _ = selection(7, [3, 2], 6, 4)
    with pytest.raises(ValueError, match="select_tokens.*budget=8"):
        select((values, scores, dynamic, torch.tensor([4, 1])), 8, place="host")


def test_nan_is_the_least_importance_as_on_the_device():
    values, scores, dynamic, counts = selection(7, [3, 2], 6, 4)
    scores[:, ::2] = float("nan")
    host, device = (select((values, scores, dynamic, counts), 8, place=place) for place in ("host", "device"))
    assert_same(host, device)


@pytest.mark.parametrize("place", ["host", "device", "auto"])
def test_released_refuses_nan_everywhere(place):
    values, scores, dynamic, counts = selection(7, [3, 2], 6, 4)
    scores[3, 1] = float("nan")
    with pytest.raises(ValueError, match="select_tokens_released: importance holds NaN"):
        select((values, scores, dynamic, counts), 6, 0.4, place=place, variant="released")


@both_variants
def test_the_same_bits_in_many_runs(variant, amount):
    inputs = selection(13, [2, 1], 12, 2)
    expected = OPERATORS[variant](*inputs, *amount)
    for _ in range(RUNS):
        assert_same(select(inputs, *amount, place="host", variant=variant), expected)


def test_auto_measures_once_and_takes_the_quicker(monkeypatch):
    monkeypatch.setattr(host_selection, "_fastest", {})
    calls = []

    def choice(name, seconds):
        def run():
            calls.append(name)
            host_selection.time.sleep(seconds)
            return name

        return run

    features = torch.zeros(5, 4, 3, device=DEVICE)
    choices = {"device": choice("device", 0.02), "host": choice("host", 0.0)}
    assert host_selection.fastest(features, 7, choices) == "host"
    assert calls.count("device") == calls.count("host") - 1
    calls.clear()
    assert host_selection.fastest(features, 7, choices) == "host" and calls == ["host"]


@both_variants
def test_auto_gives_the_same_result(variant, amount, monkeypatch):
    monkeypatch.setattr(host_selection, "_fastest", {})
    inputs = selection(11, [2, 1], 9, 2)
    expected = OPERATORS[variant](*inputs, *amount)
    assert_same(select(inputs, *amount, place="auto", variant=variant), expected)
    assert_same(select(inputs, *amount, place="auto", variant=variant), expected)
    assert len(host_selection._fastest) == 1


@both_variants
def test_a_place_that_does_not_exist(variant, amount):
    inputs = selection(0, [3], 4, 2)
    with pytest.raises(ValueError, match="select_tokens.*static_selection='gpu'; use one of 'device', 'host', 'auto'"):
        OPERATORS[variant](*inputs, *amount, static_selection="gpu")
    with pytest.raises(ValueError, match="static_selection='gpu'"):
        select(inputs, *amount, place="gpu", variant=variant)


@both_variants
@pytest.mark.parametrize("place", ["host", "auto"])
def test_without_a_gpu_all_places_are_the_same(place, variant, amount):
    inputs = selection(2, [5, 4], 6, 4)
    op = OPERATORS[variant]
    assert_same(op(*inputs, *amount, static_selection=place), op(*inputs, *amount))


@pytest.mark.long  # compiled with aot_eager the operators are in test_ops_registration.py
@both_variants
def test_inductor_calls_it_as_it_is(variant, amount, monkeypatch):
    inputs, calls, select_on_host = selection(17, [5, 4], 12, 8), [], host_selection.select

    def compressed(features, *others):
        tokens, *kept = OPERATORS[variant](features.relu() + 1, *others, *amount, static_selection="host")
        return 2 * tokens, *kept

    expected = compressed(*inputs)
    if DEVICE == "cpu":  # where the operator would run its native body
        monkeypatch.setitem(DECLARED[variant]._backend_fns, None, PROVIDERS[variant].run)
    monkeypatch.setattr(host_selection, "select", lambda *args: calls.append(args) or select_on_host(*args))
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        actual = torch.compile(compressed, fullgraph=True)(*(x.to(DEVICE) for x in inputs))
    assert len(calls) == 1
    assert_same([x.cpu() for x in actual], expected)
