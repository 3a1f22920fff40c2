"""The ordered list of passes, and the state they hand on.

    Dynamo graph -> canonicalize -> find encoder -> find boundary        (analysis; nothing of ours in the graph yet)
                 -> merge frames -> select tokens -> cut the prompt      (inserts torch.ops.earlytom.*)
                 -> retarget literals -> check on fake tensors           (all or nothing)

A pass raises :class:`NotApplicable` with a reason and a cure where it meets something it does not understand; the
caller then throws the half-rewritten copy away.
"""

import copy
import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch._logging import trace_structured
from torch._prims_common import is_contiguous_or_false
from torch._subclasses import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from earlytom_compile.config import EarlyTomConfig
from earlytom_compile.errors import EarlyTomError, EarlyTomFallbackWarning
from earlytom_compile.kernels.providers import provider_of
from earlytom_compile.methods.registry import EARLYTOM
from earlytom_compile.passes.canonicalize_attention import canonicalize_attention
from earlytom_compile.passes.canonicalize_scatters import canonicalize_scatters
from earlytom_compile.passes.canonicalize_sizes import canonicalize_sizes
from earlytom_compile.passes.canonicalize_splits import canonicalize_splits
from earlytom_compile.passes.canonicalize_writes import canonicalize_writes
from earlytom_compile.passes.compact_sequence import SequenceInputs, compact_sequence, find_sequence_inputs
from earlytom_compile.passes.find_decoder_layers import DecoderLayer, find_decoder_layers
from earlytom_compile.passes.find_patch_grid import PatchGrid, find_patch_grid
from earlytom_compile.passes.find_video_boundary import (
    Boundary,
    Placeholders,
    VideoPath,
    find_tower_path,
    find_video_boundary,
)
from earlytom_compile.passes.find_vision_encoder import Encoder, GraphView, Miss, find_vision_encoder
from earlytom_compile.passes.graph_order import eliminate_dead_code, stable_topological_sort
from earlytom_compile.passes.insert_frame_merge import MergedVideo, insert_frame_merge
from earlytom_compile.passes.insert_inner_steps import (
    InnerSteps,
    insert_inner_steps,
    plan_inner_steps,
    require_layers,
)
from earlytom_compile.passes.insert_patch_reuse import ReusedPlaces, insert_patch_reuse
from earlytom_compile.passes.insert_token_selection import SelectedTokens, insert_token_selection
from earlytom_compile.passes.opaque_operators import mark_position_wise, read_instead, weights_of
from earlytom_compile.passes.patterns import insert, memory_of, op_name, shape_of, value_of
from earlytom_compile.passes.probe import Probe
from earlytom_compile.passes.reasons import NotApplicable, NotReusable
from earlytom_compile.passes.retarget_axes import ResizedAxis, retarget_axes
from earlytom_compile.passes.run_on_fakes import run_on_fake_tensors
from earlytom_compile.passes.token_map import TokenMap, find_token_map
from earlytom_compile.passes.video_sizes import VideoSizes, video_sizes
from earlytom_compile.passes.why_no_encoder import why_no_encoder

log = logging.getLogger(__name__)


