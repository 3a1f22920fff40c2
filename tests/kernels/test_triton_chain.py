"""The Triton providers one after another, without a native operator between them."""

import pytest
import test_ops_chain
import test_ops_golden
import torch
from op_inputs import DEVICE, DTYPES
from torch.utils._pytree import tree_map_only

pytest.importorskip("triton")
from earlytom_compile.kernels import providers  # noqa: E402

pytestmark = pytest.mark.gpu


def on_device(provider):
    """Takes and gives tensors of the CPU."""

    def run(*args, **kwargs):
        args = tree_map_only(torch.Tensor, lambda x: x.to(DEVICE), args)
        return tree_map_only(torch.Tensor, torch.Tensor.cpu, provider(*args, **kwargs))

    return staticmethod(run)


Providers = type("Providers", (), {name: on_device(provider) for name, provider in providers._TABLE.items()})


def test_every_operator_that_touches_frames_has_a_provider():
    assert {provider.name for provider in providers._TABLE.values()} == {"triton"}
    assert providers._TABLE.keys() == {
        "attention_received", "dynamic_frames", "frame_similarity", "merge_frames", "pack_places", "plan_merge",
        "plan_reuse", "return_places", "reuse_attention", "select_representatives", "select_tokens",
        "select_tokens_released", "spread_places", "take_places",
    }  # fmt: skip


@pytest.fixture(autouse=True)
def every_operator_is_triton(monkeypatch):
    monkeypatch.setattr(test_ops_golden, "ops", Providers)
    monkeypatch.setattr(test_ops_chain, "ops", Providers)


@test_ops_golden.golden("stage1", quick_every=4)
def test_golden_merge_layer(scalars, tensors):
    test_ops_golden.test_one_merge_layer(scalars, tensors)


@test_ops_golden.golden("stage1_chain", quick_every=4)
def test_golden_chain(scalars, tensors):
    test_ops_golden.test_three_merge_layers(scalars, tensors)


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_video_of_one_frame_stays_as_it_is(dtype, tokens, variant):
    test_ops_chain.test_a_video_of_one_frame_stays_as_it_is(dtype, tokens, variant)
