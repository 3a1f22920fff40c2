"""What a compressed video costs vLLM's scheduler; needs no vLLM."""

import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from earlytom_compile.integrations.vllm import scheduling
from earlytom_compile.integrations.vllm.options import FIELD, packed


def feature(tokens, options=None, compressed=True):
    data = {FIELD: SimpleNamespace(data=packed(options))} if compressed else {}
    return SimpleNamespace(data=data, mm_position=SimpleNamespace(get_num_embeds=lambda: tokens))


def spend(scheduler, request, budget, *, encoded):
    """As vLLM's: (items that are encoded, tokens, what is left, ...)."""
    used = sum(request.mm_features[item].mm_position.get_num_embeds() for item in encoded)
    return encoded, 7, budget - used, [], "more"


@given(frames=st.integers(1, 64), ratio=st.floats(0.05, 1.0))
def test_it_is_that_of_all_tokens(frames, ratio):
    kept = max(1, round(ratio * frames * 196)) + 1
    request = SimpleNamespace(mm_features=[feature(kept, {"retain_ratio": ratio}), feature(99, compressed=False)])
    encoded, tokens, left, *others = scheduling.charging(spend)(None, request, 100_000, encoded=[0, 1])
    assert (encoded, tokens, others) == ([0, 1], 7, [[], "more"])
    assert 100_000 - left - 99 == pytest.approx(frames * 196, abs=1 + 1.5 / ratio)


def test_what_is_not_compressed_costs_what_it_does():
    request = SimpleNamespace(mm_features=[feature(50, None), feature(60, compressed=False)])
    assert scheduling.charging(spend)(None, request, 500, encoded=[0, 1])[2] == 390


def test_default_ratio():
    request = SimpleNamespace(mm_features=[feature(20, {})])
    assert scheduling.charging(spend)(None, request, 500, encoded=[0])[2] == 400


def test_is_charged_once_and_only_where_the_scheduler_is(monkeypatch):
    monkeypatch.delitem(sys.modules, scheduling._MODULE, raising=False)
    scheduling.charge_in_full()
    assert scheduling._MODULE not in sys.modules
    scheduler = type("Scheduler", (), {"_try_schedule_encoder_inputs": spend})
    monkeypatch.setitem(sys.modules, scheduling._MODULE, SimpleNamespace(Scheduler=scheduler))
    for _ in range(2):
        scheduling.charge_in_full()
    request = SimpleNamespace(mm_features=[feature(20, {"retain_ratio": 0.1})])
    assert scheduler()._try_schedule_encoder_inputs(request, 500, encoded=[0])[2] == 300
