"""Quantised weights of torchao, and opaque linear operators like those of other libraries, in all of a model's layers.

The oracle runs the quantised model's own modules.
"""

import pytest
import torch
from effort import cases
from generating import new_tokens
from oracle import compressed_generate, compressed_videos
from tiny_models import tiny_llava_onevision, video_inputs
from torch import Tensor, nn

import earlytom_compile

OPTIONS = {"variant": "paper", "merge_layers": (0, 1), "tau_seg": 0.3, "retain_ratio": 0.3}
NOTHING_MERGES = {"variant": "paper", "merge_layers": (0, 1), "retain_ratio": 1.0, "tau_seg": -1.0, "tau_merge": 1.0}


def tiny():
    return tiny_llava_onevision(vision_layers=3, text_layers=1, text_hidden=64)


def compiled(model, **options):
    return earlytom_compile.compile(model, **{"lowering": "eager", **OPTIONS, **options})


def rows(model, inputs):
    (encoded,) = earlytom_compile.encode_videos(model, inputs["pixel_values_videos"])
    return encoded


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def check(model, inputs, *, lowering="eager", assert_close=assert_same, **options):
    """Videos of the quantised model are those of the oracle, and not those of the model before."""
    options = {**OPTIONS, **options}
    got = rows(compiled(model, lowering=lowering, **options), inputs)
    frames = earlytom_compile.report(model).to_dict()["videos"][0]["frames"]
    earlytom_compile.restore(model)
    (expected,) = compressed_videos(model, inputs, **options)
    assert frames[1:] == expected.frames_after and frames[-1] < 8
    assert_close(got, expected.features)
    (plain,) = compressed_videos(tiny(), inputs, **options)
    assert plain.features.shape != got.shape or (plain.features - got).abs().max() > 1e-3


# --- torchao ------------------------------------------------------------------------------------------------------


def torchao(name, **options):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao: pip install torchao")
    if "granularity" in options:
        options = {"weight_dtype": torch.int4, "granularity": quantization.PerGroup(32)}
    return getattr(quantization, name)(**options)


def quantised(config, model=None, where=""):
    from torchao.quantization import quantize_

    model = tiny() if model is None else model
    quantize_(model, config, lambda module, name: isinstance(module, nn.Linear) and where in name)
    return model


WEIGHTS = {
    "int8 weights": {"name": "Int8WeightOnlyConfig"},
    "int4 weights": {"name": "IntxWeightOnlyConfig", "granularity": "groups"},
    "float8 weights": {"name": "Float8WeightOnlyConfig"},
}
W8A8 = {"name": "Int8DynamicActivationInt8WeightConfig"}


def assert_nearly_same(got, expected):
    """Where activations are rounded to 8 bits.

    There a difference of 1e-7, as between two machines' sums, is one of a step as soon as it crosses a boundary, and
    attention hands it to all tokens: 1e-7 in the pixels makes 1 to 3 % here, compiled or not.
    """
    assert got.shape == expected.shape
    assert (got - expected).norm() < 0.06 * expected.norm()


ROUNDED = {"assert_close": assert_nearly_same, "retain_ratio": 5 / 8}
"""All tokens of the 5 merged frames stay: which do not would hang on the last bits."""
REUSE_ROUNDED = {**ROUNDED, "retain_ratio": 1.0}


# int8 is in test_quantised_after_compile.
@pytest.mark.parametrize("kind", cases(("int4 weights",), among=[(kind,) for kind in WEIGHTS]))
def test_weights_alone(kind):
    model = quantised(torchao(**WEIGHTS[kind]))
    check(model, video_inputs(model, 8))


def test_weights_and_activations():
    model = quantised(torchao(**W8A8))
    inputs = video_inputs(model, 8)
    check(model, inputs, **ROUNDED)
    with torch.no_grad():
        (own,) = model.model.get_video_features(inputs["pixel_values_videos"], return_dict=True).pooler_output
    compiled(model, **NOTHING_MERGES)
    assert torch.equal(rows(model, inputs)[: len(own)], own)  # bit for bit, so rounding is the model's own


def test_quantised_after_compile():
    model = compiled(tiny())
    inputs = video_inputs(model, 8)
    before = rows(model, inputs)
    quantised(torchao(**WEIGHTS["int8 weights"]), model)
    assert not torch.equal(rows(model, inputs), before)
    check(model, inputs)
    tokens = new_tokens(compiled(model), inputs)
    earlytom_compile.restore(model)
    assert torch.equal(tokens, compressed_generate(model, inputs, tokens.shape[1], **OPTIONS))


@pytest.mark.long
@pytest.mark.parametrize("kind", [*WEIGHTS, "int8 weights and activations"])
def test_through_inductor(kind):
    """Every piece is compiled, with no warning of one that is not."""
    model = quantised(torchao(**WEIGHTS.get(kind, W8A8)))
    check(model, video_inputs(model, 8), lowering="staged", **({} if kind in WEIGHTS else ROUNDED))


@pytest.mark.long
def test_layers_that_differ_in_their_weights_alone_are_compiled_apart():
    model = tiny_llava_onevision(vision_layers=5, text_layers=1, text_hidden=64)
    quantised(torchao(**WEIGHTS["int8 weights"]), model, where=".encoder.layers.2.")
    quantised(torchao(**WEIGHTS["float8 weights"]), model, where=".encoder.layers.3.")
    inputs = video_inputs(model, 8)
    options = {**OPTIONS, "merge_layers": (0,)}
    got = rows(compiled(model, lowering="staged", **options), inputs)
    earlytom_compile.restore(model)
    (expected,) = compressed_videos(model, inputs, **options)
    torch.testing.assert_close(got, expected.features, atol=2e-5, rtol=1e-4)


