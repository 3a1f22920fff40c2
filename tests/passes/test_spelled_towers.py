"""Encoders and boundaries are found by what is computed, however it is spelled, and by nothing less."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from effort import cases, diagonal
from spelled_towers import LINEARS, MIXERS, Tower, expected_rows, video

from earlytom_compile import EarlyTomConfig, EarlyTomFallbackWarning
from earlytom_compile.backend import compile_graph
from earlytom_compile.methods import registry
from earlytom_compile.methods.base import Kept, Method
from earlytom_compile.passes.attention_spellings import register_attention
from earlytom_compile.passes.probe import Probe
from earlytom_compile.stages import CompressedGraph

R = 0.3


def compiled(tower, **options):
    """(the tower, compiled as the in-place spelling compiles it; the graphs it got)."""
    graphs = []
    merging = {"variant": "paper", "merge_layers": (0, 2), "reuse": False, "tau_seg": 0.0, "lowering": "eager"}
    config = EarlyTomConfig.from_options({**merging, **options})

    def backend(graph_module, example_inputs):
        graphs.append(compile_graph(graph_module, example_inputs, config, features_only=True))
        return graphs[-1]

    torch._dynamo.reset()
    return torch.compile(tower, backend=backend, fullgraph=True), graphs


def check(tower, *, frames=8, videos=1, any_length=False, **options):
    """Compress one call and compare it with the oracle; returns what the report would say."""
    run, graphs = compiled(tower, retain_ratio=R, **options)
    pixels = video(frames, videos)
    if any_length:
        torch._dynamo.maybe_mark_dynamic(pixels, 1)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", EarlyTomFallbackWarning)
        rows = run(pixels)
    expected = expected_rows(tower, pixels, retain_ratio=R, variant=options.get("variant", "paper"))
    (graph,) = graphs
    assert isinstance(graph, CompressedGraph)
    torch.testing.assert_close(rows.flatten(0, -2), torch.cat([each for each, _ in expected]), atol=2e-5, rtol=1e-4)
    assert graph.record.last_counts.frames[-1].tolist() == [left for _, left in expected]
    return graph


SPELLINGS = {
    **{f"linear: {name}": {"linear": name} for name in LINEARS},
    **{f"qkv: {how}": {"qkv": how} for how in ("fused, chunk", "fused, split", "fused, unbind", "fused, slices")},
    "qkv: grouped by head": {"qkv": "grouped by head"},
    **{f"attention: {how}": {"attention": how} for how in ("matmul", "bmm")},
    **{f"patches: {how}": {"patches": how} for how in ("conv3d", "unfold", "F.unfold", "view")},
    "class token": {"specials": 1},
    "class token and registers": {"specials": 5},
    "LayerScale": {"scales": True},
    "q/k norms": {"qk_norm": True},
    "RoPE": {"rope": True},
    "windows": {"attention": "windows"},
    "an earlier layer beside": {"beside": (0,)},
    "earlier layers beside, one that merges": {"beside": (1, 2), "tokens": "merger", "joined": "flatten"},
    "another order": {"order": True, "tokens": "merger"},
    **{f"tokens: {how}": {"tokens": how} for how in ("avg", "merger", "pixel shuffle", "mean")},
    **{f"joined: {how}": {"joined": how} for how in ("rows", "flatten", "split into videos")},
    "all of it": {
        "linear": "lora", "qkv": "fused, unbind", "attention": "matmul", "patches": "F.unfold", "specials": 2,
        "scales": True, "qk_norm": True, "rope": True, "tokens": "merger", "joined": "rows",
    },
}  # fmt: skip


@pytest.mark.parametrize("how", SPELLINGS)
def test_compresses(how):
    graph = check(Tower(**SPELLINGS[how]))
    assert graph.record.layers == 4 and graph.record.last_counts.frames[-1].item() < 8


@pytest.mark.parametrize(
    "how, variant",
    diagonal(
        ["linear: packed", "patches: view", "class token", "tokens: merger", "joined: rows", "windows"]
        + ["an earlier layer beside", "earlier layers beside, one that merges", "another order"],
        ["plus", "released"],
    ),
)
def test_other_variants(how, variant):
    check(Tower(**SPELLINGS[how]), variant=variant)


@pytest.mark.parametrize(
    "how",
    cases(
        ("joined: rows",),
        among=[("linear: lora",), ("tokens: pixel shuffle",), ("class token",), ("joined: rows",)],
    ),
)
def test_several_videos_and_single_frames(how):
    tower = Tower(**SPELLINGS[how])
    check(tower, videos=3)
    check(tower, frames=1)
    check(tower, frames=1, videos=2)


@pytest.mark.parametrize("how", ["linear: addmm", "tokens: merger", pytest.param("all of it", marks=pytest.mark.long)])
def test_one_graph_for_videos_of_every_length(how):
    assert check(Tower(**SPELLINGS[how]), any_length=True).any_length


@pytest.mark.parametrize(
    "how", cases(("linear: packed",), among=[("linear: dynamic int8",), ("linear: packed",), ("all of it",)])
)
def test_through_inductor(how):
    assert check(Tower(**SPELLINGS[how]), lowering="staged").record.reasons == []


@pytest.mark.parametrize("mixing", MIXERS)
def test_what_mixes_positions_is_no_projection(mixing):
    tower, pixels = Tower(mixing=mixing), video(8)
    run, graphs = compiled(tower)
    with torch.no_grad(), pytest.warns(EarlyTomFallbackWarning, match="taken for a part of the query, key and value"):
        torch.testing.assert_close(run(pixels), tower(pixels))
    assert not isinstance(graphs[0], CompressedGraph)


def test_an_operator_that_mixes_positions_is_found_out():
    tower, pixels = Tower(mixing="coarse"), video(8)
    run, graphs = compiled(tower)
    with (
        torch.no_grad(),
        pytest.warns(EarlyTomFallbackWarning, match="coarse_linear.* not known, or that mixes.*queries"),
    ):
        torch.testing.assert_close(run(pixels), tower(pixels))
    assert not isinstance(graphs[0], CompressedGraph)


@pytest.mark.parametrize("mixing", ["clamped", "observed"])
def test_operators_that_are_no_projections(mixing):
    """One whose scale shows for small numbers only; one that writes to a buffer, which no probe may touch."""
    tower, pixels = Tower(mixing=mixing), video(8)
    with torch.no_grad():
        expected = tower(pixels)
    before = {name: buffer.clone() for name, buffer in tower.named_buffers()}
    run, graphs = compiled(tower)
    with torch.no_grad(), pytest.warns(EarlyTomFallbackWarning, match=f"spelled::{mixing}.* not known"):
        torch.testing.assert_close(run(pixels), expected)
    assert not isinstance(graphs[0], CompressedGraph)
    for name, buffer in tower.named_buffers():
        torch.testing.assert_close(buffer, before[name])


def test_what_an_operator_does_depends_on_its_options():
    tower, pixels = Tower(mixing="by mode"), video(8)
    check(tower)
    for module in tower.layers[2].modules():
        module.mode = "frame before"
    run, graphs = compiled(tower)
    with torch.no_grad(), pytest.warns(EarlyTomFallbackWarning, match="understood only in part"):
        torch.testing.assert_close(run(pixels), tower(pixels))


SIDE_BRANCHES = {
    "a mean of all frames": lambda h, x: x + h.mean(0, keepdim=True),
    "a gate of all frames": lambda h, x: x * h.mean((0, 1)).sigmoid(),
    "the frame before": lambda h, x: x + h.roll(1, 0),
}


PLACES = {"out": "output projection", "down": "MLP"}


@pytest.mark.parametrize("how, half", diagonal(SIDE_BRANCHES, PLACES))
def test_a_branch_beside_the_block(how, half):
    tower, pixels = Tower(), video(8)

    def around(layer, forward):
        def with_branch(h):
            layer.stream = h
            return forward(h)

        return with_branch

    for layer in tower.layers:
        layer.forward = around(layer, layer.forward)
        projection = getattr(layer, half)
        projection.forward = beside(layer, projection.forward, SIDE_BRANCHES[how])
    run, _ = compiled(tower)
    with torch.no_grad(), pytest.warns(EarlyTomFallbackWarning, match=f"taken for a part of the {PLACES[half]}"):
        torch.testing.assert_close(run(pixels), tower(pixels))


def beside(layer, forward, branch):
    return lambda x: branch(layer.stream, forward(x))


class Between(Tower):
    """Something stands between two blocks."""

    def __init__(self, step):
        super().__init__()
        self.layers[1].forward = followed_by(step, self.layers[1].forward)


def followed_by(step, forward):
    return lambda h: step(forward(h))


def test_what_is_position_wise_between_blocks_belongs_to_the_chain():
    assert check(Between(lambda h: h * 1.5)).record.layers == 4
    tower, pixels = Between(lambda h: h + h.roll(1, 0)), video(8)
    run, _ = compiled(tower)
    with torch.no_grad(), pytest.warns(EarlyTomFallbackWarning, match="understood only in part.*roll"):
        torch.testing.assert_close(run(pixels), tower(pixels))


class Behind(Tower):
    """The patches go another way to their tokens."""

    def __init__(self, step, **how):
        super().__init__(**how)
        self.step = step

    def finish(self, h):
        return self.step(self, h)


def pooled(h):
    return F.avg_pool2d(h.mT.unflatten(2, (4, 4)), 2)


OTHER_ORDERS = {
    "flip": lambda tower, h: tower.project(h.flip(1)),
    "every second": lambda tower, h: tower.project(h[:, ::2]),
    "another order, then pooled": lambda tower, h: (
        pooled(tower.project(h[:, (5 * torch.arange(16)) % 16])).flatten(2).mT
    ),
    "two orders": lambda tower, h: tower.project(h[:, (5 * torch.arange(16)) % 16][:, torch.arange(15, -1, -1)]),
    "a grid on its side": lambda tower, h: (
        pooled(tower.project(h.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2))).flatten(2).mT
    ),
    "pooled, then on its side": lambda tower, h: pooled(tower.project(h)).transpose(2, 3).flatten(2).mT,
}


@pytest.mark.parametrize("how", OTHER_ORDERS)
def test_tokens_of_other_patches_have_no_map(how):
    tower, pixels = Behind(OTHER_ORDERS[how]), video(8)
    run, _ = compiled(tower)
    with torch.no_grad(), pytest.warns(EarlyTomFallbackWarning, match="no shrunken grid of its 16 patches"):
        torch.testing.assert_close(run(pixels), tower(pixels))


@pytest.mark.parametrize("step", [lambda h: h[:, torch.arange(15, -1, -1)], lambda h: h.flip(1)])
def test_what_cannot_be_tried_must_be_plain(step, monkeypatch):
    """Where weights are elsewhere, the model's own pooling counts only if nothing puts its patches in another order."""
    monkeypatch.setattr(Probe, "disagrees", lambda *_: None)
    check(Behind(lambda tower, h: pooled(tower.project(h)).flatten(2).mT, tokens="avg"))
    tower, pixels = Behind(lambda tower, h: pooled(tower.project(step(h))).flatten(2).mT), video(8)
    run, _ = compiled(tower)
    with torch.no_grad(), pytest.warns(EarlyTomFallbackWarning, match="no shrunken grid of its 16 patches"):
        torch.testing.assert_close(run(pixels), tower(pixels))


