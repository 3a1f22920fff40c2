"""Each operator as the compiler sees it: schema, fake, no aliasing, and sizes nobody knows beforehand."""

import math
import subprocess
import sys

import pytest
import torch
from op_inputs import DEVICE, SEGMENT, active_places, clip, laid_out, ops, sources, video
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils._pytree import tree_map

SEGMENTATION = {"variant": "paper", "tau_seg": 0.3, "alpha": 0.9, "max_window": 0}
VIDEO = 7
SCHEMAS = [
    "frame_similarity(Tensor hidden, SymInt band) -> Tensor",
    "plan_merge(Tensor similarity, Tensor counts, *, str variant, float tau_seg, float alpha, "
    "SymInt max_window, float tau_merge, SymInt min_frames) -> (Tensor, Tensor, Tensor)",
    "merge_frames(Tensor[] tensors, Tensor source, Tensor weight, SymInt n) -> Tensor[]",
    "dynamic_frames(Tensor similarity, Tensor counts, *, str variant, float tau_seg, float alpha, "
    "SymInt max_window) -> Tensor",
    "attention_received(Tensor query, Tensor key, float scale) -> Tensor",
    "select_tokens(Tensor features, Tensor importance, Tensor dynamic, Tensor counts, SymInt budget, "
    '*, str static_selection="device") -> (Tensor, Tensor)',
    "select_tokens_released(Tensor features, Tensor importance, Tensor dynamic, Tensor counts, "
    'SymInt frames, float retain_ratio, *, str static_selection="device") -> (Tensor, Tensor, Tensor)',
    "select_representatives(Tensor features, Tensor counts, SymInt budget) -> (Tensor, Tensor)",
    "keep_by_method(Tensor features, Tensor? importance, Tensor? keys, Tensor counts, SymInt budget, str method) -> "
    "(Tensor, Tensor)",
    "append_separators(Tensor tokens, Tensor kept_counts, Tensor separator) -> Tensor",
    "keep_positions(Tensor input_ids, SymInt video_token, SymInt before, SymInt after, SymInt length) -> Tensor",
    "keep_positions_ragged(Tensor input_ids, Tensor kept, SymInt video_token, SymInt before) -> Tensor",
    "take_positions(Tensor x, Tensor positions, float fill) -> Tensor",
    "plan_reuse(Tensor pixels, SymInt[] grid, SymInt[] patch, SymInt prefix, float tau, SymInt budget) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    "pack_places(Tensor source, SymInt total) -> (Tensor, Tensor, Tensor)",
    "take_places(Tensor hidden, Tensor index) -> Tensor",
    "return_places(Tensor hidden, Tensor packed, Tensor index, Tensor rows) -> Tensor",
    "spread_places(Tensor packed, Tensor rows) -> Tensor",
    "reuse_attention(Tensor query, Tensor key, Tensor value, Tensor rows, Tensor offsets, float scale) -> Tensor",
    "at_places(Tensor table, Tensor index, SymInt axis) -> Tensor",
    "distinct_frames(Tensor source, Tensor change, SymInt prefix) -> (Tensor, Tensor)",
    "take_frames(Tensor x, Tensor rows, SymInt n) -> Tensor",
    "return_frames(Tensor x, Tensor rows) -> Tensor",
    "mark_videos(Tensor embeds, Tensor video_of, Tensor[] last, Tensor[] slots) -> Tensor",
    "plan_inner_tokens(Tensor input_ids, Tensor? mask, SymInt video_token, SymInt before, SymInt[] after, "
    "SymInt[] lengths) -> (Tensor, Tensor[], Tensor[])",
    "attention_paid(Tensor query, Tensor key, Tensor? mask, Tensor last, float scale, bool causal, bool everyone) "
    "-> Tensor",
    "keep_inner_tokens(Tensor hidden, Tensor scores, Tensor video_of, Tensor slots, str merge) -> (Tensor, Tensor)",
    "videos_of_slots(Tensor slots) -> Tensor",
    "take_inner_positions(Tensor x, Tensor kept) -> Tensor",
    "kept_of_kept(Tensor before, Tensor kept) -> Tensor",
    "shorten_mask(Tensor? mask, Tensor kept) -> Tensor",
    "first_of_merged(Tensor? first, Tensor source, SymInt n) -> Tensor",
    "window_attention(Tensor query, Tensor key, Tensor value, SymInt[] windows, float scale) -> Tensor",
    "window_attention_received(Tensor query, Tensor key, SymInt[] windows, float scale) -> Tensor",
    "video_budget(SymInt frames, SymInt tokens, float retain_ratio) -> Tensor",
    "place_budget(SymInt frames, SymInt places, SymInt prefix, float encode_ratio) -> Tensor",
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.split("(")[0])
def test_has_the_agreed_schema(schema):
    op = getattr(ops, schema.split("(")[0]).default
    assert str(op._schema) == f"earlytom::{schema}"