REUSE = {"variant": "plus", "retain_ratio": 0.3, "full_layers": (2,)}


def check_reuse(model, *, lowering="eager", assert_close=assert_same, **options):
    """As :func:`check`, where unchanged patches are reused."""
    options = {**REUSE, **options}
    inputs = video_inputs(model, 6, changing=0.3)
    got = rows(earlytom_compile.compile(model, strict=True, lowering=lowering, **options), inputs)
    (told,) = earlytom_compile.report(model).to_dict()["videos"]
    earlytom_compile.restore(model)
    assert 36 < sum(told["patches"]["by_frame"]) < 6 * 36
    (expected,), (plain,) = (compressed_videos(each, inputs, **options) for each in (model, tiny()))
    assert_close(got, expected.features)
    assert (plain.features - got).abs().max() > 1e-3


@pytest.mark.parametrize("kind", cases(("int8 weights",), among=[(kind,) for kind in WEIGHTS]))
def test_weights_alone_with_patches_reused(kind):
    check_reuse(quantised(torchao(**WEIGHTS[kind])))


def test_weights_and_activations_with_patches_reused():
    """A row is rounded by its own largest value, whatever rows it is packed with."""
    model = quantised(torchao(**W8A8))
    linear, x = model.model.vision_tower.encoder.layers[0].mlp.fc1, torch.randn(6, 36, 32)
    some = torch.rand(6, 36) < 0.3
    with torch.no_grad():
        assert torch.equal(linear(x[some]), linear(x)[some])
    check_reuse(model, **REUSE_ROUNDED)


@pytest.mark.long
@pytest.mark.parametrize("kind", [*WEIGHTS, "int8 weights and activations"])
def test_patches_reused_through_inductor(kind):
    model = quantised(torchao(**WEIGHTS.get(kind, W8A8)))
    check_reuse(model, lowering="staged", **({} if kind in WEIGHTS else REUSE_ROUNDED))


# --- Others ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("quantised::dequantise", mutates_args=())
def dequantise(packed: Tensor, scale: Tensor) -> Tensor:
    """[N, D / 2] of two 4-bit numbers each, [N] -> float32 [N, D]."""
    return (torch.stack((packed & 15, packed >> 4), -1).flatten(1).float() - 8) * scale[:, None]


@dequantise.register_fake
def _(packed: Tensor, scale: Tensor) -> Tensor:
    return scale.new_empty(packed.shape[0], 2 * packed.shape[1])


@torch.library.custom_op("quantised::matmul_4bit", mutates_args=())
def matmul_4bit(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(x, dequantise(packed, scale), bias)


@matmul_4bit.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


@torch.library.custom_op("quantised::centred_matmul", mutates_args=())
def centred_matmul(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """No linear: it knows all tokens of a frame."""
    return nn.functional.linear(x - x.mean(-2, keepdim=True), dequantise(packed, scale), bias)


@centred_matmul.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


class Linear4bit(nn.Module):
    """Weights in two buffers; ``how`` they are multiplied with."""

    def __init__(self, linear: nn.Linear, how: str) -> None:
        super().__init__()
        self.how, self.bias = how, linear.bias
        weight = linear.weight.detach()
        scale = weight.abs().amax(1) / 7
        levels = (weight / scale[:, None]).round().to(torch.int8) + 8
        self.register_buffer("packed", (levels[:, ::2] | levels[:, 1::2] << 4).to(torch.uint8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "dequantised":
            return nn.functional.linear(x, torch.ops.quantised.dequantise(self.packed, self.scale), self.bias)
        return getattr(torch.ops.quantised, self.how)(x, self.packed, self.scale, self.bias)


def packed(how):
    model = tiny()
    for part in (model.model.vision_tower, model.model.multi_modal_projector, model.model.language_model):
        for name, module in list(part.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, own = name.rpartition(".")
                setattr(part.get_submodule(parent), own, Linear4bit(module, how))
    return model


@pytest.mark.parametrize("how", cases(("matmul_4bit",), among=[("matmul_4bit",), ("dequantised",)]))
def test_opaque_linears(how):
    model = packed(how)
    inputs = video_inputs(model, 8)
    check(model, inputs)
    tokens = compressed_generate(model, inputs, 3, **OPTIONS)
    assert torch.equal(new_tokens(compiled(model), inputs, max_new_tokens=3), tokens)


@pytest.mark.long
@pytest.mark.parametrize("how", ["matmul_4bit", "dequantised"])
def test_opaque_linears_with_patches_reused(how):
    check_reuse(packed(how))


@pytest.mark.long
@pytest.mark.parametrize("how", ["matmul_4bit", "dequantised"])
def test_opaque_linears_through_inductor(how):
    model = packed(how)
    check(model, video_inputs(model, 8), lowering="staged")


def test_an_opaque_operator_that_knows_other_tokens():
    model = packed("centred_matmul")
    inputs = video_inputs(model, 8)
    with torch.no_grad():
        (own,) = model.model.get_video_features(inputs["pixel_values_videos"], return_dict=True).pooler_output
        compiled(model)
        with pytest.warns(earlytom_compile.EarlyTomFallbackWarning, match="quantised::centred_matmul.*mixes"):
            torch.testing.assert_close(rows(model, inputs)[: len(own)], own)  # 5.17: without its newline
