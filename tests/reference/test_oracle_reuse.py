"""The oracle of reuse itself: where everything is active it is the model, and videos do not know of each other."""

import pytest
import torch
from oracle import compressed_forward, compressed_generate, compressed_videos
from oracle_reuse import ReusingEncoder
from scenes import standing_camera
from tiny_models import tiny_llava_next_video, tiny_llava_onevision, tokens_per_frame, video_inputs
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from earlytom_compile.config import EarlyTomConfig

SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 26, "patch_size": 4}
TOWERS = {
    "SigLIP": lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES, intermediate_size=64)),
    "CLIP": lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES, intermediate_size=64)),
    "DINOv2": lambda: Dinov2Model(Dinov2Config(**SIZES, layerscale_value=0.7)),
}
REUSE = {"retain_ratio": 0.25, "variant": "plus", "full_layers": ()}


def tower_of(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = TOWERS[name]().eval()
        for parameter in tower.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return tower


def layers_of(tower):
    named = (getattr(module, name, None) for module in tower.modules() for name in ("layers", "layer"))
    return next(found for found in named if isinstance(found, torch.nn.ModuleList))


def pixels_of(frames, changing, seed=0):
    return standing_camera(frames, 26, patch=4, changing=changing, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def encoded(tower, pixels, **options):
    encoder = ReusingEncoder(
        layers_of(tower), pixels, 4, **{"tau_reuse": 0.06, "full_layers": (), "importance_layer": 2, **options}
    )
    with encoder.hooked():
        return encoder, tower(pixels).last_hidden_state


@pytest.mark.parametrize("name", TOWERS)
def test_everything_active_is_the_tower_itself(name):
    tower, pixels = tower_of(name), pixels_of(5, changing=0.4)
    with torch.no_grad():
        plain = tower(pixels).last_hidden_state
    encoder, hidden = encoded(tower, pixels, encode_ratio=1.0)
    assert encoder.plan.computed == hidden.shape[0] * hidden.shape[1]
    assert torch.equal(hidden, plain)
    _, all_full = encoded(tower, pixels, full_layers=range(4))
    assert torch.equal(all_full, plain)
    reused, hidden = encoded(tower, pixels)
    assert reused.plan.computed < plain.shape[0] * plain.shape[1]
    assert (hidden - plain).abs().max() > 0.1
    with torch.no_grad():
        assert torch.equal(tower(pixels).last_hidden_state, plain), "hooks are gone"


@pytest.mark.parametrize("name", TOWERS)
def test_a_still_video_is_its_first_frame(name):
    tower, pixels = tower_of(name), pixels_of(4, changing=0.0)
    encoder, hidden = encoded(tower, pixels, full_layers=(1,))
    assert encoder.plan.computed == 36 + 4 * (hidden.shape[1] - 36), "a class token is computed in every frame"
    with torch.no_grad():
        alone = tower(pixels[:1]).last_hidden_state
    torch.testing.assert_close(hidden, alone.expand_as(hidden), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", TOWERS)
def test_importance_of_everything_active_is_the_layer_s_own_attention(name):
    tower, pixels = tower_of(name), pixels_of(3, changing=0.5)
    encoder, _ = encoded(tower, pixels, encode_ratio=1.0)
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        attention = tower(pixels, output_attentions=True).attentions[2]
    torch.testing.assert_close(encoder.importance, attention.mean((1, 2)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("full_layers", [(), (2,)])
def test_importance_is_that_of_what_the_layer_sees(full_layers):
    """A place that reads another row is asked with that row's key, unless its layer is a full one."""
    tower, pixels = tower_of("CLIP"), pixels_of(4, changing=0.3)
    inputs = []
    layer = layers_of(tower)[2]

    def received(module, seen):
        inputs.append(seen)
        return torch.zeros(seen.shape[:2])

    encoder, _ = encoded(tower, pixels, full_layers=full_layers, received=received)
    before = encoder.outputs[1]
    places = torch.arange(before.shape[1])
    expected = before if full_layers else before[encoder.plan.source, places]
    assert torch.equal(inputs[0], expected)
    attention, normed = layer.self_attn, layer.layer_norm1(expected)
    query, key = (
        project(normed).unflatten(-1, (2, 16)).transpose(1, 2) for project in (attention.q_proj, attention.k_proj)
    )
    with torch.no_grad():
        own = (query @ key.transpose(-1, -2) / 4).softmax(-1).mean((1, 2))
    torch.testing.assert_close(encoded(tower, pixels, full_layers=full_layers)[0].importance, own, atol=1e-6, rtol=0)


# --- Whole models ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return tiny_llava_onevision()


@pytest.mark.parametrize("make", [tiny_llava_onevision, tiny_llava_next_video])
@torch.no_grad()
def test_everything_active_and_kept_is_the_model_itself(make):
    model = make()
    inputs = video_inputs(model, frames=6, changing=0.4)
    everything = {"retain_ratio": 1.0, "variant": "plus", "encode_ratio": 1.0}
    torch.testing.assert_close(compressed_forward(model, inputs, **everything).logits, model(**inputs).logits)


@pytest.mark.parametrize("variant", ["paper", "released", "plus"])
@torch.no_grad()
def test_a_video_alone_is_the_same_video_in_a_batch(model, variant):
    inputs = video_inputs(model, frames=8, videos_per_row=(1, 1), changing=0.3)
    options = {**REUSE, "variant": variant, "reuse": True, "full_layers": (3,)}
    both = compressed_videos(model, inputs, **options)
    for number, pixels in enumerate(inputs["pixel_values_videos"]):
        alone = compressed_videos(model, {**video_inputs(model, 8), "pixel_values_videos": pixels[None]}, **options)
        assert torch.equal(alone[0].kept, both[number].kept)
        assert torch.equal(alone[0].features, both[number].features)


@pytest.mark.parametrize("variant", ["paper", "released", "plus"])
@torch.no_grad()
def test_no_frames_merge_and_the_budget_of_tokens_stays(model, variant):
    inputs = video_inputs(model, frames=8, changing=0.3)
    (video,) = compressed_videos(model, inputs, **{**REUSE, "variant": variant, "reuse": True})
    assert video.frames_after == []
    assert int(video.kept[:, 0].max()) == 7
    if variant != "released":
        assert len(video.kept) == round(0.25 * 8 * tokens_per_frame(model))


@torch.no_grad()
def test_the_inputs_of_the_tests_are_reused_and_logits_differ(model):
    """A guard for every test that compares with the oracle: there must be something to get wrong."""
    inputs = video_inputs(model, frames=8, changing=0.3)
    full = compressed_forward(model, inputs, **{**REUSE, "encode_ratio": 1.0}).logits
    logits = [full]
    for options in ({}, {"full_layers": (2,)}, {"full_layers": (5,)}, {"encode_ratio": 0.3}, {"encode_ratio": 0.7}):
        logits.append(compressed_forward(model, inputs, **{**REUSE, **options}).logits)
        assert all((logits[-1] - others).abs().max() > 1e-2 for others in logits[:-1]), options


@torch.no_grad()
def test_defaults_are_those_of_the_options(model):
    """``plus`` reuses, and the others do not."""
    inputs = video_inputs(model, frames=8, changing=0.3)

    def logits(**options):
        return compressed_forward(model, inputs, retain_ratio=0.25, **options).logits

    plus = logits(variant="plus")
    assert torch.equal(plus, logits(variant="plus", reuse=True, **defaults(6)))
    assert not torch.equal(plus, logits(variant="plus", reuse=False))
    assert torch.equal(logits(variant="paper"), logits(variant="paper", reuse=False))


def defaults(layers):
    config = EarlyTomConfig(variant="plus")
    return {"full_layers": config.resolve_full_layers(layers), "tau_reuse": config.tau_reuse}


@torch.no_grad()
def test_generate_goes_on_from_those_logits(model):
    inputs = video_inputs(model, frames=6, changing=0.3)
    tokens = compressed_generate(model, inputs, 3, **REUSE)
    assert tokens.shape == (1, 3)
    assert torch.equal(tokens[:, 0], compressed_forward(model, inputs, **REUSE).logits[:, -1].argmax(-1))