def test_one_import_registers_every_operator_and_nothing_of_the_package():
    code = (
        "import sys, torch, earlytom_compile\n"
        "before = {m for m in sys.modules if m.startswith('earlytom_compile')}\n"
        "import earlytom_compile.kernels.all_ops\n"
        "new = {m for m in sys.modules if m.startswith('earlytom_compile')} - before\n"
        "assert all(m.startswith('earlytom_compile.kernels') for m in new), new\n"
        f"names = {[schema.split('(')[0] for schema in SCHEMAS]}\n"
        "assert all(hasattr(torch.ops.earlytom, name) for name in names)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def calls(dtype, layout):
    """(operator, args, kwargs): one call of each, over two videos of 5 and 4 frames, named by CALLS."""
    hidden = laid_out(video(2, 9, 4, 6, dtype), layout)
    counts = torch.tensor([5, 4])
    similarity = ops.frame_similarity(hidden, 4)
    source, weight, merged = ops.plan_merge(similarity, counts, **SEGMENTATION, tau_merge=SEGMENT, min_frames=1)
    importance = laid_out(torch.rand(9, 4).to(dtype), layout)
    dynamic = ops.dynamic_frames(similarity, counts, **SEGMENTATION)
    query, key = laid_out(torch.randn(2, 3, 2, 5, 8).to(dtype), layout)
    ids = torch.tensor([[1, VIDEO, VIDEO, VIDEO, 2], [VIDEO, VIDEO, VIDEO, 3, 4]])
    kept = torch.tensor([1, 2])
    pixels = laid_out(torch.stack([clip(v, 4, 2, 9, 7) for v in range(2)]).to(dtype), layout)
    reuse = sources(1, 2, 4, 6)
    index, rows, offsets = ops.pack_places(reuse, active_places(reuse))
    states = laid_out(torch.randn(8, 6, 16).to(dtype), layout)
    packed = laid_out(torch.randn(1, len(index), 16).to(dtype), layout)
    same = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2])
    three = laid_out(torch.randn(3, 1, 2, len(index), 8).to(dtype), layout)
    inside, last = torch.tensor([[0, 0, 0, -1], [-1, 0, 0, 0]]), torch.tensor([3, 3])
    slots = torch.tensor([[-2, -2, 3], [0, -2, -2]])
    return [
        (ops.frame_similarity, (hidden, 4), {}),
        (ops.plan_merge, (similarity, counts), SEGMENTATION | {"tau_merge": SEGMENT, "min_frames": 1}),
        (ops.merge_frames, ([hidden, importance], source, weight, int(merged.sum())), {}),
        (ops.dynamic_frames, (similarity, counts), SEGMENTATION),
        (ops.attention_received, (query, key, 0.5), {}),
        (ops.select_tokens, (hidden, importance, dynamic, counts, 11), {}),
        (ops.select_tokens_released, (hidden, importance, dynamic, counts, 6, 0.4), {}),
        (ops.select_representatives, (hidden, counts, 11), {}),
        (ops.keep_by_method, (hidden, importance, hidden[..., :3], counts, 11, "visionzip"), {}),
        (ops.append_separators, (hidden[:, 0], counts, hidden[0, 0]), {}),
        (ops.keep_positions, (ids, VIDEO, 3, 2, 4), {}),
        (ops.keep_positions_ragged, (ids, kept, VIDEO, 3), {}),
        (ops.take_positions, (hidden[:2], torch.tensor([[-1, 0], [2, 3]]), 0.0), {}),
        (ops.plan_reuse, (pixels, [2, 2], [4, 3], 1, 0.03, 0), {}),
        (ops.pack_places, (reuse, len(index)), {}),
        (ops.take_places, (states, index), {}),
        (ops.return_places, (states, packed, index, rows), {}),
        (ops.spread_places, (three[0], rows), {}),
        (ops.reuse_attention, (*three, rows, offsets, 0.5), {}),
        (ops.at_places, (states[0], index, 0), {}),
        (ops.distinct_frames, (reuse, torch.zeros(reuse.shape), 1), {}),
        (ops.take_frames, (states, same, 3), {}),
        (ops.return_frames, (states[:3], same), {}),
        (ops.mark_videos, (hidden[:2], inside, [last], [slots]), {}),
        (ops.plan_inner_tokens, (ids, None, VIDEO, 3, [2], [4]), {}),
        (ops.attention_paid, (query, key[:, :1], None, last, 0.5, True, False), {}),
        (ops.keep_inner_tokens, (hidden[:2], importance[:2].float(), inside, slots, "mean"), {}),
        (ops.videos_of_slots, (slots,), {}),
        (ops.take_inner_positions, (hidden[:1], slots.clamp_min(-1)), {}),
        (ops.kept_of_kept, (slots.clamp_min(-1), torch.tensor([[-1, 0], [1, 2]])), {}),
        (ops.shorten_mask, (None, slots.clamp_min(-1)), {}),
        (ops.first_of_merged, (None, source, int(merged.sum())), {}),
        (ops.window_attention, (query, key, query, [1, 3, 2, 1], 0.4), {}),
        (ops.window_attention_received, (query, key, [1, 3, 2, 1], 0.4), {}),
        (ops.video_budget, (8, 196, 0.1), {}),
        (ops.place_budget, (8, 730, 1, 0.4), {}),
        (ops.select_tokens, (hidden, importance, dynamic, counts, 11), {"static_selection": "host"}),
        (ops.select_tokens_released, (hidden, importance, dynamic, counts, 6, 0.4), {"static_selection": "host"}),
        (ops.plan_reuse, (pixels[0], [2, 2], [4, 3], 0, 0.03, 9), {}),
    ]


