"""The operators of reuse in the order in which a compressed encoder calls them, against ``reference.py``, video by
video."""

from dataclasses import dataclass

import pytest
import torch
from effort import examples
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import ops
from pixel_strategies import budgets, places_of, reuse_arguments, thresholds
from plain_blocks import encoder, states
from torch import Tensor

from earlytom_compile.reference import encode_with_reuse, importance_with_reuse, plan_reuse, reuse_budget

some = examples(40)


@dataclass(frozen=True)
class Packed:
    """What the operators say of one call: pixels ``[V, F, C, H, W]``."""

    source: Tensor
    change: Tensor
    computed: Tensor
    measured: Tensor
    index: Tensor
    rows: Tensor
    offsets: Tensor


def pack(pixels: Tensor, grid, patch, prefix: int, *, tau_reuse: float = 0.0, budget: int | None = None) -> Packed:
    plan = ops.plan_reuse(pixels, grid, patch, prefix, tau_reuse, budget or 0)
    return Packed(*plan, *ops.pack_places(plan[0], int(plan[2].sum())))


def encode(hidden: Tensor, layers, packed: Packed, full_layers=()) -> Tensor:
    """``[V * F, S, D]``, with rows packed as long as layers reuse."""
    rows, places = None, packed.index % hidden.shape[1]

    def unpacked(hidden, rows):
        return hidden if rows is None else ops.return_places(hidden, rows, packed.index, packed.rows)

    for number, layer in enumerate(layers):
        if number in full_layers:
            hidden, rows = layer(unpacked(hidden, rows)), None
            continue
        if rows is None:
            rows = ops.take_places(hidden, packed.index)
        parts = (part.transpose(1, 2) for part in layer.project(rows, places))
        attended = ops.reuse_attention(*parts, packed.rows, packed.offsets, layer.scale)
        rows = layer.finish(rows, attended.transpose(1, 2))
    return unpacked(hidden, rows)


@st.composite
def calls(draw):
    """Arguments of plan_reuse for one to three videos of one shape, each with its own content."""
    arguments = draw(reuse_arguments())
    pixels = [arguments.pop("pixels")]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    for _ in range(draw(st.integers(0, 2))):
        order = torch.randint(0, len(pixels[0]), (len(pixels[0]),), generator=generator).sort().values
        pixels.append(pixels[0][order])
    arguments["pixels"] = torch.stack(pixels)
    if draw(st.booleans()):
        return {**arguments, "tau_reuse": draw(thresholds)}
    return {**arguments, "budget": draw(budgets({**arguments, "pixels": pixels[0]}))}


@st.composite
def encodings(draw):
    """(arguments, hidden [V * F, S, D], layers, full layers)."""
    arguments = draw(calls())
    videos, frames = arguments["pixels"].shape[:2]
    places = places_of(arguments)
    layers = encoder(draw(st.integers(1, 4)), places, draw(st.integers(0, 99)))
    full_layers = draw(st.sets(st.integers(0, len(layers) - 1), max_size=2))
    return arguments, states(videos * frames, places, draw(st.integers(0, 99))), layers, full_layers


@some
@given(calls())
def test_plans_are_those_of_the_reference(arguments):
    packed = pack(**arguments)
    for number, pixels in enumerate(arguments["pixels"]):
        plan = plan_reuse(**{**arguments, "pixels": pixels})
        assert torch.equal(packed.source[number], plan.source)
        assert torch.equal(packed.change[number], plan.change)
        assert packed.measured[number].tolist() == [plan.noise, plan.threshold]
        assert int(packed.computed[number]) == plan.computed


@some
@given(encodings())
def test_the_encoder_is_that_of_the_reference(encoding):
    arguments, hidden, layers, full_layers = encoding
    left = encode(hidden, layers, pack(**arguments), full_layers)
    videos, frames = arguments["pixels"].shape[:2]
    for number in range(videos):
        source = plan_reuse(**{**arguments, "pixels": arguments["pixels"][number]}).source
        own = slice(number * frames, (number + 1) * frames)
        expected = encode_with_reuse(hidden[own], layers, source, full_layers=full_layers)[-1]
        torch.testing.assert_close(left[own], expected, atol=1e-11, rtol=0)


@some
@given(encodings())
def test_importance_is_that_of_the_reference(encoding):
    arguments, hidden, (layer, *_), _ = encoding
    packed = pack(**arguments)
    rows = ops.take_places(hidden, packed.index)
    query, key, _ = (part.transpose(1, 2) for part in layer.project(rows, packed.index % hidden.shape[1]))
    spread = (ops.spread_places(part, packed.rows).float() for part in (query, key))
    received = ops.attention_received(*spread, layer.scale)
    videos, frames = arguments["pixels"].shape[:2]
    query, key, _ = layer.project(hidden, torch.arange(hidden.shape[1]))
    for number in range(videos):
        source = plan_reuse(**{**arguments, "pixels": arguments["pixels"][number]}).source
        own = slice(number * frames, (number + 1) * frames)
        expected = importance_with_reuse(query[own], key[own], source, scale=layer.scale)
        torch.testing.assert_close(received[own], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("ratio", "prefix"), [(None, 0), (0.4, 0), (0.4, 5)])
def test_real_sizes(ratio, prefix):
    """27 x 27 patches of 14 x 14 in 384 x 384 pixels with 6 beside the grid: a picture of which a part moves."""
    generator = torch.Generator().manual_seed(0)
    picture = torch.nn.functional.interpolate(torch.randn(1, 3, 24, 24, generator=generator), (384, 384))[0]
    pixels = picture + 0.02 * torch.randn(4, 3, 384, 384, generator=generator)
    for f in range(4):
        pixels[f, :, 100 : 200 + 9 * f, 30 * f : 30 * f + 120] = torch.randn(3, 100 + 9 * f, 120, generator=generator)
    places = prefix + 729
    budget = None if ratio is None else reuse_budget(4, places, ratio, prefix)
    options = {"prefix": prefix, "tau_reuse": 0.06, "budget": budget}
    plan = plan_reuse(pixels, (27, 27), (14, 14), **options)
    packed = pack(pixels[None], (27, 27), (14, 14), **options)
    assert places < plan.computed < 4 * places * 0.6
    assert torch.equal(packed.source[0], plan.source) and torch.equal(packed.change[0], plan.change)
    assert packed.measured[0].tolist() == [plan.noise, plan.threshold]
