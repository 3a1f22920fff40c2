"""Merging, selecting and cutting on a model of our own, against the reference applied by hand."""

import math
import re
import time
import warnings
from collections import Counter
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from effort import cases, examples
from hand_made import VIDEO, VideoModel, capture, count, rewrite
from hypothesis import given
from hypothesis import strategies as st
from sympy import Max, expand, sympify

from earlytom_compile import (
    EarlyTomCompileError,
    EarlyTomConfigError,
    EarlyTomFallbackWarning,
    report,
    stages,
)
from earlytom_compile.passes import manager, run_on_fakes
from earlytom_compile.passes.manager import PASSES
from earlytom_compile.passes.patterns import op_name
from earlytom_compile.passes.reasons import NotApplicable
from earlytom_compile.reference import plan_frame_merge, segment_frames, select_representatives, select_tokens

OPS = ("frame_similarity", "plan_merge", "merge_frames", "attention_received", "dynamic_frames")


@torch.no_grad()
def expected_rows(model, pixels, *, retain_ratio, variant="paper", merge_layers=(0, 2), tau_seg=0.0):
    """Compressed rows of each video, layer by layer with the model's own modules and the reference."""
    rows, plus = [], variant == "plus"
    variant = "paper" if plus else variant
    for frames in pixels:
        h = model.patches(frames).flatten(2).transpose(1, 2) + model.places
        floor = math.ceil(retain_ratio * len(frames)) if variant == "paper" else 1
        for index, layer in enumerate(model.layers):
            if index == merge_layers[-1]:
                x = layer.first(h)
                q, k = (f(x).unflatten(2, (layer.heads, -1)).transpose(1, 2) for f in (layer.q, layer.k))
                importance = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1).mean((1, 2))
            h = layer(h)
            if index in merge_layers:
                plan = plan_frame_merge(h, variant=variant, tau_seg=tau_seg, min_frames=floor)
                h = plan.apply(h)
                if index == merge_layers[-1]:
                    importance = plan.apply(importance)
                    segments = segment_frames(h, variant=variant, tau_seg=tau_seg)
        pool = (lambda x: F.avg_pool2d(x, 2)) if model.switches.pool == "avg" else half_bilinear
        features = pool(model.project(h).mT.unflatten(2, (4, 4))).flatten(2).mT
        scores = pool(importance.view(-1, 1, 4, 4)).flatten(1)
        options = {"frames_in": len(frames), "retain_ratio": retain_ratio, "variant": variant}
        kept = select_tokens(scores, segments, **options)
        if plus:
            kept = select_representatives(features, frames_in=len(frames), retain_ratio=retain_ratio)
        chosen = features[kept[:, 0], kept[:, 1]]
        rows.append(torch.cat((chosen, model.break_line[None])) if model.switches.newline else chosen)
    return rows


def half_bilinear(x):
    return F.interpolate(x, size=[2, 2], mode="bilinear")


@torch.no_grad()
def expected_logits(model, ids, rows):
    """Every row of ids with its videos' placeholders cut, one row at a time."""
    rows, logits = list(rows), []
    for prompt in ids.tolist():
        embeds, position = [], 0
        while position < len(prompt):
            if prompt[position] == VIDEO:
                embeds.append(rows.pop(0))
                while position < len(prompt) and prompt[position] == VIDEO:
                    position += 1
            else:
                embeds.append(model.words.weight[prompt[position]][None])
                position += 1
        logits.append(model.head(model.reader(torch.cat(embeds)[None]))[0])
    return torch.stack(logits)


def compress(model, **options):
    options = {
        "lowering": "eager",
        "variant": "paper",
        "merge_layers": (0, 2),
        "reuse": False,
        "tau_seg": 0.0,
        **options,
    }
    return torch.compile(model, backend="earlytom", options=options, dynamic=options.pop("dynamic", None))


@pytest.mark.parametrize(
    "pool, newline, videos, rows, attention",
    cases(
        ("avg", False, 2, 2, "sdpa"), ("bilinear", True, 2, 1, "matmul"),
        among=[
            (pool, newline, *videos, attention)
            for pool in ("avg", "bilinear")
            for newline in (False, True)
            for videos in ((1, 1), (2, 2), (2, 1))
            for attention in ("sdpa", "matmul")
        ],
    ),
)  # fmt: skip
def test_numerics(pool, newline, videos, rows, attention):
    model = VideoModel(pool=pool, newline=newline, attention=attention).eval()
    ids, pixels = model.example(frames=9, videos=videos, rows=rows)
    with torch.no_grad():
        got = compress(model, retain_ratio=0.3)(ids, pixels)
    expected = expected_logits(model, ids, expected_rows(model, pixels, retain_ratio=0.3))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.long  # test_backend.py has pieces of a real one