VARIANTS = ["select_tokens, host", "select_tokens_released, host", "plan_reuse, budget"]
CALLS = [*(schema.split("(")[0] for schema in SCHEMAS), *VARIANTS]


@pytest.mark.parametrize(
    "dtype, layout",
    [(torch.float32, "contiguous"), (torch.bfloat16, "transposed"), (torch.float16, "strided")],
)
@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name, dtype, layout):
    op, args, kwargs = calls(dtype, layout)[CALLS.index(name)]
    assert op.__name__ == name.partition(",")[0]
    # On a GPU these are the Triton providers.
    args = tree_map(lambda x: x.to(DEVICE) if isinstance(x, torch.Tensor) else x, args)
    opcheck(op.default, args, kwargs)


def merge_layer(hidden, counts, importance):
    similarity = ops.frame_similarity(hidden, 15)
    source, weight, merged = ops.plan_merge(similarity, counts, **SEGMENTATION, tau_merge=SEGMENT, min_frames=1)
    n = merged.sum().item()
    torch._check(n >= 1)
    hidden, importance = ops.merge_frames([hidden, importance], source, weight, n)
    return hidden, merged, importance


def compressed_encoder(hidden, counts, query, key):
    """Two merge layers with compute between, selection, separators: the shape of the real graph."""
    importance = ops.attention_received(query, key, 0.5)
    hidden, counts, importance = merge_layer(hidden * 1.5, counts, importance)
    hidden = torch.nn.functional.gelu(hidden).flatten(1).view(hidden.shape) + hidden
    hidden, counts, importance = merge_layer(hidden, counts, importance)
    dynamic = ops.dynamic_frames(ops.frame_similarity(hidden, 15), counts, **SEGMENTATION)
    features = torch.nn.functional.relu(hidden) + 1
    tokens, kept = ops.select_tokens(features, importance, dynamic, counts, 6)
    representatives, _ = ops.select_representatives(features, counts, 6)
    ragged, places, kept_counts = ops.select_tokens_released(features, importance, dynamic, counts, 10, 0.3)
    ragged = ops.append_separators(2 * ragged, kept_counts, features[0, 0])
    return tokens * 2, kept, representatives - 1, ragged + 1, places, counts


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def compiled(request):
    """torch.compile that counts graphs and lets sizes depend on content, as the backend does."""
    torch._dynamo.reset()
    count = CompileCounterWithBackend(request.param)
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        yield lambda function: torch.compile(function, backend=count, fullgraph=True), count
    torch._dynamo.reset()


def test_compiles_once_for_videos_that_merge_differently(compiled):
    compile_it, count = compiled
    fast, frames_left = compile_it(compressed_encoder), set()
    for seed in range(6):
        hidden = torch.cat([video(seed + 10 * v, 10, 5, 16) for v in range(2)])
        query, key = torch.randn(2, 20, 2, 5, 8, generator=torch.Generator().manual_seed(seed))
        expected = compressed_encoder(hidden, torch.tensor([10, 10]), query, key)
        actual = fast(hidden, torch.tensor([10, 10]), query, key)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)
        frames_left.add(tuple(expected[-1].tolist()))
    assert count.frame_count == 1 and len(frames_left) > 1