@dataclass
class Rewrite:
    """A graph on its way; fields are filled by the passes in order."""

    graph_module: GraphModule
    config: EarlyTomConfig
    features_only: bool
    """The caller takes the video features themselves, so a graph that ends at them is complete."""
    frames_only: bool = False
    """The caller takes the frames of a vision tower and what they are made of: nothing is selected."""
    example_inputs: Sequence[Any] = ()
    """What Dynamo gave beside the graph: the weights among them tell what unknown operators do."""
    view: GraphView | None = None  # until the first edit
    token_map: TokenMap | None = None
    encoders: list[Encoder] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    path: VideoPath | None = None
    sequence: SequenceInputs | None = None
    even_rows: bool = True
    """Whether every row of the prompt has as many videos as the others, so that all are cut to one length."""
    patches: PatchGrid | None = None
    """Which pixels each place is made of; None where patches are not reused."""
    sizes: VideoSizes | None = None
    reused: ReusedPlaces | None = None
    video: MergedVideo | None = None
    selected: SelectedTokens | None = None
    keep: Node | None = None  # int64 [R, S'], positions of the prompt that stay
    cut: dict[Node, ResizedAxis] = field(default_factory=dict)
    """What each input along the prompt has become."""
    decoder_layers: list[DecoderLayer] = field(default_factory=list)
    """Of the language model, if tokens go inside it."""
    inner: InnerSteps | None = None
    axes: list[ResizedAxis] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    not_reusable: str = ""
    """Why frames merge although patches were to be reused."""

    def anew(self, config: EarlyTomConfig) -> "Rewrite":
        """As it was before any pass ran, but for the graph, and with other options."""
        return Rewrite(self.graph_module, config, self.features_only, self.frames_only, self.example_inputs)

    @property
    def boundary(self) -> Boundary | None:
        """Where the video path becomes rows of a language model, if it does."""
        return self.path if isinstance(self.path, Boundary) else None

    @property
    def counted(self) -> tuple[Node, ...]:
        """What a call tells beside the graph's own outputs: the plan by which patches are reused, frames of each video,
        the first of the frames that a merged one is made of, positions of the prompt that stay, which tokens were kept,
        how many where that depends on the content, and what is left inside the language model; of a tower, what its
        frames are made of and their importance."""
        assert self.video is not None
        plan = self.reused
        reused = () if plan is None else (plan.source, plan.change, plan.computed, plan.distinct, plan.measured)
        if self.frames_only:
            importance = () if self.video.importance is None else (self.video.importance,)
            plans = (node for plan in self.video.plans for node in plan)
            return (*reused, *self.video.counts, *plans, *importance)
        assert self.selected is not None
        some = (self.video.first, self.keep, self.selected.kept, self.selected.kept_counts)
        inside = () if self.inner is None else self.inner.kept
        return (*reused, *self.video.counts, *(node for node in some if node is not None), *inside)

    @property
    def inserted(self) -> dict[str, int]:
        """How often each operator of ours stands in the graph."""
        names = (str(node.target) for node in self.graph_module.graph.nodes if node.op == "call_function")
        return dict(Counter(n.split(".")[1] for n in names if n.startswith("earlytom.")))

    @property
    def providers(self) -> dict[str, str]:
        """Who computes each operator of ours; ``"native, triton"`` where that differs between its calls."""
        found: dict[str, set[str]] = {}
        for node in self.graph_module.graph.nodes:
            if node.op == "call_function" and str(node.target).startswith("earlytom."):
                name = str(node.target).split(".")[1]
                args, kwargs = map_arg((node.args, node.kwargs), value_of)
                devices = (x.device.type for x in args if isinstance(x, torch.Tensor))
                found.setdefault(name, set()).add(provider_of(name, next(devices, "cpu"), *args, **kwargs))
        return {name: ", ".join(sorted(names)) for name, names in found.items()}


def _canonicalize(state: Rewrite) -> None:
    graph = state.graph_module.graph
    canonicalize_sizes(graph)
    canonicalize_writes(graph)
    canonicalize_attention(graph)
    canonicalize_splits(graph)
    canonicalize_scatters(graph)
    # Dead branches (an unused pooling head, a norm nobody reads) would look like other readers of the features.
    eliminate_dead_code(graph)


def _mark_position_wise(state: Rewrite) -> None:
    mark_position_wise(state.graph_module, state.example_inputs)
    state.view = GraphView(state.graph_module)


def _find_encoder(state: Rewrite) -> None:
    assert state.view is not None
    found = find_vision_encoder(state.view)
    state.encoders, state.misses = found.encoders, found.misses
    if not state.encoders:
        raise why_no_encoder(state.view, found)