@pytest.mark.parametrize("lowering", ["staged", "whole"])
def test_numerics_of_what_inductor_makes_of_it(lowering):
    model = VideoModel(layers=1).eval()
    ids, pixels = model.example(frames=9)
    with torch.no_grad():
        got = compress(model, retain_ratio=0.3, merge_layers=(0,), lowering=lowering)(ids, pixels)
    expected = expected_logits(model, ids, expected_rows(model, pixels, retain_ratio=0.3, merge_layers=(0,)))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    (record,) = report(model).records
    assert record.lowering == lowering and record.reasons == []


@pytest.mark.parametrize("newline", cases((True,), among=[(False,), (True,)]))
def test_numerics_released(newline):
    model = VideoModel(newline=newline).eval()
    ids, pixels = model.example(frames=12)
    with torch.no_grad():
        got = compress(model, retain_ratio=0.3, variant="released")(ids, pixels)
    rows = expected_rows(model, pixels, retain_ratio=0.3, variant="released")
    torch.testing.assert_close(got, expected_logits(model, ids, rows), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "newline, videos, rows",
    cases(
        (True, 2, 1),
        among=[(newline, *videos) for newline in (False, True) for videos in ((1, 1), (2, 2), (2, 1))],
    ),
)  # fmt: skip
def test_numerics_plus(newline, videos, rows):
    model = VideoModel(newline=newline).eval()
    ids, pixels = model.example(frames=12, videos=videos, rows=rows)
    with torch.no_grad():
        got = compress(model, retain_ratio=0.3, variant="plus")(ids, pixels)
    expected = expected_rows(model, pixels, retain_ratio=0.3, variant="plus")
    torch.testing.assert_close(got, expected_logits(model, ids, expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs(dtype):
    model = VideoModel(layers=3).eval().to(dtype)
    ids, pixels = model.example(frames=9)
    with torch.no_grad():
        got = compress(model, retain_ratio=0.3)(ids, pixels.to(dtype))
    assert got.dtype == dtype and got.shape[1] < ids.shape[1] and got.isfinite().all()


@examples(4)
@given(
    frames=st.sampled_from([1, 2, 4, 6, 8, 12, 16]),
    heads=st.sampled_from([2, 4, 8]),
    videos=st.integers(1, 2),
    dynamic=st.sampled_from([None, True]),
    seed=st.integers(0, 99),
)
def test_frame_counts_that_collide_with_other_sizes(frames, heads, videos, dynamic, seed):
    """4 and 16 are also numbers of tokens, 2, 4 and 8 heads or head sizes, 12 and 16 widths."""
    torch._dynamo.reset()
    model = VideoModel(layers=3, heads=heads).eval()
    ids, pixels = model.example(frames=frames, videos=videos, seed=seed)
    with torch.no_grad():
        got = compress(model, retain_ratio=0.3, merge_layers=(0, 1), dynamic=dynamic)(ids, pixels)
    rows = expected_rows(model, pixels, retain_ratio=0.3, merge_layers=(0, 1))
    torch.testing.assert_close(got, expected_logits(model, ids, rows), atol=1e-4, rtol=1e-4)


def test_longer_prompts_become_dynamic_not_wrong():
    model = VideoModel().eval()
    compiled = compress(model, retain_ratio=0.3)
    for after in (2, 9, 30):
        ids, pixels = model.example(after=after, seed=after)
        with torch.no_grad():
            got = compiled(ids, pixels)
        expected = expected_logits(model, ids, expected_rows(model, pixels, retain_ratio=0.3))
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    content = report(model).to_dict()
    assert (content["graphs"], content["recompiles"]) == (2, 1)


# --- What is in the graph -------------------------------------------------------------------------


def host_reads(graph_module):
    return sum(node.target == "item" for node in graph_module.graph.nodes)


def test_operators_inserted_for_each_merge_layer(rewritten):
    graph_module = rewritten().graph_module
    assert [count(graph_module, op) for op in OPS] == [3, 2, 2, 1, 1]
    assert count(graph_module, "select_tokens") == 1 and count(graph_module, "keep_positions") == 1
    assert host_reads(graph_module) == 2, "one number a merge layer"
    assert set(rewritten().seconds) == {name for name, _ in PASSES}


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_videos_too_short_to_merge_get_no_merge_ops(rewritten, frames):
    graph_module = rewritten(frames).graph_module
    assert count(graph_module, "plan_merge") == 0 and host_reads(graph_module) == 0
    assert count(graph_module, "select_tokens") == 1


@pytest.mark.parametrize("merge_layers", [(), (0, 2)])
@pytest.mark.parametrize("frames", [1, 8])
def test_plus_compares_tokens_and_asks_for_no_attention(rewritten, frames, merge_layers):
    graph_module = rewritten(frames, variant="plus", merge_layers=merge_layers).graph_module
    merges = len(merge_layers) if frames > 1 else 0
    assert [count(graph_module, op) for op in OPS] == [merges, merges, merges, 0, 0]
    assert count(graph_module, "select_representatives") == 1 and count(graph_module, "select_tokens") == 0
    assert count(graph_module, "keep_positions") == 1 and host_reads(graph_module) == merges


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_other_variants_ask_for_no_representatives(rewritten, variant):
    graph_module = rewritten(variant=variant).graph_module
    assert count(graph_module, "select_representatives") == 0 and count(graph_module, "attention_received") == 1


def recorded(graph_module):
    """Shape, strides and dtype of what every node gives; sizes that only a run tells by order of appearance."""
    unknown, values = {}, []
    for node in graph_module.graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor):
            strides = [sympify(str(stride)) for stride in value.stride()]
            strides = [expand(stride.replace(Max, lambda _, size: size)) for stride in strides]  # sizes are not 0
            text = f"{node.name} {tuple(value.shape)} {strides} {value.dtype} {value.device}"
            values.append(re.sub(r"\bu\d+\b", lambda found: unknown.setdefault(found[0], f"n{len(unknown)}"), text))
    return values


class Unusual(torch.nn.Module):
    """Channels that are not the last axis, rows that lie one after the other in memory, norms of two axes, keywords."""

    def forward(self, h):
        h = h + F.gelu(h.mT).mT + F.layer_norm(input=h, normalized_shape=(12,))
        h = h + F.layer_norm(h.unflatten(2, (3, 4)), (3, 4)).flatten(2)
        return F.silu(F.silu(h).transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("dynamic, autocast", cases((False, True), among=list(product([False, True], [False, True]))))
def test_shapes_of_position_wise_functions_are_those_that_pytorch_finds(monkeypatch, dynamic, autocast):
    model = VideoModel(layers=3, newline=True).eval()
    model.reader = torch.nn.Sequential(model.reader, Unusual())
    compile_ = partial(torch.compile, model, fullgraph=True, dynamic=dynamic)
    of_each_position, fired, found = run_on_fakes.Recorder._of_each_position, [], []

    def watched(recorder, node):
        if (result := of_each_position(recorder, node)) is not None:
            fired.append(op_name(node))
        return result

    monkeypatch.setattr(run_on_fakes.Recorder, "_of_each_position", watched)
    for names in (run_on_fakes.POSITION_WISE, frozenset()):
        torch._dynamo.reset()
        monkeypatch.setattr(run_on_fakes, "POSITION_WISE", names)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(recorded(rewrite(model, model.example(videos=2), compile_).graph_module))
    assert found[0] == found[1] and any("n1" in value for value in found[0])
    # All of three layers, projector, language model and head. None of what is unusual, but for one silu.
    assert Counter(fired) == {"linear": 3 * 6 + 2 + 6 + 1, "layer_norm": 3 * 2 + 2, "gelu": 3 + 1 + 1, "silu": 1}


def test_no_layer_merges_and_selection_still_happens(rewritten):
    graph_module = rewritten(merge_layers=()).graph_module
    assert count(graph_module, "plan_merge") == 0 and count(graph_module, "select_tokens") == 1


def test_features_alone_are_not_cut():
    model = VideoModel(tail="features").eval()
    graph_module = rewrite(model, model.example()).graph_module
    assert count(graph_module, "select_tokens") == 1 and count(graph_module, "keep_positions") == 0


def test_released_features_of_two_videos_do_not_fit_one_tensor():
    model = VideoModel(tail="features").eval()
    with pytest.raises(Exception, match="keeps a different number of tokens") as raised:
        rewrite(model, model.example(videos=2), variant="released")
    assert isinstance(raised.value.__cause__ or raised.value.inner_exception, NotApplicable)


def test_missing_merge_layer():
    model = VideoModel().eval()
    with torch.no_grad(), pytest.raises(EarlyTomConfigError, match="layer 4 does not exist.*0 to 3"):
        compress(model, merge_layers=(4,))(*model.example())


@pytest.mark.parametrize(
    ("switches", "reason"),
    [
        ({"tail": "features"}, "ends before the video reaches the prompt"),
        ({"tail": "mean"}, "flow into mean"),
        ({"attention": "causal"}, "no vision encoder"),
        ({"attention": "grouped"}, "queries .* and keys .*heads"),
    ],
)
def test_everything_or_nothing(switches, reason):
    model = VideoModel(**switches).eval()
    ids, pixels = model.example()
    with torch.no_grad(), pytest.warns(EarlyTomFallbackWarning, match=reason):
        got = compress(model)(ids, pixels)
    with torch.no_grad():
        torch.testing.assert_close(got, model(ids, pixels))


def test_a_graph_break_inside_the_vision_path():
    model = VideoModel().eval()
    model.project.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    ids, pixels = model.example()
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # each part of the broken graph has a reason of its own
        torch.testing.assert_close(compress(model)(ids, pixels), model(ids, pixels))
    assert any("a graph break inside the vision path" in str(w.message) for w in caught)


def test_a_pass_that_fails_is_a_reason_not_a_crash(monkeypatch):
    def fail(state):
        raise IndexError("nobody thought of this")

    passes = [(name, fail if name == "compact_sequence" else run) for name, run in manager.PASSES]
    monkeypatch.setattr(manager, "PASSES", passes)
    model = VideoModel().eval()
    inputs = model.example()
    with torch.no_grad():
        with pytest.warns(EarlyTomFallbackWarning, match="compact_sequence failed.*IndexError: nobody thought"):
            got = compress(model)(*inputs)
        torch.testing.assert_close(got, model(*inputs))
        with pytest.raises(EarlyTomCompileError, match="compact_sequence failed"):
            compress(model, strict=True)(*inputs)


def test_original_graph_is_left_as_it_was_when_nothing_is_rewritten():
    model = VideoModel(tail="mean").eval()
    inputs = model.example()
    with torch.no_grad(), pytest.warns(EarlyTomFallbackWarning):
        compress(model)(*inputs)
    assert count(capture(model, *inputs), "earlytom") == 0


def test_a_weight_as_long_as_the_prompt_cannot_be_cut():
    class Numbered(VideoModel):
        def __init__(self, length):
            super().__init__()
            self.order = torch.nn.Parameter(torch.randn(1, length, 12))

        def forward(self, ids, frames):
            embeds = self.words(ids) + self.order
            rows = self.encode(frames)[0].flatten(0, 1)
            return self.head(self.reader(embeds.masked_scatter((ids == VIDEO).unsqueeze(-1), rows)))

    ids, pixels = VideoModel().example()
    model = Numbered(ids.shape[1]).eval()
    with torch.no_grad(), pytest.warns(EarlyTomFallbackWarning, match="as long as the prompt"):
        got = compress(model)(ids, pixels)
    with torch.no_grad():
        torch.testing.assert_close(got, model(ids, pixels))


# --- What is compiled ---------------------------------------------------------------------------------


def test_compile_seconds_grow_with_every_new_shape_and_with_nothing_else(monkeypatch):
    def slow(*args):
        time.sleep(0.02)
        slept.append(0.02)
        return args[0].forward

    slept, seconds = [], []
    monkeypatch.setattr(stages, "lower", slow)
    model = VideoModel().eval()
    compiled = compress(model, lowering="staged", dynamic=False)  # two shapes, not one for all
    for frames, seed in ((8, 0), (8, 1), (12, 0), (8, 2), (12, 1)):
        with torch.no_grad():
            compiled(*model.example(frames=frames, seed=seed))
        seconds.append(report(model).to_dict()["compile_seconds"])
        assert seconds[-1] >= sum(slept)
    first, same, other, *later = seconds
    assert 0 < first == same < other and later == [other, other]


def test_the_last_shape_that_dynamo_compiles_is_announced():
    model = VideoModel().eval()
    compiled = compress(model, retain_ratio=0.3, dynamic=False)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
        ids, pixels = model.example(frames=4)
        expected = expected_logits(model, ids, expected_rows(model, pixels, retain_ratio=0.3))
        torch.testing.assert_close(compiled(ids, pixels), expected, atol=1e-4, rtol=1e-4)
        with pytest.warns(EarlyTomFallbackWarning, match="no more than 2 shapes"):
            compiled(*model.example(frames=5))