def test_a_class_token_cut_off_from_the_end():
    check(Behind(lambda tower, h: tower.project(h[:, -16:]), specials=1))


def test_a_resampler_leaves_importance_without_a_map():
    tower, pixels = Tower(tokens="resampler"), video(8)
    run, _ = compiled(tower)
    with torch.no_grad(), pytest.warns(EarlyTomFallbackWarning, match='no shrunken grid of its 16 patches.*"plus"'):
        torch.testing.assert_close(run(pixels), tower(pixels))
    check(tower, variant="plus")


METHOD = {"variant": None, "merge_layers": None, "tau_seg": None, "retain_ratio": R, "method": "mine"}
ASKS = {
    "the attention that each token receives": {"importance": True},
    "the key of each token": {"keys": True},
    "the attention that each token receives and the key of each token": {"importance": True, "keys": True},
}


@pytest.mark.parametrize("what", ASKS)
def test_a_resampler_leaves_a_method_without_what_it_asks_for(what, monkeypatch):
    tower, pixels = Tower(tokens="resampler"), video(8)
    monkeypatch.setitem(registry._registered, "mine", Method("mine", "none", keep=longest, **ASKS[what]))
    run, _ = compiled(tower, **METHOD)
    reason = f"method='mine' goes by {what} in the vision encoder, .* no shrunken grid .*Leave method out .*plus"
    with torch.no_grad(), pytest.warns(EarlyTomFallbackWarning, match=reason):
        torch.testing.assert_close(run(pixels), tower(pixels))