def _find_boundary(state: Rewrite) -> None:
    assert state.view is not None
    if state.frames_only:
        state.path = find_tower_path(state.view, state.encoders, state.misses, any_length=True)
        return
    # A prompt has placeholders for one number of frames; without one, a graph can serve them all.
    found = find_video_boundary(state.view, state.encoders, state.misses, any_length=state.features_only)
    state.path = found
    if found.placeholders is None and not state.features_only:
        raise NotApplicable(
            "the graph ends before the video reaches the prompt (a graph break lies between the vision encoder "
            "and the language model)",
            'Remove the graph break (TORCH_LOGS="graph_breaks" shows it), or use earlytom_compile.compile(model)',
        )


def _find_token_map(state: Rewrite) -> None:
    boundary, view = state.boundary, state.view
    if boundary is None or view is None:
        return
    hidden = boundary.encoder.blocks[-1].output
    state.token_map = find_token_map(view, hidden, boundary.judged, boundary.judged_axes, _probe(state, boundary))
    if state.token_map is None and (needed := _needed_of_patches(state.config)):
        patches = shape_of(hidden)[1]  # type: ignore[index]
        cure = "Use" if state.config.method == EARLYTOM else "Leave method out and use"
        raise NotApplicable(
            f"{state.config.chosen()} {needed}, and the {boundary.tokens} tokens of a frame behind "
            f"{boundary.encoder.name} are no shrunken grid of its {patches} patches, as behind a resampler",
            f'{cure} variant="plus", which looks at the tokens themselves',
        )


def _needed_of_patches(config: EarlyTomConfig) -> str:
    """What selection has to know of each token that only patches have, for people; empty if nothing."""
    if config.method == EARLYTOM and config.selects_by_attention():
        return "keeps the tokens that receive most attention in the vision encoder"
    needed = ["the attention that each token receives"] * config.selects_by_attention()
    needed += ["the key of each token"] * config.selects_by_keys()
    return f"goes by {' and '.join(needed)} in the vision encoder" if needed else ""


def _probe(state: Rewrite, path: VideoPath) -> Probe:
    frames = path.frames.node.expr if isinstance(path.frames, torch.SymInt) else None
    symbol = frames if frames is not None and frames.is_Symbol else None
    return Probe(state.graph_module, state.example_inputs, weights_of(state.graph_module), symbol)


def _find_patch_grid(state: Rewrite) -> None:
    path, view = state.path, state.view
    assert path is not None and view is not None
    alone = isinstance(path.frames, int) and path.frames < 2  # a frame has nothing to reuse
    if state.config.reuses() and not alone:
        state.patches = find_patch_grid(view, path, _probe(state, path))


def _require_inference(state: Rewrite) -> None:
    inputs = (node.meta.get("example_value") for node in state.graph_module.graph.nodes if node.op == "placeholder")
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
        raise NotApplicable(
            "gradients are enabled and the model's parameters require them; compression is for inference only",
            "Wrap the call in torch.inference_mode() or torch.no_grad()",
        )


def _find_sequence(state: Rewrite) -> None:
    # Before anything is inserted: our own operators say nothing about which axes are the same.
    if (boundary := state.boundary) and boundary.placeholders:
        assert state.view is not None
        state.even_rows = _have_rows_as_many_videos(state, boundary.placeholders)
        state.sequence = find_sequence_inputs(state.view.axes, boundary.placeholders.input_ids)


def _find_decoder_layers(state: Rewrite) -> None:
    boundary, config = state.boundary, state.config
    if boundary is None or boundary.placeholders is None or not config.reduces_inside():
        return  # in place, the language model has a graph of its own (integrations/inner_steps.py)
    assert state.view is not None
    state.decoder_layers = find_decoder_layers(state.view, boundary.placeholders.input_ids)
    require_layers(state.decoder_layers, config.steps_inside(len(state.decoder_layers)))
    if not config.keeps_exactly() or not state.even_rows:
        raise NotApplicable(
            "rows of the batch keep different numbers of tokens, of which some are to go inside the language model",
            "Use earlytom_compile.compile(model) and generate()",
        )