def encoder_that_reuses(pixels, hidden, scale):
    """Two layers over packed rows between two over all places: the shape of the real graph."""
    source, _, computed, _ = ops.plan_reuse(pixels, [3, 3], [4, 4], 1, 0.03, 0)
    total = computed.sum().item()
    torch._check(total >= 1)
    index, rows, offsets = ops.pack_places(source, total)
    hidden = torch.nn.functional.gelu(hidden) * 1.5
    states = ops.take_places(hidden, index)
    for _ in range(2):
        heads = torch.nn.functional.relu(states).unflatten(2, (2, 8)).transpose(1, 2)
        attended = ops.reuse_attention(heads, heads * 2, heads + 1, rows, offsets, scale)
        states = states + attended.transpose(1, 2).reshape(states.shape)
    hidden = ops.return_places(hidden, states, index, rows) + 1
    spread = ops.spread_places(heads, rows)
    return hidden, ops.attention_received(spread, spread, scale), states * 2, computed


def test_compiles_once_for_videos_that_change_differently(compiled):
    compile_it, count = compiled
    fast, totals = compile_it(encoder_that_reuses), set()
    for seed in range(6):
        pixels = torch.stack([clip(10 * seed + v, 6, 2, 13, 14) for v in range(2)])
        arguments = pixels, torch.randn(12, 10, 16, generator=torch.Generator().manual_seed(seed)), 0.02
        expected = encoder_that_reuses(*arguments)
        for a, b in zip(fast(*arguments), expected, strict=True):
            torch.testing.assert_close(a, b)
        totals.add(int(expected[-1].sum()))
    assert count.frame_count == 1 and len(totals) > 1


def test_the_sequence_operators_compile_with_lengths_nobody_knows(compiled):
    compile_it, count = compiled

    def compact(ids, embeddings, kept):
        static = ops.take_positions(embeddings, ops.keep_positions(ids, VIDEO, 3, 1, 3), 0.0) * 2
        positions = ops.keep_positions_ragged(ids, kept, VIDEO, 3)
        mask = ops.take_positions(torch.ones_like(ids), positions, 0.0)
        return static, (ops.take_positions(embeddings, positions, 0.0) * mask[..., None]).sum(-1), positions

    fast = compile_it(compact)
    ids = torch.tensor([[1, VIDEO, VIDEO, VIDEO, 2], [VIDEO, VIDEO, VIDEO, 3, 4]])
    embeddings = torch.randn(2, 5, 4)
    for kept in ([1, 2], [3, 0], [0, 0], [3, 3]):
        arguments = ids, embeddings, torch.tensor(kept)
        for a, b in zip(fast(*arguments), compact(*arguments), strict=True):
            torch.testing.assert_close(a, b)
    assert count.frame_count == 1


def test_fakes_put_no_guard_on_sizes_that_depend_on_content():
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols

    environment = ShapeEnv()
    n = environment.create_unbacked_symint()
    torch._check(n >= 1)
    with FakeTensorMode(shape_env=environment):
        hidden, importance = torch.empty(n, 4, 6), torch.empty(n, 4)
        counts = torch.empty(2, dtype=torch.int64)
        similarity = ops.frame_similarity(hidden, n)
        source, weight, merged = ops.plan_merge(similarity, counts, **SEGMENTATION, tau_merge=math.nan, min_frames=n)
        for x in ops.merge_frames([hidden, importance], source, weight, n):
            assert free_unbacked_symbols(x.shape)
        dynamic = ops.dynamic_frames(similarity, counts, **SEGMENTATION)
        tokens, kept = ops.select_tokens(hidden, importance, dynamic, counts, 5)
        assert tokens.shape == (2, 5, 6) and kept.shape == (2, 5, 2)
        tokens, kept = ops.select_representatives(hidden, counts, 5)
        assert tokens.shape == (2, 5, 6) and kept.shape == (2, 5, 2)
        tokens, kept, per_video = ops.select_tokens_released(hidden, importance, dynamic, counts, n, 0.5)
        assert tokens.shape[0] is not None and free_unbacked_symbols(tokens.shape)
        out = ops.append_separators(tokens, per_video, torch.empty(6))
        positions = ops.keep_positions_ragged(torch.empty(1, n, dtype=torch.int64), per_video, VIDEO, n)
        ops.take_positions(out[None], positions, 0.0)
        ops.attention_received(torch.empty(n, 2, 4, 3), torch.empty(n, 2, 4, 3), 0.5)
        source, _, computed, _ = ops.plan_reuse(torch.empty(n, 3, 9, 9), [2, 2], [4, 4], 1, 0.03, 0)
        total = computed.sum().item()
        index, rows, offsets = ops.pack_places(source, total)
        states = ops.take_places(torch.empty(n, 5, 6), index)
        assert free_unbacked_symbols(states.shape) == free_unbacked_symbols(total)
        heads = states.unflatten(2, (2, 3)).transpose(1, 2)
        assert ops.reuse_attention(heads, heads, heads, rows, offsets, 0.5).stride(2) == 6
        assert ops.spread_places(heads, rows).stride()[1:] == (3, 6, 1)
        assert ops.return_places(torch.empty(n, 5, 6), states, index, rows).shape[1:] == (5, 6)
