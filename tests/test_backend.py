"""``torch.compile(model, backend="earlytom")`` against the eager oracle, which shares no code with it."""

import re
import warnings
from functools import partial
from itertools import product

import pytest
import torch
from effort import cases
from one_trace import OneTrace
from oracle import compressed_forward, compressed_videos
from tiny_models import tiny_llava_onevision, tokens_per_frame, video_inputs
from without_inductor import leave_pieces_as_they_are

import earlytom_compile
from earlytom_compile import (
    EarlyTomCompileError,
    EarlyTomConfigError,
    EarlyTomFallbackWarning,
    backend,
    report,
    stages,
)
from earlytom_compile.integrations.caches import cache_of
from earlytom_compile.kernels.providers import _TABLE

_LOWER = stages.lower
MERGE = {"variant": "paper", "merge_layers": (0, 2), "reuse": False, "tau_seg": 0.3}


def compress(model, **options):
    return torch.compile(model, backend="earlytom", options={"lowering": "eager", **MERGE, **options})


@pytest.fixture(scope="module")
def model():
    return tiny_llava_onevision(vision_layers=4, text_layers=1)


@pytest.fixture(scope="module")
def one_trace(model):
    return OneTrace(model.forward)


@pytest.fixture
def compressed(one_trace):
    """``compress(model, **options)``, but of each shape Dynamo traces one model for all tests."""
    return lambda **options: one_trace.through(
        partial(backend.earlytom, options={"lowering": "eager", **MERGE, **options})
    )


def assert_equals_oracle(model, compiled, inputs, **options):
    """Runs both and compares; returns (output, oracle result)."""
    options = {"retain_ratio": 0.2, "variant": "paper", **MERGE, **options}
    options.pop("lowering", None)
    with torch.no_grad():
        output = compiled(**inputs)
        expected = compressed_forward(model, inputs, **options)
    mask = expected.cut_attention_mask.bool()
    assert output.logits.shape == expected.logits.shape
    torch.testing.assert_close(output.logits[mask], expected.logits[mask], atol=1e-4, rtol=1e-4)
    videos = report(model).to_dict()["videos"]
    assert [v["frames"][1:] for v in videos] == expected.frames_after
    assert [v["tokens"][1] for v in videos] == [len(kept) for kept in expected.kept]
    return output, expected


def graphs_and_breaks(model):
    content = report(model).to_dict()
    return content["graphs"], content["recompiles"], sum(torch._dynamo.utils.counters["graph_break"].values())


def returned_features(output, kind):
    """Rows [N, C] of all images or videos that the model returns beside the logits, by its names for them."""
    if hasattr(output, f"{kind}_outputs"):
        return torch.cat(list(output[f"{kind}_outputs"].pooler_output))
    return output[f"{kind}_hidden_states"]


VARIANTS = ("paper", "released", "plus")


@pytest.mark.parametrize("variant", ["released", "plus"])
def test_other_variants_equal_the_oracle_on_new_videos_too(model, compressed, variant):
    new_videos_equal_the_oracle(model, compressed(variant=variant, retain_ratio=0.2), variant)


@pytest.mark.long  # a hundred videos compile once in the quick suite, too
@pytest.mark.parametrize("variant", VARIANTS)
def test_new_videos_equal_the_oracle_and_do_not_recompile(model, variant):
    compiled = compress(model, variant=variant, retain_ratio=0.2)
    new_videos_equal_the_oracle(model, compiled, variant)
    assert graphs_and_breaks(compiled) == (1, 0, 0)


def new_videos_equal_the_oracle(model, compiled, variant):
    counts = set()
    for seed in range(12):
        inputs = video_inputs(model, 16, seed=seed, scenes=1 + seed % 4, static=seed == 5)
        output, expected = assert_equals_oracle(model, compiled, inputs, variant=variant)
        counts.add(tuple(expected.frames_after[0]))
        assert cache_of(output).get_seq_length() == expected.logits.shape[1]
        if variant != "released":
            assert len(expected.kept[0]) == round(0.2 * 16 * tokens_per_frame(model))
    assert len(counts) > 4, "the videos are too alike to show anything"


@pytest.mark.long  # each of these kinds is in the quick suite with one variant, some of them in test_generate.py
@pytest.mark.parametrize("variant, lowering", list(product(VARIANTS, ["staged", "whole"])))
def test_lowered_by_inductor_it_equals_the_oracle(model, compressed, variant, lowering):
    compiled = compressed(variant=variant, lowering=lowering, retain_ratio=0.2)
    _, expected = assert_equals_oracle(model, compiled, video_inputs(model, 16), variant=variant)
    assert expected.frames_after[0][-1] < 16, "nothing merged, the test would compare too little"
    (record,) = report(model).records
    assert record.lowering == lowering and record.reasons == []