def _have_rows_as_many_videos(state: Rewrite, placeholders: Placeholders) -> bool:
    """As the prompt shows for which the graph was traced; every later one is looked at before it runs."""
    assert state.boundary is not None
    inputs = [node for node in state.graph_module.graph.nodes if node.op == "placeholder"]
    ids = dict(zip(inputs, state.example_inputs, strict=False)).get(placeholders.input_ids)
    rows = int(shape_of(placeholders.input_ids)[0])  # type: ignore[index]
    if not isinstance(ids, torch.Tensor) or isinstance(ids, FakeTensor):
        return state.boundary.videos % rows == 0
    return len(set((ids == placeholders.token).sum(1).tolist())) == 1


def _lay_out_frames(state: Rewrite) -> None:
    """Make the copies that the trace made without a word, where sizes known at run time only would have to be compared
    to find out whether they are needed."""
    path, view = state.path, state.view
    assert path is not None and view is not None
    graph, first = state.graph_module.graph, path.encoder.blocks[0].input
    if not is_contiguous_or_false(value_of(first)):
        copied = _copy_of(graph, first, first)
        for consumer in list(first.users):
            if consumer is not copied:
                read_instead(consumer, first, copied)
        blocks = (replace(path.encoder.blocks[0], input=copied), *path.encoder.blocks[1:])
        state.path = path = replace(path, encoder=replace(path.encoder, blocks=blocks))
    last = path.flat if isinstance(path, Boundary) else path.encoder.blocks[-1].output
    for node in view.flow.between(first, last):
        source = node.args[0] if op_name(node) in ("reshape", "flatten") and node.args else None
        if isinstance(source, Node) and memory_of(source) != memory_of(node) and memory_of(source) is not None:
            node.replace_input_with(source, _copy_of(graph, source, node.prev))


def _copy_of(graph: Graph, node: Node, behind: Node) -> Node:
    with graph.inserting_after(behind):
        return insert(graph, "contiguous", node, like=value_of(node).contiguous())  # type: ignore[union-attr]


def _reuse_patches(state: Rewrite) -> None:
    assert state.path is not None and state.view is not None
    graph = state.graph_module.graph
    state.sizes = video_sizes(graph, state.path, state.config)
    if state.patches is not None:
        state.reused = insert_patch_reuse(graph, state.view, state.path, state.patches, state.sizes, state.config)
        state.path = state.reused.path


def _merge_frames(state: Rewrite) -> None:
    assert state.path is not None and state.sizes is not None
    graph = state.graph_module.graph
    assert state.view is not None
    state.video = insert_frame_merge(
        graph, state.view, state.path, state.sizes, state.config, state.reused, tell_first=state.features_only
    )
    state.axes += state.video.axes


def _select_tokens(state: Rewrite) -> None:
    if state.boundary is None:
        return
    assert state.sizes is not None and state.video is not None
    graph = state.graph_module.graph
    video, sizes, token_map = state.video, state.sizes, state.token_map
    state.selected = insert_token_selection(graph, state.boundary, sizes, video, state.config, token_map)
    state.axes += state.selected.axes


def _compact(state: Rewrite) -> None:
    if state.sequence is not None:
        assert state.boundary is not None and state.selected is not None
        graph = state.graph_module.graph
        state.keep, state.cut = compact_sequence(graph, state.boundary, state.selected, state.sequence, state.even_rows)
        state.axes += state.cut.values()


