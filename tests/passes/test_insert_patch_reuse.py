"""Only patches that changed go through the layers that reuse, however tower and layers are spelled."""

import warnings
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from effort import cases, diagonal
from hand_made import VideoModel, rewrite
from oracle_reuse import ReusingEncoder
from scenes import standing_camera
from spelled_towers import PATCH, SIDE, Layer, Tower
from test_spelled_towers import SPELLINGS
from torch._dynamo.exc import BackendCompilerFailed

from earlytom_compile import EarlyTomCompileError, EarlyTomConfig, EarlyTomFallbackWarning
from earlytom_compile.backend import compile_graph
from earlytom_compile.passes.find_patch_grid import PatchGrid
from earlytom_compile.passes.probe import Probe, Unknown
from earlytom_compile.reference import select_representatives, select_tokens
from earlytom_compile.stages import CompressedGraph

R = 0.3
REUSE = {"variant": "plus", "reuse": None, "merge_layers": None}  # where everything else of hand_made.py merges
OURS = ("plan_reuse", "pack_places", "take_places", "reuse_attention", "return_places", "spread_places")


def pixels_of(frames, videos=1, changing=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    kinds = {"patch": PATCH, "changing": changing, "generator": generator}
    return torch.stack([standing_camera(frames, SIDE, **kinds) for _ in range(videos)])


@torch.no_grad()
def expected_rows(tower, pixels, *, variant, full_layers, encode_ratio=None):
    """([V * K, C], places that were computed of each video), by hooks on the tower's layers."""
    found, computed, scored = [], [], 2
    for frames in pixels:
        encoder = ReusingEncoder(
            tower.layers,
            frames,
            PATCH,
            tau_reuse=0.03,
            full_layers=full_layers,
            encode_ratio=encode_ratio,
            importance_layer=scored,
            received=received,
            segmentation={"variant": variant if variant == "released" else "paper", "tau_seg": 0.0},
        )
        h, outputs = tower.embed(frames), []
        with encoder.hooked():
            for layer in tower.layers:
                h = layer(h)
                outputs.append(h)
        features = tower.rows(outputs)
        if variant == "plus":
            kept = select_representatives(features[..., :12], frames_in=len(frames), retain_ratio=R)
        else:
            scores = encoder.importance[:, tower.how.specials :]
            if tower.how.tokens != "all":
                scores = F.avg_pool2d(scores.view(-1, 1, 4, 4), 2).flatten(1)
            scores = scores.flip(1) if tower.how.order else scores
            kept = select_tokens(scores, encoder.segments, frames_in=len(frames), retain_ratio=R, variant=variant)
        found.append(features[kept[:, 0], kept[:, 1]])
        computed.append(encoder.plan.computed)
    return torch.cat(found), computed


def received(layer, h):
    q, k, _ = layer.qkv(h)
    return (q.float() @ k.float().mT * q.shape[-1] ** -0.5).softmax(-1).mean((1, 2))


def check(tower, pixels, *, variant="plus", full_layers=(2,), any_length=False, **options):
    """Compile one tower, compare with the oracle; returns the graph."""
    graphs = []
    chosen = {"variant": variant, "retain_ratio": R, "full_layers": full_layers, "lowering": "eager", **options}
    if variant != "plus":
        chosen |= {"reuse": True, "tau_seg": 0.0, "merge_layers": (0, 2)}
    config = EarlyTomConfig.from_options(chosen)

    def backend(graph_module, example_inputs):
        graphs.append(compile_graph(graph_module, example_inputs, config, features_only=True))
        return graphs[-1]

    torch._dynamo.reset()
    run = torch.compile(tower, backend=backend, fullgraph=True)
    if any_length:
        torch._dynamo.maybe_mark_dynamic(pixels, 1)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", EarlyTomFallbackWarning)
        rows = run(pixels)
    expected, computed = expected_rows(
        tower, pixels, variant=variant, full_layers=full_layers, encode_ratio=options.get("encode_ratio")
    )
    (graph,) = graphs
    assert isinstance(graph, CompressedGraph)
    torch.testing.assert_close(rows.flatten(0, -2), expected, atol=2e-5, rtol=1e-4)
    assert graph.record.last_counts.reuse.computed.tolist() == computed
    assert graph.record.last_counts.frames[-1].tolist() == [pixels.shape[1]] * len(pixels), "no frame merges"
    return graph


QUICK_SPELLINGS = (
    "qkv: grouped by head", "attention: bmm", "patches: conv3d", "patches: unfold", "patches: F.unfold",
    "patches: view", "class token and registers", "RoPE", "an earlier layer beside", "another order",
    "joined: flatten", "all of it",
)  # fmt: skip
"""Where patches come from and where rows go; all are compressed in test_spelled_towers.py."""


@pytest.mark.parametrize(
    "how", cases(*((how,) for how in QUICK_SPELLINGS), among=[(how,) for how in SPELLINGS if how != "windows"])
)
def test_every_spelling(how):
    graph = check(Tower(**SPELLINGS[how]), pixels_of(6))
    assert graph.record.last_counts.reuse.computed.item() < 6 * 16
    inside = how == "an earlier layer beside"  # which leaves a layer in the middle of those that reuse
    assert [graph.record.inserted.get(name, 0) for name in OURS] == [1, 1, 2, 3, 2 + inside, 0]


def test_attention_in_windows_is_left_alone():
    tower, pixels = Tower(**SPELLINGS["windows"]), pixels_of(6)
    with pytest.warns(EarlyTomFallbackWarning, match=r"stays in windows of a frame in layer 0.*reuse=False"):
        run = torch.compile(
            tower,
            backend=partial(compile_graph, config=EarlyTomConfig(reuse=True, lowering="eager"), features_only=True),
        )
        with torch.no_grad():
            torch.testing.assert_close(run(pixels), tower(pixels))


@pytest.mark.parametrize(
    "how, full_layers, variant",
    diagonal(["linear: lora", "class token", "tokens: merger"], [(), (2,), (0, 3)], ["paper", "released"]),
)
def test_selection_by_attention_knows_nothing_of_it(how, full_layers, variant):
    graph = check(Tower(**SPELLINGS[how]), pixels_of(5), variant=variant, full_layers=full_layers)
    assert graph.record.inserted.get("spread_places", 0) == (0 if 2 in full_layers else 2)


@pytest.mark.parametrize(
    "how",
    cases(
        ("joined: rows",),
        among=[("linear: dynamic int8",), ("class token",), ("joined: rows",), ("RoPE",)],
    ),
)
def test_several_videos_and_budgets(how):
    tower = Tower(**SPELLINGS[how])
    check(tower, pixels_of(5, videos=3))
    check(tower, pixels_of(4, videos=2), encode_ratio=0.5)
    check(tower, pixels_of(7, changing=0.0))
    check(tower, pixels_of(4, changing=1.0), full_layers=())


@pytest.mark.parametrize(
    "how, encode_ratio",
    cases(
        ("linear: addmm", None), ("RoPE", 0.4), among=list(product(["linear: addmm", "RoPE", "all of it"], [None, 0.4]))
    ),
)
def test_one_graph_for_videos_of_every_length(how, encode_ratio):
    assert check(Tower(**SPELLINGS[how]), pixels_of(6), any_length=True, encode_ratio=encode_ratio).any_length


@pytest.mark.long
@pytest.mark.parametrize("how", ["linear: packed", "all of it"])
@pytest.mark.parametrize("lowering", ["staged", "whole"])
def test_through_inductor(how, lowering):
    assert check(Tower(**SPELLINGS[how]), pixels_of(6), lowering=lowering).record.reasons == []


class WithPlaces(Layer):
    """Adds something of its own to each place, in every layer."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.own = torch.nn.Parameter(0.5 * torch.randn(16, 16))

    def qkv(self, h):
        return super().qkv(h + self.own)


def test_what_differs_from_place_to_place_is_taken_by_the_packed_places():
    tower = Tower()
    tower.layers = torch.nn.ModuleList(WithPlaces(16, 2, tower.how) for _ in range(4))
    assert check(tower.eval(), pixels_of(6)).record.inserted["at_places"] == 3


def waits(state):
    """Where numbers go from the device to the host."""
    return [node for node in state.graph_module.graph.nodes if node.target == "to" and "cpu" in node.args]


def test_a_budget_needs_no_wait_for_the_host():
    state = rewrite(VideoModel(), VideoModel().example(), **REUSE, encode_ratio=0.5)
    assert not waits(state)
    free = rewrite(VideoModel(), VideoModel().example(), **REUSE)
    assert free.patches == PatchGrid((4, 4), (2, 2), 0)
    (wait,) = waits(free)
    layers = [node for node in free.graph_module.graph.nodes if "reuse_attention" in str(node.target)]
    assert wait < layers[0], "before the encoder"


def test_a_single_frame_and_reuse_false_leave_the_layers_alone():
    for frames, options in ((1, {}), (8, {"reuse": False})):
        model = VideoModel()
        state = rewrite(model, model.example(frames=frames), **{**REUSE, **options})
        assert not any(name in state.inserted for name in OURS)


def test_what_leaves_a_layer_in_the_middle_is_of_all_places():
    """The caller takes the last layer's norm too, whose input is packed otherwise."""
    model = VideoModel(tail="scatter", beside="returned", after=1)
    state = rewrite(model, model.example(), **REUSE, full_layers=())
    assert state.inserted["return_places"] == 1


@pytest.mark.parametrize(
    "how, full_layers, variant",
    diagonal(["class token", "RoPE", "joined: rows"], [(2,), (0, 2, 3), (0, 1, 2, 3)], ["plus", "paper"]),
)
def test_frames_that_repeat_one_exactly_are_left_out_of_layers_in_full(how, full_layers, variant):
    """The result is that of the oracle, which computes them."""
    pixels = pixels_of(4, videos=2)[:, [0, 0, 1, 1, 1, 2, 3, 3]]
    graph = check(Tower(**SPELLINGS[how]), pixels, variant=variant, full_layers=full_layers)
    assert graph.record.last_counts.reuse.distinct.tolist() == [4, 4]
    runs = 1 if len(full_layers) in (1, 4) else 2
    assert graph.record.inserted["take_frames"] == runs
    # Scored is layer 2: the attention in it, and, for segments, what leaves it, which ends a run unless 3 is full, too.
    scored = 1 + (3 in full_layers) if variant == "paper" else 0
    assert graph.record.inserted["return_frames"] == runs + scored


def test_with_a_budget_layers_in_full_compute_every_frame():
    graph = check(Tower(), pixels_of(4)[:, [0, 0, 1, 2, 3]], encode_ratio=0.5)
    assert graph.record.last_counts.reuse.distinct.tolist() == [5] and "take_frames" not in graph.record.inserted


class OverlappingTower(Tower):
    def _patches(self, frames):
        smooth = F.avg_pool2d(frames, 3, 1, 1)
        return self.conv2d(smooth).flatten(2).transpose(1, 2)


class ReorderedTower(Tower):
    def _patches(self, frames):
        return self.conv2d(frames).flatten(2).transpose(1, 2).flip(1)


class NormedTower(Tower):
    def _patches(self, frames):
        return self.conv2d(frames / frames.abs().amax((1, 2, 3), keepdim=True)).flatten(2).transpose(1, 2)


class CountingTower(Tower):
    """Two frames of equal pixels differ, so that layers in full must not leave one of them out."""

    def _patches(self, frames):
        patches = super()._patches(frames)
        numbers = torch.arange(len(patches))[:, None, None] * torch.arange(patches.shape[2])
        return patches + numbers.sin()


@pytest.mark.parametrize("tower", [OverlappingTower, ReorderedTower, NormedTower, CountingTower])
def test_must_not_fire_where_a_place_is_made_of_other_pixels(tower):
    with pytest.warns(EarlyTomFallbackWarning, match=r"16 places .* not made of one patch .* reuse=False"):
        graphs = []
        config = EarlyTomConfig(reuse=True, lowering="eager")

        def backend(graph_module, example_inputs):
            graphs.append(compile_graph(graph_module, example_inputs, config, features_only=True))
            return graphs[-1]

        torch._dynamo.reset()
        model, pixels = tower(), pixels_of(5)
        with torch.no_grad():
            rows = torch.compile(model, backend=backend, fullgraph=True)(pixels)
            torch.testing.assert_close(rows, model(pixels))
    assert not isinstance(graphs[0], CompressedGraph)


def test_must_not_fire_with_grouped_heads():
    model = VideoModel(attention="grouped")
    with pytest.raises(BackendCompilerFailed, match=r"queries \(8, 2, 16, 8\), keys \(8, 1, 16, 8\).*reuse=False"):
        rewrite(model, model.example(), **{**REUSE, "reuse": True})


@pytest.mark.parametrize("tower", [partial(Tower, **SPELLINGS["windows"]), OverlappingTower, CountingTower])
def test_frames_merge_where_the_default_cannot_reuse(tower):
    """As with reuse=False, found in analysis (pixels) and half way through the rewrite (windows)."""
    model, pixels, graphs = tower(), pixels_of(6), []

    def rows(**options):
        def backend(graph_module, example_inputs):
            config = EarlyTomConfig(lowering="eager", strict=True, **options)
            graphs.append(compile_graph(graph_module, example_inputs, config, features_only=True))
            return graphs[-1]

        torch._dynamo.reset()
        with torch.no_grad():
            return torch.compile(model, backend=backend, fullgraph=True)(pixels)

    chosen = rows(reuse=False)
    with pytest.warns(EarlyTomFallbackWarning, match="^frames merge, since patches cannot be reused: .*reuse=False"):
        assert torch.equal(rows(), chosen)
    by_choice, by_default = (graph.record for graph in graphs)
    assert by_default.inserted == by_choice.inserted and "merge_frames" in by_choice.inserted
    assert by_default.merge_layers == by_choice.merge_layers and not by_default.config.reuses()
    for asked in ({"reuse": True}, {"full_layers": (2,)}):
        with pytest.raises(EarlyTomCompileError, match="not compressed: .*Merge frames instead: reuse=False"):
            rows(**asked)


@pytest.mark.parametrize(("tower", "found"), [(Tower, True), (ReorderedTower, False), (NormedTower, False)])
def test_without_weights_the_operators_alone_must_show_what_a_place_is_made_of(tower, found, monkeypatch):
    def nothing_to_run(*_):
        raise Unknown("no weights")

    monkeypatch.setattr(Probe, "run", nothing_to_run)
    model, pixels = tower(), pixels_of(5)
    if found:
        check(model, pixels)
    else:
        with pytest.raises(BackendCompilerFailed, match="not made of one patch"):
            check(model, pixels)
