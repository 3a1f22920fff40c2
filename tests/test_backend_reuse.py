"""``torch.compile(model, backend="earlytom")`` where unchanged patches are reused, against the eager oracle."""

import warnings
from functools import partial
from itertools import product

import pytest
import torch
from effort import cases, diagonal
from one_trace import OneTrace
from oracle import compressed_forward, compressed_videos
from tiny_models import tiny_llava_onevision, tokens_per_frame, video_inputs
from without_inductor import leave_pieces_as_they_are

from earlytom_compile import EarlyTomConfig, EarlyTomFallbackWarning, backend, report
from earlytom_compile.integrations.caches import cache_of
from earlytom_compile.reference import plan_reuse

LAYERS, SIDE, PATCH = 4, 26, 4  # 2 pixels of each side belong to no patch
GRID = SIDE // PATCH
PLACES = GRID**2
REUSE = {"retain_ratio": 0.25}  # the default
BY_ATTENTION = [{"variant": variant, "reuse": True, "merge_layers": (0, 2)} for variant in ("paper", "released")]
WAYS = {"plus": REUSE, **{f"{way['variant']} and reuse": {**REUSE, **way} for way in BY_ATTENTION}}
EVERYTHING = {"variant": "plus", "retain_ratio": 1.0}


@pytest.fixture(scope="module")
def model():
    return tiny_llava_onevision(vision_layers=LAYERS, text_layers=1, image_size=SIDE, patch_size=PATCH)


@pytest.fixture(scope="module")
def one_trace(model):
    return OneTrace(model.forward)


@pytest.fixture
def compressed(one_trace):
    """``torch.compile(model, backend="earlytom", options=options)``; of each shape Dynamo traces one model for all."""
    return lambda **options: one_trace.through(partial(backend.earlytom, options={"lowering": "eager", **options}))


def places_computed(pixels, **options):
    """[F] of one video [F, 3, H, W], by the specification."""
    ratio = options.get("encode_ratio")
    plan = plan_reuse(
        pixels,
        (GRID, GRID),
        (PATCH, PATCH),
        tau_reuse=options.get("tau_reuse", EarlyTomConfig.tau_reuse),
        budget=None if ratio is None else max(PLACES, round(ratio * len(pixels) * PLACES)),
    )
    return tuple(plan.active.sum(1).tolist())