def test_a_method_that_asks_for_features_alone_works_behind_a_resampler(monkeypatch):
    tower, pixels = Tower(tokens="resampler"), video(8)
    monkeypatch.setitem(registry._registered, "mine", Method("mine", "none", keep=longest))
    run, _ = compiled(tower, **METHOD)
    with torch.no_grad():
        rows, every = run(pixels).flatten(0, -2), tower(pixels).flatten(0, -2)
    kept = every.norm(dim=1).topk(round(R * len(every))).indices.sort().values
    torch.testing.assert_close(rows, every[kept], atol=2e-5, rtol=1e-4)


def longest(video, budget):
    rows, size = video.features.flatten(0, 1), video.features.shape[1]
    kept = rows.norm(dim=1).topk(budget).indices.sort().values
    return Kept(rows[kept], torch.stack([kept // size, kept % size], dim=1))


def test_newlines_inside_a_frame_are_tokens_of_no_patch():
    tower, pixels = Tower(tokens="newline rows"), video(8)
    run, _ = compiled(tower)
    with torch.no_grad(), pytest.warns(EarlyTomFallbackWarning, match="no shrunken grid"):
        torch.testing.assert_close(run(pixels), tower(pixels))
    check(tower, variant="plus")


# --- Attention -----------------------------------------------------------------------------------------


@torch.library.custom_op("spelled::attention", mutates_args=())
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
    mixed = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), scale=scale, is_causal=causal
    )
    return mixed.transpose(1, 2).contiguous()


@attention.register_fake
def _(q, k, v, scale, causal):
    return torch.empty_like(q)


def through_the_operator(causal):
    def mixed(q, k, v, scale):
        return torch.ops.spelled.attention(*(x.transpose(1, 2) for x in (q, k, v)), scale, causal).transpose(1, 2)

    return mixed


def test_an_operator_is_attention_once_it_is_registered(monkeypatch):
    from earlytom_compile.passes import attention_spellings

    monkeypatch.setattr(attention_spellings, "_SPELLINGS", dict(attention_spellings._SPELLINGS))
    tower, pixels = Tower(attention=through_the_operator(False)), video(8)
    run, _ = compiled(tower)
    reason = r"spelled::attention \(.*\) in .*layers.0.* is an operator that is not known.*register_attention"
    with torch.no_grad(), pytest.warns(EarlyTomFallbackWarning, match=reason):
        torch.testing.assert_close(run(pixels), tower(pixels))
    register_attention("spelled::attention", "query key value scale causal", layout="tokens first")
    check(tower)
    run, graphs = compiled(Tower(attention=through_the_operator(True)))
    with torch.no_grad(), pytest.warns(EarlyTomFallbackWarning, match="taken for attention without a mask"):
        run(pixels)


@pytest.mark.parametrize("arguments", ["query key", "query key value"])
def test_what_cannot_be_registered(arguments):
    with pytest.raises(ValueError, match="namespace::name"):
        register_attention("attention" if "value" in arguments else "a::b", arguments)


def flex(score_mod=None):
    from torch.nn.attention.flex_attention import flex_attention

    return lambda q, k, v, scale: flex_attention(q, k, v, score_mod=score_mod, scale=scale)


@pytest.mark.parametrize(
    "score_mod", [lambda score, b, h, i, j: score, pytest.param(None, marks=pytest.mark.long)], ids=["as it is", "none"]
)
def test_flex_attention_that_only_attends(score_mod):
    check(Tower(attention=flex(score_mod)))


def test_flex_attention_that_scores_by_itself():
    tower, pixels = Tower(attention=flex(lambda score, b, h, i, j: score - (i - j).abs())), video(8)
    run, _ = compiled(tower)
    with torch.no_grad(), pytest.warns(EarlyTomFallbackWarning, match="flex_attention"):
        torch.testing.assert_close(run(pixels), tower(pixels))
