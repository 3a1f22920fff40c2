"""Static frames selected on the CPU: the same result, whatever the device does meanwhile."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_inputs import DEVICE, ops
from test_triton_select_tokens import selection, selections

pytest.importorskip("triton")
from earlytom_compile.kernels import host_selection, triton_select_tokens  # noqa: E402


def select(inputs, budget, place):
    moved = [x.to(DEVICE) for x in inputs]
    return [x.cpu() for x in triton_select_tokens.run(*moved, budget, static_selection=place)]


def most(counts, per_frame):
    return min(counts) * per_frame


@settings(deadline=None, max_examples=15)
@given(inputs=selections(), share=st.floats(0, 1))
def test_is_what_the_device_selects(inputs, share):
    values, _, _, counts = inputs
    budget = max(1, round(share * most(counts.tolist(), values.shape[1])))
    expected = ops.select_tokens(*inputs, budget)
    for actual, wanted in zip(select(inputs, budget, "host"), expected, strict=True):
        assert actual.dtype == wanted.dtype and torch.equal(actual, wanted)


@pytest.mark.parametrize("flag", [True, False], ids=["all dynamic", "all static"])
def test_frames_of_one_kind(flag):
    values, scores, _, counts = selection(3, [5, 4], 12, 8)
    inputs = values, scores, torch.full((9,), flag), counts
    for actual, wanted in zip(select(inputs, 14, "host"), ops.select_tokens(*inputs, 14), strict=True):
        assert torch.equal(actual, wanted)


def test_the_device_leaves_static_frames_alone():
    """Else ``host`` would only do once more what the device has done."""
    values, scores, dynamic, counts = selection(5, [6], 8, 4)
    poison = [torch.full((1, 12, 4), float("nan")), torch.full((1, 12, 2), -9)]
    moved = [x.to(DEVICE) for x in (values, scores, dynamic, counts)]

    def dynamic_only():
        tokens, kept = triton_select_tokens.select_on_device(*moved, 12, only_dynamic=True)
        empty = torch.isin(ops.select_tokens(values, scores, dynamic, counts, 12)[1][..., 0], (~dynamic).nonzero())
        assert empty.any() and not empty.all()
        return (
            torch.where(empty[..., None].to(DEVICE), poison[0].to(DEVICE), tokens),
            torch.where(empty[..., None].to(DEVICE), poison[1].to(DEVICE), kept),
        )

    actual = host_selection.select(*moved, 12, dynamic_only)
    for one, other in zip(actual, ops.select_tokens(values, scores, dynamic, counts, 12), strict=True):
        assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"counts": torch.tensor([3, 3])}, "counts="),
        ({"counts": torch.tensor([4, 1])}, "budget=8"),
    ],
)
def test_refuses_what_the_native_body_refuses(change, says):
    values, scores, dynamic, counts = selection(7, [3, 2], 6, 4)
    inputs = values, scores, dynamic, change["counts"]
    with pytest.raises(ValueError, match=f"select_tokens.*{says}"):
        select(inputs, 8, "host")


def test_nan_is_the_least_importance_as_on_the_device():
    values, scores, dynamic, counts = selection(7, [3, 2], 6, 4)
    scores[:, ::2] = float("nan")
    for one, other in zip(
        *(select((values, scores, dynamic, counts), 8, place) for place in ("host", "device")), strict=True
    ):
        assert torch.equal(one, other)


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


def test_auto_gives_the_same_result(monkeypatch):
    monkeypatch.setattr(host_selection, "_fastest", {})
    inputs = selection(11, [5, 7], 9, 8)
    for actual, wanted in zip(select(inputs, 20, "auto"), ops.select_tokens(*inputs, 20), strict=True):
        assert torch.equal(actual, wanted)


def test_a_place_that_does_not_exist():
    inputs = selection(0, [3], 4, 2)
    with pytest.raises(ValueError, match="static_selection='gpu'; use one of 'device', 'host', 'auto'"):
        ops.select_tokens(*inputs, 2, static_selection="gpu")
    with pytest.raises(ValueError, match="static_selection='gpu'"):
        select(inputs, 2, "gpu")


@pytest.mark.parametrize("place", ["host", "auto"])
def test_without_a_gpu_all_places_are_the_same(place):
    inputs = selection(2, [5, 4], 6, 4)
    for actual, wanted in zip(
        ops.select_tokens(*inputs, 9, static_selection=place), ops.select_tokens(*inputs, 9), strict=True
    ):
        assert torch.equal(actual, wanted)