ROWS = {
    "one": {},
    "two rows": {"videos_per_row": (1, 1)},
    "two videos": {"videos_per_row": (2,)},
    "two and two": {"videos_per_row": (2, 2)},
    "ragged and padded": {"videos_per_row": (1, 1, 1), "before": (0, 4, 3), "after": (4, 0, 1), "left_padding": 5},
}


@pytest.mark.parametrize(
    "rows, variant, lowering",
    cases(
        ("two and two", "paper", "staged"), ("two and two", "released", "eager"),
        ("ragged and padded", "plus", "eager"),
        among=list(product(ROWS, VARIANTS, ["eager", "staged"])),
    ),
)  # fmt: skip
def test_several_videos_and_their_features(model, compressed, monkeypatch, rows, variant, lowering):
    """The features returned beside the logits are those that the language model gets."""
    leave_pieces_as_they_are(monkeypatch)
    inputs = video_inputs(model, 16, **ROWS[rows])
    compiled = compressed(variant=variant, lowering=lowering)
    output, expected = assert_equals_oracle(model, compiled, inputs, variant=variant)
    videos = compressed_videos(model, inputs, retain_ratio=0.2, **{**MERGE, "variant": variant})
    features = returned_features(output, "video")
    torch.testing.assert_close(features, torch.cat([v.features for v in videos]), atol=1e-4, rtol=1e-4)
    if hasattr(output, "video_outputs"):
        assert len(output.video_outputs.last_hidden_state) == sum(frames[-1] for frames in expected.frames_after)


@pytest.mark.gpu(only=True)
@pytest.mark.parametrize("lowering", ["eager", "staged", "whole"])
@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("place", ["device", "host"])
def test_on_a_gpu_it_is_what_it_is_on_the_cpu(place, variant, lowering):
    """In float32 with exact products, so that the oracle on the CPU decides."""
    options = {"variant": variant, "lowering": lowering, "retain_ratio": 0.2, "static_selection": place}
    model = tiny_llava_onevision(vision_layers=4, text_layers=1)
    inputs = video_inputs(model, 16)
    with torch.no_grad():
        expected = compressed_forward(model, inputs, retain_ratio=0.2, **{**MERGE, "variant": variant})
        compiled = compress(model.cuda(), **options)
        logits = compiled(**{name: x.cuda() for name, x in inputs.items()}).logits
    torch.testing.assert_close(logits.cpu(), expected.logits, atol=1e-3, rtol=1e-3)
    providers = report(compiled).to_dict()["providers"]
    select = "select_tokens" if variant == "paper" else "select_tokens_released"
    names = (select, *(name for name in _TABLE if not name.startswith("select_tokens")))
    assert len(names) == 6 and {name: providers[name] for name in names} == dict.fromkeys(names, "triton")


@pytest.mark.gpu(only=True)
@pytest.mark.parametrize("lowering", ["eager", "staged", "whole"])
def test_representatives_on_a_gpu_are_those_on_the_cpu(lowering):
    """The native body selects there: it is the one operator of frames without a Triton provider."""
    options = {"variant": "plus", "lowering": lowering, "retain_ratio": 0.2}
    model = tiny_llava_onevision(vision_layers=4, text_layers=1)
    inputs = video_inputs(model, 16)
    with torch.no_grad():
        expected = compressed_forward(model, inputs, retain_ratio=0.2, **{**MERGE, "variant": "plus"})
        compiled = compress(model.cuda(), **options)
        logits = compiled(**{name: x.cuda() for name, x in inputs.items()}).logits
    torch.testing.assert_close(logits.cpu(), expected.logits, atol=1e-3, rtol=1e-3)
    providers = report(compiled).to_dict()["providers"]
    assert providers["select_representatives"] == "triton" and providers["merge_frames"] == "triton"