def _insert_inner_steps(state: Rewrite) -> None:
    if not state.decoder_layers:
        return
    assert state.boundary is not None and state.sequence is not None and state.view is not None
    assert state.selected is not None and isinstance(state.selected.budget, int)
    graph, steps = state.graph_module.graph, state.config.steps_inside(len(state.decoder_layers))
    ids, masks = state.cut[state.sequence.input_ids], [state.cut[mask].node for mask in state.sequence.masks]
    plan = plan_inner_steps(graph, state.boundary, state.selected.budget, ids, next(iter(masks), None), steps)
    state.inner = insert_inner_steps(graph, state.view, state.decoder_layers, steps, plan)
    state.axes += state.inner.axes


def _retarget(state: Rewrite) -> None:
    # What was inserted may read nodes that stand behind it, such as the prompt's cut the content-dependent counts.
    stable_topological_sort(state.graph_module.graph)
    axes = [*state.axes, *(state.reused.axes if state.reused is not None else ())]
    retarget_axes(state.graph_module, axes, state.counted)


def _check(state: Rewrite) -> None:
    eliminate_dead_code(state.graph_module.graph, keep=set(state.counted))
    state.graph_module.graph.lint()
    state.graph_module.recompile()
    run_on_fake_tensors(state.graph_module)


PASSES: tuple[tuple[str, Callable[[Rewrite], None]], ...] = (
    ("canonicalize", _canonicalize),  # first: the finders know one spelling of attention
    ("mark_position_wise", _mark_position_wise),  # the last word on axes, which the finders follow
    ("find_vision_encoder", _find_encoder),
    ("find_video_boundary", _find_boundary),
    ("find_token_map", _find_token_map),
    ("find_patch_grid", _find_patch_grid),
    ("require_inference", _require_inference),
    ("find_sequence_inputs", _find_sequence),
    ("find_decoder_layers", _find_decoder_layers),  # the last analysis: needs the graph as Dynamo left it
    ("lay_out_frames", _lay_out_frames),  # the first layer, which reads what a convolution made, is one of all then
    ("insert_patch_reuse", _reuse_patches),  # before anybody reads what leaves a layer
    ("insert_frame_merge", _merge_frames),
    ("insert_token_selection", _select_tokens),  # reads the importance and segments the merges leave
    ("compact_sequence", _compact),  # needs K
    ("insert_inner_steps", _insert_inner_steps),  # its plan is of the shorter prompt
    ("retarget_axes", _retarget),  # every new size is known now
    ("check", _check),
)


def run_passes(state: Rewrite) -> Rewrite:
    """Run all passes on ``state.graph_module``, which is edited in place; raises NotApplicable.

    Where patches cannot be reused and nobody asked for it by name, frames merge, with a warning, and the ``config`` of
    what is returned says so.
    """
    config = state.config.merging_instead()
    if config is None:
        return _run_all(state)
    untouched = copy.deepcopy(state.graph_module.graph)
    try:
        return _run_all(state)
    except NotReusable as found:
        state.graph_module.graph = untouched
        merged = _run_all(state.anew(config))
        merged.not_reusable = found.reason
        warnings.warn(
            f"frames merge, since patches cannot be reused: {found.reason}. Say reuse=False to choose this.",
            EarlyTomFallbackWarning,
            stacklevel=2,
        )
        return merged


def _run_all(state: Rewrite) -> Rewrite:
    for index, (name, run) in enumerate(PASSES):
        start = time.perf_counter()
        try:
            run(state)
        except (NotApplicable, EarlyTomError):
            raise
        except Exception as error:
            log.warning("pass %s failed", name, exc_info=True)
            raise NotApplicable(
                f"pass {name} failed on this graph with {type(error).__name__}: {error}",
                "This is a defect of earlytom-compile: please report it with the traceback logged above",
            ) from error
        state.seconds[name] = time.perf_counter() - start
        log.debug("pass %d %s: %.1f ms", index, name, 1e3 * state.seconds[name])
        metadata = {"name": f"earlytom_{index}_{name}", "encoding": "string"}
        trace_structured("artifact", partial(dict, metadata), payload_fn=partial(str, state.graph_module.graph))
    return state
