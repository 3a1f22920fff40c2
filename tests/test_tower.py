"""A vision tower alone: merged frames, what they are made of, and their importance, against hooks on its layers."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracle import MergingEncoder, Options
from scenes import video
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

import earlytom_compile
from earlytom_compile import EarlyTomCompileError, EarlyTomConfigError, EarlyTomFallbackWarning

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 2, "image_size": 24}
OPTIONS = {
    "variant": "paper",
    "retain_ratio": 0.2,
    "merge_layers": (0, 2),
    "reuse": False,
    "tau_seg": 0.3,
    "lowering": "eager",
}
TOWERS = {
    "SigLIP with a pooling head": lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES, patch_size=4)),
    "CLIP with a class token": lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES, patch_size=4)),
}


def pictures(frames, seed=0):
    return video(frames, 24, scenes=2, generator=torch.Generator().manual_seed(seed))


def made(name):
    torch.manual_seed(0)
    tower = TOWERS[name]().eval()
    for parameter in tower.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return tower


@torch.no_grad()
def expected(tower, pixels, **options):
    """(hidden [N, S, D], importance [N, S], frames after each merge)."""
    layers = next(m.layers for m in tower.modules() if isinstance(getattr(m, "layers", None), torch.nn.ModuleList))
    kept = {name: value for name, value in {**OPTIONS, **options}.items() if name != "lowering"}
    encoder = MergingEncoder(layers, kept["merge_layers"], len(pixels), Options(**kept))
    with encoder.hooked():
        hidden = tower(pixels).last_hidden_state
    return hidden, encoder.importance, encoder.frames_after


@pytest.mark.parametrize("name", TOWERS)
def test_frames_of_every_length(name):
    tower = made(name)
    encode = earlytom_compile.compile_tower(tower, **OPTIONS)
    for frames in (12, 7, 1, 2):
        pixels = pictures(frames, seed=frames)
        got = encode(pixels)
        hidden, importance, left = expected(tower, pixels)
        torch.testing.assert_close(got.hidden, hidden, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(got.importance, importance, atol=1e-6, rtol=1e-4)
        assert len(got.sources) == left[-1] and (frames < 12 or left[-1] < frames)


def test_sources_tell_what_a_frame_is_made_of():
    """With a merge behind the embedding's first layer alone, its frames are the mixture that the sources name."""
    tower = made("SigLIP with a pooling head")

    def first_layer(tower, x):
        return tower(x, output_hidden_states=True).hidden_states[1]

    encode = earlytom_compile.compile_tower(tower, hidden=first_layer, **{**OPTIONS, "merge_layers": (0,)})
    pixels = pictures(12)
    got = encode(pixels)
    with torch.no_grad():
        plain = first_layer(tower, pixels)
    mixed = torch.stack([sum(share * plain[frame] for frame, share in source) for source in got.sources])
    torch.testing.assert_close(got.hidden, mixed, atol=1e-5, rtol=1e-4)
    assert any(len(source) > 1 for source in got.sources)
    assert all(abs(sum(share for _, share in source) - 1) < 1e-5 for source in got.sources)


def test_plus_needs_no_importance_and_inductor_computes_the_same():
    tower, pixels = made("CLIP with a class token"), pictures(12)
    got = earlytom_compile.compile_tower(tower, **{**OPTIONS, "variant": "plus", "lowering": "staged"})(pixels)
    assert got.importance is None
    torch.testing.assert_close(got.hidden, expected(tower, pixels)[0], atol=1e-4, rtol=1e-3)


def test_threads_get_their_own():
    encode = earlytom_compile.compile_tower(made("SigLIP with a pooling head"), **OPTIONS)
    videos = [pictures(6 + seed, seed) for seed in range(8)]
    alone = [encode(each) for each in videos]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(encode, videos))
    for a, b in zip(alone, together, strict=True):
        assert a.sources == b.sources and torch.equal(a.importance, b.importance)


def test_torch_compile_leaves_a_tower_alone_and_says_what_does_not():
    tower, pixels = made("CLIP with a class token"), pictures(6)
    fast = torch.compile(tower, backend="earlytom", options={"lowering": "eager"})
    with torch.no_grad(), pytest.warns(EarlyTomFallbackWarning, match=r"earlytom_compile\.compile_tower\(tower\)"):
        torch.testing.assert_close(fast(pixels).last_hidden_state, tower(pixels).last_hidden_state)


def test_a_tower_that_mixes_frames_runs_as_it_is():
    tower, pixels = made("CLIP with a class token"), pictures(6)
    mixed = {"hidden": lambda tower, x: tower(x).last_hidden_state.roll(1, 0)}
    with pytest.warns(EarlyTomFallbackWarning, match="roll.* mixes the frames"):
        got = earlytom_compile.compile_tower(tower, **mixed, **OPTIONS)(pixels)
    assert len(got.hidden) == len(got.sources) == 6 and got.importance is None
    with pytest.raises(EarlyTomCompileError, match="mixes the frames"):
        earlytom_compile.compile_tower(tower, **mixed, **OPTIONS, strict=True)(pixels)
    pooled = {"hidden": lambda tower, x: tower(x).last_hidden_state.mean(0, keepdim=True)}
    with pytest.warns(EarlyTomFallbackWarning, match="flow into .*mean.* no row for each"):
        earlytom_compile.compile_tower(tower, **pooled, **OPTIONS)(pixels)


def test_bad_input():
    with pytest.raises(EarlyTomConfigError, match="takes a vision tower"):
        earlytom_compile.compile_tower("openai/clip")
    with pytest.raises(EarlyTomConfigError, match="retain_ratio"):
        earlytom_compile.compile_tower(torch.nn.Linear(1, 1), retain_ratio=2)
    encode = earlytom_compile.compile_tower(torch.nn.Linear(1, 1))
    assert encode.config.variant == "plus"
    for bad in (torch.zeros(3, 4, 4), torch.zeros(0, 3, 4, 4), [1]):
        with pytest.raises(EarlyTomConfigError, match="frames, channels, height, width"):
            encode(bad)