def assert_equals_oracle(model, compiled, inputs, **options):
    """Runs both and compares; returns how many places were computed of each video."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", EarlyTomFallbackWarning)
        output = compiled(**inputs)
        expected = compressed_forward(model, inputs, **options)
    mask = expected.cut_attention_mask.bool()
    assert output.logits.shape == expected.logits.shape
    torch.testing.assert_close(output.logits[mask], expected.logits[mask], atol=1e-4, rtol=1e-4)
    told = report(model).to_dict()["videos"]
    frames = inputs["pixel_values_videos"].shape[1]
    assert [video["frames"] for video in told] == [[frames]] * len(told), "no frames merge"
    assert [video["tokens"][1] for video in told] == [len(kept) for kept in expected.kept]
    computed = [places_computed(pixels, **options) for pixels in inputs["pixel_values_videos"]]
    assert [video["patches"]["by_frame"] for video in told] == computed
    return [sum(frames) for frames in computed]


def compilations(model):
    content = report(model).to_dict()
    return content["graphs"], content["recompiles"], sum(torch._dynamo.utils.counters["graph_break"].values())


@pytest.mark.parametrize("way", WAYS)
def test_new_videos_equal_the_oracle(model, compressed, way):
    compiled, computed = compressed(**WAYS[way]), set()
    for seed, changing in enumerate((0.0, 0.1, 0.3, 0.55, 0.7, 1.0)):
        inputs = video_inputs(model, 6, seed=seed, changing=changing)
        computed |= set(assert_equals_oracle(model, compiled, inputs, **WAYS[way]))
    assert min(computed) == PLACES and max(computed) == 6 * PLACES and len(computed) > 4
    inputs = video_inputs(model, 6, scenes=1, drift=0.1)  # everything changes a little
    assert_equals_oracle(model, compiled, inputs, **WAYS[way])


@pytest.mark.parametrize("way, full_layers", diagonal(WAYS, [(), (0,), (3,), (0, 1, 2, 3)]))
def test_any_layers_in_full(model, compressed, way, full_layers):
    options = {**WAYS[way], "full_layers": full_layers}
    (computed,) = assert_equals_oracle(model, compressed(**options), video_inputs(model, 6, changing=0.3), **options)
    assert computed < 6 * PLACES


ROWS = {
    "one": {},
    "two rows": {"videos_per_row": (1, 1)},
    "two videos": {"videos_per_row": (2,)},
    "two and two": {"videos_per_row": (2, 2)},
    "ragged and padded": {"videos_per_row": (1, 1, 1), "before": (0, 4, 3), "after": (4, 0, 1), "left_padding": 5},
}


@pytest.mark.parametrize(
    "rows, way, lowering",
    cases(
        ("two and two", "plus", "staged"), ("two and two", "released and reuse", "eager"),
        ("ragged and padded", "paper and reuse", "eager"),
        among=list(product(ROWS, WAYS, ["eager", "staged"])),
    ),
)  # fmt: skip
def test_several_videos_and_their_features(model, compressed, monkeypatch, rows, way, lowering):
    """Each has a plan of its own; those of one call are packed together."""
    leave_pieces_as_they_are(monkeypatch)
    inputs, videos = video_inputs(model, 5, changing=0.3, **ROWS[rows]), sum(ROWS[rows].get("videos_per_row", (1,)))
    if videos > 1:  # one stands still, and in one everything moves
        inputs["pixel_values_videos"][0] = inputs["pixel_values_videos"][0, :1]
        inputs["pixel_values_videos"][-1] = torch.randn(5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    compiled = compressed(**WAYS[way], lowering=lowering)
    computed = assert_equals_oracle(model, compiled, inputs, **WAYS[way])
    assert videos == 1 or (computed[0], computed[-1]) == (PLACES, 5 * PLACES)
    with torch.no_grad():
        output = compiled(**inputs)
    features = torch.cat([video.features for video in compressed_videos(model, inputs, **WAYS[way])])
    if hasattr(output, "video_outputs"):
        assert len(output.video_outputs.last_hidden_state) == videos * 5
        torch.testing.assert_close(torch.cat(list(output.video_outputs.pooler_output)), features, atol=1e-4, rtol=1e-4)
    else:
        torch.testing.assert_close(output.video_hidden_states, features, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "videos, way", cases(((3, 1), "plus"), among=list(product([(3, 1), (2, 1), (2, 1, 0)], WAYS)))
)  # fmt: skip
def test_rows_with_different_numbers_of_videos(model, compressed, videos, way):
    inputs = video_inputs(model, 4, videos_per_row=videos, changing=0.3)
    assert_equals_oracle(model, compressed(**WAYS[way]), inputs, **WAYS[way])


@pytest.mark.parametrize("way, encode_ratio", diagonal(WAYS, [0.01, 0.4, 1.0]))
def test_a_budget_is_kept_exactly(model, compressed, way, encode_ratio):
    options = {**WAYS[way], "encode_ratio": encode_ratio}
    compiled = compressed(**options)
    for seed, changing in enumerate((0.0, 0.3, 1.0)):
        inputs = video_inputs(model, 6, videos_per_row=(2,), seed=seed, changing=changing)
        computed = assert_equals_oracle(model, compiled, inputs, **options)
        assert computed == [max(PLACES, round(encode_ratio * 6 * PLACES))] * 2


def test_a_threshold_of_somebodys_own(model, compressed):
    inputs = video_inputs(model, 6, changing=0.3)
    found = []
    for tau_reuse in (0.0, 1.0, 4.0, 100.0):
        options = {**REUSE, "tau_reuse": tau_reuse}
        found += assert_equals_oracle(model, compressed(**options), inputs, **options)
    assert found == sorted(found, reverse=True) and found[0] > found[2] >= found[3] == PLACES


@pytest.mark.parametrize("frames", cases((1,), (2,), among=[(1,), (2,), (3,), (33,)]))
def test_any_number_of_frames(model, compressed, frames):
    inputs = video_inputs(model, frames, changing=0.2)
    if frames > 1:
        assert_equals_oracle(model, compressed(**REUSE), inputs, **REUSE)
        return
    with torch.no_grad():
        logits = compressed(**REUSE)(**inputs).logits
    torch.testing.assert_close(logits, compressed_forward(model, inputs, **REUSE).logits, atol=1e-4, rtol=1e-4)
    assert "patches" not in report(model).to_dict()["videos"][0]


@torch.no_grad()
def test_where_everything_moves_and_stays_it_is_the_model_itself(model, compressed):
    inputs = video_inputs(model, 5, videos_per_row=(1, 1), changing=1.0)
    own = model(**inputs).logits
    for options in ({}, {"full_layers": ()}, {"encode_ratio": 1.0}):
        torch.testing.assert_close(compressed(**EVERYTHING, **options)(**inputs).logits, own, atol=1e-5, rtol=1e-5)
        assert all(sum(v["patches"]["by_frame"]) == 5 * PLACES for v in report(model).to_dict()["videos"])


@torch.no_grad()
def test_a_video_that_stands_still_is_its_first_frame_everywhere(model, compressed):
    inputs = video_inputs(model, 5, changing=0.0)
    own = model(**inputs).logits
    torch.testing.assert_close(compressed(**EVERYTHING, full_layers=())(**inputs).logits, own, atol=1e-4, rtol=1e-4)
    assert report(model).to_dict()["videos"][0]["patches"]["by_frame"] == (PLACES, 0, 0, 0, 0)


@pytest.mark.parametrize("encode_ratio", cases((None,), among=[(None,), (0.5,)]))
def test_new_videos_do_not_recompile(model, encode_ratio):
    """Neither what changes nor how long the prompt is makes another graph; through Inductor, piece by piece."""
    options = {**REUSE, **({} if encode_ratio is None else {"encode_ratio": encode_ratio})}
    compiled, computed = torch.compile(model, backend="earlytom", options=options), set()
    for seed, changing in enumerate((0.3, 0.0, 0.1, 0.9, 1.0, 0.6)):
        inputs = video_inputs(model, 6, after=(4, 9, 6)[seed % 3], seed=seed, changing=changing)
        for name in ("input_ids", "attention_mask"):
            torch._dynamo.mark_dynamic(inputs[name], 1)
        computed |= set(assert_equals_oracle(model, compiled, inputs, **options))
    assert len(computed) == 1 if encode_ratio else len(computed) > 3
    assert compilations(model) == (1, 0, 0) and not report(model).to_dict()["reasons"]


@pytest.mark.long
@pytest.mark.parametrize("way, lowering", list(product(WAYS, ["staged", "whole"])))
def test_lowered_by_inductor_it_equals_the_oracle(model, compressed, way, lowering):
    compiled = compressed(**WAYS[way], lowering=lowering)
    for seed, changing in enumerate((0.2, 0.0, 1.0)):
        inputs = video_inputs(model, 6, videos_per_row=(2,), seed=seed, changing=changing)
        assert_equals_oracle(model, compiled, inputs, **WAYS[way])
    (record,) = report(model).records
    assert record.lowering == lowering and record.reasons == []


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_dynamic_shapes(model, way):
    compiled = torch.compile(model, backend="earlytom", dynamic=True, options={"lowering": "eager", **WAYS[way]})
    for after in (4, 30):
        inputs = video_inputs(model, 5, after=after, seed=after, changing=0.3)
        assert_equals_oracle(model, compiled, inputs, **WAYS[way])
    assert compilations(compiled) == (1, 0, 0)


@pytest.mark.parametrize(
    "attention, layer", cases(("eager", -2), among=[("eager", -1), ("eager", -2), ("sdpa", -2)])
)  # fmt: skip
def test_transformers_eager_attention_and_the_layer_before_the_last(attention, layer):
    given = {"attn_implementation": attention, "vision_feature_layer": layer}
    model = tiny_llava_onevision(vision_layers=5, text_layers=1, image_size=SIDE, patch_size=PATCH, **given)
    compiled = torch.compile(model, backend="earlytom", options={"lowering": "eager", **REUSE})
    assert_equals_oracle(model, compiled, video_inputs(model, 5, changing=0.3), **REUSE)
    assert report(model).to_dict()["full_layers"] == ([2, 3] if layer == -2 else [3, 4])


@torch.no_grad()
def test_images_in_the_same_graph_are_untouched(model):
    inputs = video_inputs(model, 5, images_per_row=(1,), changing=0.3)
    inputs["image_sizes"] = inputs["image_sizes"].tolist()  # as a tensor, transformers reads it on the host
    compiled = torch.compile(model, backend="earlytom", options={"lowering": "eager", **REUSE})
    assert_equals_oracle(model, compiled, inputs, **REUSE)
    output, plain = compiled(**inputs), model(**inputs)
    if hasattr(plain, "image_outputs"):
        ours, own = (torch.cat(list(x.image_outputs.pooler_output)) for x in (output, plain))
    else:
        ours, own = output.image_hidden_states, plain.image_hidden_states
    assert torch.equal(ours, own)
    assert compilations(model) == (1, 0, 0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", cases((torch.bfloat16,), among=[(torch.bfloat16,), (torch.float16,)]))
def test_half_precision_is_no_further_off_than_the_oracle_in_half_precision(dtype):
    """All tokens stay, so that rounding decides about none of them."""
    exact = tiny_llava_onevision(vision_layers=LAYERS, text_layers=1, image_size=SIDE, patch_size=PATCH)
    half = tiny_llava_onevision(vision_layers=LAYERS, text_layers=1, image_size=SIDE, patch_size=PATCH, dtype=dtype)
    for parameter, rounded in zip(exact.parameters(), half.parameters(), strict=True):
        parameter.copy_(rounded)
    inputs = video_inputs(half, 6, changing=0.3)
    wanted = compressed_forward(
        exact, {**inputs, "pixel_values_videos": inputs["pixel_values_videos"].float()}, **EVERYTHING
    )
    compiled = torch.compile(half, backend="earlytom", options={"lowering": "eager", **EVERYTHING})
    logits, own = compiled(**inputs).logits, compressed_forward(half, inputs, **EVERYTHING).logits
    assert logits.dtype == dtype
    patches = report(half).to_dict()["videos"][0]["patches"]["by_frame"]
    assert patches == places_computed(inputs["pixel_values_videos"][0]) and sum(patches) < 6 * PLACES
    off, own_off = (((x.float() - wanted.logits) ** 2).mean().sqrt() for x in (logits, own))
    assert 0 < off < 1.5 * own_off


def test_the_cache_is_that_of_the_cut_prompt(model, compressed):
    inputs = video_inputs(model, 5, changing=0.3)
    with torch.no_grad():
        output = compressed(**REUSE)(**inputs)
    kept = round(0.25 * 5 * tokens_per_frame(model))
    text = inputs["input_ids"].shape[1] - 5 * tokens_per_frame(model)
    assert cache_of(output).get_seq_length() == text + kept


@pytest.mark.gpu(only=True)
@pytest.mark.parametrize("lowering", ["eager", "staged", "whole"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("encode_ratio", [None, 0.5])
def test_on_a_gpu_it_is_what_it_is_on_the_cpu(way, lowering, encode_ratio):
    """In float32 with exact products, so that the oracle on the CPU decides."""
    options = {**WAYS[way], **({} if encode_ratio is None else {"encode_ratio": encode_ratio})}
    model = tiny_llava_onevision(vision_layers=LAYERS, text_layers=1, image_size=SIDE, patch_size=PATCH)
    inputs = video_inputs(model, 6, videos_per_row=(2,), changing=0.3)
    with torch.no_grad():
        expected = compressed_forward(model, inputs, **options)
        compiled = torch.compile(model.cuda(), backend="earlytom", options={"lowering": lowering, **options})
        logits = compiled(**{name: x.cuda() for name, x in inputs.items()}).logits
    torch.testing.assert_close(logits.cpu(), expected.logits, atol=1e-3, rtol=1e-3)
    providers = report(compiled).to_dict()["providers"]
    ours = ("plan_reuse", "pack_places", "take_places", "reuse_attention", "return_places")
    assert {name: providers[name] for name in ours} == dict.fromkeys(ours, "triton")
