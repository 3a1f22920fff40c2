"""What stands in the way of compressing a Qwen model, and what is said of it."""

import warnings

import pytest
import torch
from effort import cases
from generating import new_tokens
from qwen_calls import SMALL, supported
from tiny_qwen import Clip, qwen_inputs, tiny_qwen

import earlytom_compile
from earlytom_compile import EarlyTomCompileError, EarlyTomConfigError, EarlyTomFallbackWarning

OPTIONS = {"variant": "paper", "merge_layers": (0, 1), "lowering": "eager", "retain_ratio": 0.3}


@pytest.fixture
def model():
    return tiny_qwen("qwen2_5_vl", vision_layers=3, full=(0, 2), deepstack=(0, 1))


@pytest.fixture
def inputs(model):
    return qwen_inputs(model, [[1, Clip(6, *SMALL, scenes=2), 3]])


HOOKED = {
    "a block": lambda visual: visual.blocks[1],
    "attention": lambda visual: visual.blocks[0].attn,
    "the merger": lambda visual: visual.merger,
    "the tower": lambda visual: visual,
}


@pytest.mark.parametrize("where", cases(("attention",), ("the tower",), among=[(where,) for where in HOOKED]))
def test_hooks_on_what_is_only_opened(model, inputs, where):
    """They would not run, so the call does not compress; on the layers inside they are part of the path."""
    plain, called = new_tokens(model, inputs), []
    module = HOOKED[where](model.model.visual)
    earlytom_compile.compile(model, **OPTIONS)
    handle = module.register_forward_hook(lambda *_: called.append(1))
    name = next(name for name, each in model.named_modules() if each is module)
    with pytest.warns(EarlyTomFallbackWarning, match=f"{name} has a hook or a forward.*Take it off"):
        assert torch.equal(new_tokens(model, inputs), plain)
    assert called
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error", EarlyTomFallbackWarning)
        new_tokens(model, inputs)


def test_a_forward_of_ones_own(model, inputs):
    plain, attention = new_tokens(model, inputs), model.model.visual.blocks[0].attn
    own = attention.forward
    attention.forward = lambda *args, **kwargs: own(*args, **kwargs)
    earlytom_compile.compile(model, **OPTIONS)
    with pytest.warns(EarlyTomFallbackWarning, match=r"blocks\.0\.attn has a hook or a forward"):
        assert torch.equal(new_tokens(model, inputs), plain)


def test_hooks_on_layers_inside_run_and_count(model, inputs):
    """One that changes what a linear returns changes what is kept, as in the model itself."""
    earlytom_compile.compile(model, **{**OPTIONS, "retain_ratio": 1.0, "merge_layers": ()}, strict=True)
    linear = model.model.visual.blocks[1].mlp.down_proj
    before = new_tokens(model, inputs)
    linear.register_forward_hook(lambda module, args, output: -2 * output)
    compressed = new_tokens(model, inputs)
    earlytom_compile.restore(model)
    assert torch.equal(compressed, new_tokens(model, inputs)) and not torch.equal(compressed, before)


def test_frames_merge_under_plus_and_no_patch_is_reused(model, inputs):
    plain = new_tokens(model, inputs)
    options = {name: value for name, value in OPTIONS.items() if name != "variant"}
    earlytom_compile.compile(model, **options, strict=True)  # "plus" is the default
    merged = new_tokens(model, inputs)
    assert "reuse=False" in str(earlytom_compile.report(model))
    for more in ({"variant": "plus"}, {"reuse": False}):
        earlytom_compile.compile(model, **options, **more, strict=True)
        assert torch.equal(new_tokens(model, inputs), merged)
    assert not torch.equal(merged, plain)
    (observed,) = earlytom_compile.observe(
        earlytom_compile.restore(model),
        inputs["pixel_values_videos"],
        {"video_grid_thw": inputs["video_grid_thw"]},
    )
    assert observed.merges and observed.config.variant == "plus"
    asked = {"lowering": "eager", "retain_ratio": 0.3, "reuse": True}
    earlytom_compile.compile(model, **asked)
    with pytest.warns(EarlyTomFallbackWarning, match="unknown which of them did not change.*reuse=False"):
        assert torch.equal(new_tokens(model, inputs), plain)
    earlytom_compile.compile(model, **asked, strict=True)
    with pytest.raises(EarlyTomCompileError, match="reuse=False"):
        new_tokens(model, inputs)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_a_tower_that_packs_its_frames(kind):
    """torch.compile() of the model or the tower: test_support_table.py."""
    model = tiny_qwen(kind, vision_layers=2, full=(0, 1), deepstack=(0, 1))
    with pytest.raises(EarlyTomConfigError, match=r"compile_tower\(\) got a Qwen.*encode_videos"):
        earlytom_compile.compile_tower(model.model.visual)


@pytest.mark.parametrize("kind", supported(["qwen2_5_vl", "qwen3_vl"], long=["qwen2_5_vl"]))
def test_weights_that_are_offloaded_compress(kind):
    """They are in place while the path is traced, which is when the map from patches to tokens is tried out."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")
    model = tiny_qwen(kind, vision_layers=3, full=(0, 2), deepstack=(0, 1))
    inputs = qwen_inputs(model, [[1, Clip(6, *SMALL, scenes=2), 3]])
    earlytom_compile.compile(model, **OPTIONS, strict=True)
    expected = new_tokens(model, inputs)
    accelerate.cpu_offload(earlytom_compile.restore(model), execution_device="cpu")
    earlytom_compile.compile(model, **OPTIONS, strict=True)
    assert torch.equal(new_tokens(model, inputs), expected)