def test_cuda_graphs_are_left_out_only_of_what_is_compressed(model, one_trace, monkeypatch):
    given = []
    monkeypatch.setattr(stages, "lower", lambda *args: given.append(args[3]) or args[0].forward)
    monkeypatch.setattr(backend, "lower", lambda *args: given.append(args[3]) or args[0].forward)
    compiled = one_trace.through(partial(backend.earlytom, mode="reduce-overhead"))
    with torch.no_grad():
        compiled(**video_inputs(model, 16))
        assert given and not any(options.get("triton.cudagraphs") for options in given)
        assert any("CUDA graphs" in reason for reason in report(model).to_dict()["reasons"])
        given.clear()
        with pytest.warns(EarlyTomFallbackWarning):
            compiled(**video_inputs(model, 8, videos_per_row=(0,)))
    assert any(options["triton.cudagraphs"] for options in given)


@pytest.mark.parametrize("inductor", cases((False,), among=[(False,), (True,)]), ids=["Dynamo", "Inductor"])
def test_a_hundred_videos_compile_once(model, monkeypatch, inductor):
    lowered = []
    lower = _LOWER if inductor else lambda graph_module, *args: graph_module.forward
    monkeypatch.setattr(stages, "lower", lambda *args: lowered.append(args) or lower(*args))
    compiled = compress(model, lowering="staged", retain_ratio=0.2)
    frames, kinds = set(), 0
    with torch.no_grad():
        for seed in range(100):
            inputs = video_inputs(model, 12, seed=seed, scenes=1 + seed % 5, drift=0.1 * (seed % 7))
            if seed % 10:
                compiled(**inputs)
            else:
                assert_equals_oracle(model, compiled, inputs)
            frames.add(tuple(report(model).to_dict()["videos"][0]["frames"]))
            kinds = len(lowered) if seed == 0 else kinds
    assert len(frames) > 10, "the videos are too alike to show anything"
    assert len(lowered) == kinds > 3 and graphs_and_breaks(compiled) == (1, 0, 0)


def kinds_compiled(monkeypatch, vision_layers, text_layers):
    """How many pieces Inductor would be asked for, and how many there are."""
    lowered = []
    monkeypatch.setattr(stages, "lower", lambda *args: lowered.append(args) or args[0].forward)
    model = tiny_llava_onevision(vision_layers=vision_layers, text_layers=text_layers)
    compiled = compress(model, lowering="staged", merge_layers=(0, 2))
    with torch.no_grad():
        compiled(**video_inputs(model, 8))
    pieces, kinds = report(model).to_dict()["stages"]
    assert kinds == len(lowered)
    return kinds, pieces


@pytest.mark.long  # test_split_stages.py shows it on a smaller one
def test_a_deeper_model_has_more_pieces_but_no_more_to_compile(monkeypatch):
    kinds, pieces = kinds_compiled(monkeypatch, vision_layers=5, text_layers=3)
    more_kinds, more_pieces = kinds_compiled(monkeypatch, vision_layers=7, text_layers=4)
    assert more_pieces - pieces == 7 - 5 + 4 - 3
    assert more_kinds == kinds < pieces


@pytest.mark.long  # first and last in a row it is in "ragged and padded", too
def test_the_video_may_be_all_of_the_prompt(model, compressed):
    assert_equals_oracle(model, compressed(), video_inputs(model, 8, before=0, after=0))


@pytest.mark.parametrize(
    "frames, variant",
    cases(
        *product([1], VARIANTS),
        among=list(product([1, 2, 3, 4, 5, 7, 64], VARIANTS)),
    ),
)  # fmt: skip
def test_any_number_of_frames(model, compressed, frames, variant):
    options = {"variant": variant, "merge_layers": (0, 1)}
    assert_equals_oracle(model, compressed(**options), video_inputs(model, frames, scenes=1), **options)


@pytest.mark.parametrize("retain_ratio", [0.01, 0.1, 0.5, 1.0])
def test_any_retain_ratio(model, compressed, retain_ratio):
    compiled = compressed(retain_ratio=retain_ratio)
    assert_equals_oracle(model, compiled, video_inputs(model, 16), retain_ratio=retain_ratio)


def test_default_options_and_merge_layers(model, one_trace):
    compiled = one_trace.through(partial(backend.earlytom, options={"lowering": "eager", "variant": "paper"}))
    layers = earlytom_compile.EarlyTomConfig(variant="paper").resolve_merge_layers(4)
    assert_equals_oracle(model, compiled, video_inputs(model, 16), merge_layers=layers, tau_seg=0.6)


@pytest.mark.parametrize(
    "options", [{"tau_merge": 0.5}, {"max_window": 4}, {"alpha": 0.5, "tau_seg": 0.8}, {"merge_layers": (2,)}]
)
def test_segmentation_options(model, compressed, options):
    assert_equals_oracle(model, compressed(**options), video_inputs(model, 16), **options)


