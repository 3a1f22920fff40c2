"""A vision tower that reuses unchanged patches, against hooks on its own layers that do so in loops."""

import hypothesis.strategies as st
import pytest
import torch
from effort import diagonal, examples
from hypothesis import given
from oracle_reuse import ReusingEncoder
from scenes import standing_camera
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import earlytom_compile
from earlytom_compile import EarlyTomConfigError

SIZES = {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2, "image_size": 26, "patch_size": 4}
TOWERS = {
    "SigLIP": lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES, intermediate_size=64)),
    "CLIP with a class token": lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES, intermediate_size=64)),
    "DINOv2 with scaled residuals": lambda: Dinov2Model(Dinov2Config(**SIZES, layerscale_value=0.7)),
}
OPTIONS = {"variant": "paper", "reuse": True, "lowering": "eager", "strict": True}


def made(name):
    torch.manual_seed(0)
    tower = TOWERS[name]().eval()
    for parameter in tower.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return tower


@pytest.fixture(scope="module")
def towers():
    """Each with the functions that were compiled for it, by options."""
    return {name: (made(name), {}) for name in TOWERS}


def encoded(towers, name, pixels, **options):
    tower, compiled = towers[name]
    key = repr(sorted(options.items()))
    if key not in compiled:
        compiled[key] = earlytom_compile.compile_tower(tower, **{**OPTIONS, **options})
    return compiled[key](pixels)


def layers_of(tower):
    named = (getattr(module, name, None) for module in tower.modules() for name in ("layers", "layer"))
    return next(found for found in named if isinstance(found, torch.nn.ModuleList))


@torch.no_grad()
def expected(towers, name, pixels, *, full_layers, tau_reuse=0.03, encode_ratio=None, scored=3):
    tower, _ = towers[name]
    encoder = ReusingEncoder(
        layers_of(tower),
        pixels,
        4,
        tau_reuse=tau_reuse,
        full_layers=full_layers,
        encode_ratio=encode_ratio,
        importance_layer=scored,
    )
    with encoder.hooked():
        return encoder, tower(pixels).last_hidden_state


def standing(frames, changing, seed=0):
    return standing_camera(frames, 26, patch=4, changing=changing, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name, full_layers", diagonal(TOWERS, [(), (4,), (0,), (1, 3), (0, 1, 2, 3, 4)]))
def test_any_layers_in_full(towers, name, full_layers):
    for frames, changing in ((6, 0.3), (3, 0.1), (2, 0.0)):
        pixels = standing(frames, changing, seed=frames)
        got = encoded(towers, name, pixels, full_layers=full_layers)
        encoder, hidden = expected(towers, name, pixels, full_layers=full_layers)
        torch.testing.assert_close(got.hidden, hidden, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(got.importance, encoder.importance, atol=1e-6, rtol=1e-4)
        assert torch.equal(got.computed_in, torch.as_tensor(encoder.plan.source))
        assert got.sources == tuple(((frame, 1.0),) for frame in range(frames)), "no frames merge"


@pytest.mark.parametrize("name", TOWERS)
@examples(8)
@given(
    frames=st.integers(2, 7),
    changing=st.floats(0, 0.7),
    encode_ratio=st.one_of(st.none(), st.sampled_from([0.01, 0.3, 0.55, 1.0])),
    seed=st.integers(0, 1000),
)
def test_budgets_and_videos_of_all_kinds(towers, name, frames, changing, encode_ratio, seed):
    pixels = standing(frames, changing, seed)
    got = encoded(towers, name, pixels, full_layers=(4,), encode_ratio=encode_ratio)
    encoder, hidden = expected(towers, name, pixels, full_layers=(4,), encode_ratio=encode_ratio)
    torch.testing.assert_close(got.hidden, hidden, atol=1e-5, rtol=1e-4)
    assert torch.equal(got.computed_in, torch.as_tensor(encoder.plan.source))


@pytest.mark.parametrize("name", TOWERS)
def test_everything_active_is_the_tower_itself(towers, name):
    """A video in which everything moves is computed as if nobody had asked for anything."""
    tower, _ = towers[name]
    pixels = standing(5, 1.0)
    got = encoded(towers, name, pixels, full_layers=(4,))
    with torch.no_grad():
        plain = tower(pixels).last_hidden_state
    own = torch.arange(5)[:, None].expand(-1, plain.shape[1])
    assert torch.equal(got.computed_in, own)
    torch.testing.assert_close(got.hidden, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lowering", ["staged", pytest.param("whole", marks=pytest.mark.long)])
def test_inductor_computes_the_same_for_all_lengths(towers, lowering):
    options = {"full_layers": (2, 4), "lowering": lowering, "variant": "plus", "reuse": None}
    for frames, changing in ((6, 0.3), (4, 0.1), (2, 0.9)):
        pixels = standing(frames, changing, seed=frames)
        got = encoded(towers, "CLIP with a class token", pixels, **options)
        _, hidden = expected(towers, "CLIP with a class token", pixels, full_layers=(2, 4))
        assert got.importance is None
        torch.testing.assert_close(got.hidden, hidden, atol=1e-4, rtol=1e-3)


def test_a_single_frame_has_nothing_to_reuse(towers):
    tower, _ = towers["SigLIP"]
    pixels = standing(1, 0.0)
    got = encoded(towers, "SigLIP", pixels, full_layers=(4,))
    with torch.no_grad():
        torch.testing.assert_close(got.hidden, tower(pixels).last_hidden_state, atol=1e-5, rtol=1e-5)
    assert got.computed_in is None


def test_layers_that_do_not_exist(towers):
    with pytest.raises(EarlyTomConfigError, match=r"full_layers=\(1, 9\): layer 9 does not exist.*layers 0 to 4"):
        encoded(towers, "SigLIP", standing(3, 0.1), full_layers=(1, 9))