@pytest.mark.long
def test_dynamic_shapes(model):
    compiled = torch.compile(
        model, backend="earlytom", dynamic=True, options={"lowering": "eager", "retain_ratio": 0.2, **MERGE}
    )
    for after in (4, 30):
        assert_equals_oracle(model, compiled, video_inputs(model, 12, after=after, seed=after))
    assert graphs_and_breaks(compiled) == (1, 0, 0)


@pytest.mark.long  # test_rewrites.py shows it on a smaller one
def test_longer_prompts_become_dynamic_not_wrong(model):
    compiled = compress(model)
    for after in (4, 30):
        assert_equals_oracle(model, compiled, video_inputs(model, 12, after=after, seed=after))


@pytest.mark.parametrize(
    "variant, lowering",
    cases(("released", "staged"), among=[("paper", "whole"), ("released", "staged"), ("plus", "staged")]),
)
def test_inductor_with_a_symbolic_prompt_length(model, variant, lowering):
    compiled = compress(model, lowering=lowering, retain_ratio=0.2, variant=variant)
    frames = set()
    for seed in range(9):
        after = (4, 9, 6)[seed % 3]
        inputs = video_inputs(model, 12, after=after, seed=seed, scenes=1 + seed % 5, drift=0.1 * (seed % 7))
        for name in ("input_ids", "attention_mask"):
            torch._dynamo.mark_dynamic(inputs[name], 1)
        _, expected = assert_equals_oracle(model, compiled, inputs, variant=variant)
        frames.add(tuple(expected.frames_after[0]))
    assert len(frames) > 4, "the videos are too alike to show anything"
    assert graphs_and_breaks(compiled) == (1, 0, 0)


@pytest.mark.parametrize("attention, layer", cases(("eager", -2), among=[("eager", -1), ("eager", -2), ("sdpa", -2)]))
def test_transformers_eager_attention_and_the_layer_before_the_last(attention, layer):
    options = {"attn_implementation": attention, "vision_feature_layer": layer}
    model = tiny_llava_onevision(vision_layers=4, text_layers=1, **options)
    assert_equals_oracle(model, compress(model), video_inputs(model, 12))


def test_position_ids_close_the_gap(model, compressed):
    inputs = video_inputs(model, 12, videos_per_row=(1, 1), left_padding=(0, 3))
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    assert_equals_oracle(model, compressed(), inputs)


def test_without_an_attention_mask(model, compressed):
    inputs = video_inputs(model, 16)
    masked, _ = assert_equals_oracle(model, compressed(), inputs)
    del inputs["attention_mask"]
    with torch.no_grad():
        torch.testing.assert_close(compressed()(**inputs).logits, masked.logits)


def test_images_in_the_same_graph_are_untouched(model):
    inputs = video_inputs(model, 12, images_per_row=(1,))
    inputs["image_sizes"] = inputs["image_sizes"].tolist()  # as a tensor, transformers reads it on the host
    compiled = compress(model)
    output, _ = assert_equals_oracle(model, compiled, inputs)
    with torch.no_grad():
        plain = model(**inputs)
    assert torch.equal(returned_features(output, "image"), returned_features(plain, "image"))
    assert graphs_and_breaks(compiled) == (1, 0, 0)


@pytest.mark.long  # test_rewrites.py has a smaller one
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs(dtype):
    model = tiny_llava_onevision(vision_layers=3, text_layers=1, dtype=dtype)
    with torch.no_grad():
        output = compress(model)(**video_inputs(model, 12))
    assert output.logits.dtype == dtype and output.logits.isfinite().all()


# --- Errors and fallbacks -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retain": 0.1}, "did you mean 'retain_ratio'"),
        ({"retain_ratio": 0}, r"retain_ratio=0: must be in \(0, 1\]"),
        ({"retain_ratio": 1.5}, r"\(0, 1\]"),
        ({"merge_layers": (1, 2)}, 'with variant="plus", the default, which reuses patches'),
        ({"variant": "paper", "merge_layers": (1, 6)}, "layer 6 does not exist; the vision encoder has layers 0 to 3"),
    ],
)
def test_bad_options_raise_our_own_error(model, one_trace, options, message):
    compiled = one_trace.through(partial(backend.earlytom, options=options))
    with torch.no_grad(), pytest.raises(EarlyTomConfigError, match=message):
        compiled(**video_inputs(model, 16))


def falls_back(model, compiled, inputs, reason):
    """The call warns with ``reason`` and equals the plain model."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # the pieces of a broken graph each have a reason of their own
        output = compiled(**inputs)
    assert any(w.category is EarlyTomFallbackWarning and re.search(reason, str(w.message)) for w in caught)
    expected = model(**inputs)
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=1e-4)
    assert any(re.search(reason, known) for known in report(model).to_dict()["reasons"])


def test_text_only_call(model, compressed):
    inputs = video_inputs(model, 8, videos_per_row=(0,))
    with torch.no_grad():
        falls_back(model, compressed(), inputs, "no vision encoder")


def test_image_only_call(model, compressed):
    inputs = video_inputs(model, 8, videos_per_row=(0,), images_per_row=(1,))
    inputs["image_sizes"] = inputs["image_sizes"].tolist()
    with torch.no_grad():
        falls_back(model, compressed(), inputs, "no video passes through the vision encoder")


def test_grad_mode(model, compressed):
    falls_back(model, compressed(), video_inputs(model, 16), "gradients are enabled")


@pytest.mark.parametrize(
    "videos, variant",
    cases(((3, 1), "paper"), among=list(product([(3, 1), (2, 1), (2, 1, 0)], ["paper", "plus", "released"]))),
)
def test_rows_with_different_numbers_of_videos(model, compressed, videos, variant):
    inputs = video_inputs(model, 8, videos_per_row=videos)
    with torch.no_grad():
        logits = compressed(variant=variant)(**inputs).logits
    expected = compressed_forward(model, inputs, retain_ratio=0.2, **{**MERGE, "variant": variant})
    seen = expected.cut_attention_mask.bool()
    torch.testing.assert_close(logits[seen], expected.logits[seen], atol=1e-4, rtol=1e-4)


def test_a_graph_for_equal_rows_meets_others(model, compressed):
    """Of one shape, so that Dynamo does not compile again, and one that no other test has traced with uneven rows."""
    run = compressed()
    even, uneven = (video_inputs(model, 6, videos_per_row=videos) for videos in ((2, 2), (3, 1)))
    missing = uneven["input_ids"].shape[1] - even["input_ids"].shape[1]
    even = video_inputs(model, 6, videos_per_row=(2, 2), left_padding=missing)
    with torch.no_grad():
        run(**even)
        falls_back(model, run, uneven, re.escape("different numbers of videos (3, 1)"))


def test_text_inside_a_video(model, compressed):
    inputs = video_inputs(model, 16)
    ids = inputs["input_ids"]
    ids[0, [0, 30]] = ids[0, [30, 0]]
    with torch.no_grad():
        falls_back(model, compressed(), inputs, "not next to each other")


@pytest.mark.parametrize("change", [-1, 1])
def test_placeholders_that_do_not_match(model, compressed, change):
    inputs = video_inputs(model, 16)
    ids = inputs["input_ids"]
    ids[0, 3 if change < 0 else 0] = 5 if change < 0 else model.config.video_token_id
    with torch.no_grad(), pytest.raises(EarlyTomConfigError, match="video placeholder tokens"):
        compressed()(**inputs)


def test_labels_fall_back_with_a_reason(model, compressed):
    inputs = video_inputs(model, 16)
    inputs["labels"] = inputs["input_ids"].clone()
    with torch.no_grad():
        falls_back(model, compressed(), inputs, "cross_entropy")


@pytest.mark.long  # test_rewrites.py has a break in a smaller one
def test_a_graph_break_behind_the_encoder(model):
    inputs = video_inputs(model, 8, images_per_row=(1,))  # image_sizes as a tensor breaks the graph
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = compress(model)(**inputs)
        expected = model(**inputs).logits
        if output.logits.shape != expected.shape:  # transformers 5.17 encodes the video in the graph behind the break
            expected = compressed_forward(model, inputs, retain_ratio=0.2, **MERGE).logits
    assert any("a graph break inside the vision path" in str(w.message) for w in caught)
    torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=1e-4)


def test_strict_turns_a_reason_into_an_error(model, compressed):
    with torch.no_grad(), pytest.raises(EarlyTomCompileError, match="no vision encoder"):
        compressed(strict=True)(**video_inputs(model, 8, videos_per_row=(0,)))


def test_model_without_a_vision_encoder():
    layer = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    compiled = torch.compile(layer, backend="earlytom")
    with torch.no_grad(), pytest.warns(EarlyTomFallbackWarning, match="no vision encoder|no video"):
        torch.testing.assert_close(compiled(x), layer(x))
