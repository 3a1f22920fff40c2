"""Go on with fewer video tokens inside the language model (algorithm.md, stage 3; FastV and its like).

Before: ``h18 = layer17(h17, cos, sin, mask); h19 = layer18(h18, cos, sin, mask)``              # [R, S, C]
After:  ``paid = attention_paid(q17, k17, mask, last, ...)``                                     # [R, S]
        ``h18, kept = keep_inner_tokens(h18, paid, video_of, slots, merge)``                     # [R, S', C]
        ``cos, sin, mask = take_inner_positions(cos, kept), ..., shorten_mask(mask, kept)``
        ``h19 = layer18(h18, cos, sin, mask)``

Everything along the prompt that later layers read besides the stream is taken at the positions that are left, so that
these keep their position ids; keys and values of later layers, which leave the graph for a cache, are shorter. S' is
known before anything runs (kernels/inner_prompt.py): nobody waits.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from earlytom_compile.kernels import all_ops  # noqa: F401  (registers torch.ops.earlytom)
from earlytom_compile.methods.base import Step
from earlytom_compile.passes.axes import op_name
from earlytom_compile.passes.find_decoder_layers import DecoderLayer
from earlytom_compile.passes.find_video_boundary import Boundary
from earlytom_compile.passes.find_vision_encoder import GraphView
from earlytom_compile.passes.patterns import MOVES, argument, insert, shape_of, value_of
from earlytom_compile.passes.reasons import NotApplicable, describe
from earlytom_compile.passes.retarget_axes import ResizedAxis


@dataclass(frozen=True)
class InnerPlan:
    """What is known of the prompt before the language model runs, as graph nodes (kernels/inner_prompt.py)."""

    video_of: Node
    """int64 [R, S]."""
    last: Sequence[Node]
    """int64 [R], before each step."""
    slots: Sequence[Node]
    """int64 [R, S'], for each step."""
    lengths: Sequence[int | Node]
    """S' of each step."""
    padded: bool
    """Whether some row is padded by a step, so that a mask is needed where there was none."""


@dataclass(frozen=True)
class InnerSteps:
    """What the rewrite leaves behind."""

    layers: tuple[int, ...]
    """Of the language model, before which tokens go."""
    kept: tuple[Node, ...]
    """int64 [R, S'] behind each step: positions of the whole prompt."""
    axes: tuple[ResizedAxis, ...]


def plan_inner_steps(
    graph: Graph, boundary: Boundary, budget: int, ids: ResizedAxis, mask: Node | None, steps: Sequence[Step]
) -> InnerPlan:
    """The plan of a prompt whose videos keep ``budget`` tokens each; ``ids`` [R, S] and ``mask`` as they are then."""
    assert boundary.placeholders is not None
    entered = boundary.rows_of(int(boundary.frames)) - int(boundary.frames) * boundary.tokens + budget
    after = [max(1, round(entered * step.keep_ratio)) for step in steps]
    videos = boundary.videos // int(shape_of(ids.node)[0])  # type: ignore[index]
    behind = [node for node in (ids.node, mask, ids.size) if isinstance(node, Node)]
    with graph.inserting_before(_behind(*behind)):
        lengths = [_minus(graph, ids.size, videos * (entered - left)) for left in after]
        op, token = torch.ops.earlytom.plan_inner_tokens.default, boundary.placeholders.token
        planned = insert(graph, op, ids.node, mask, token, entered, after, lengths)
        parts = [insert(graph, operator.getitem, planned, i) for i in range(3)]
        last, slots = ([insert(graph, operator.getitem, part, i) for i in range(len(steps))] for part in parts[1:])
    return InnerPlan(parts[0], last, slots, lengths, padded=False)


def _minus(graph: Graph, size: int | Node, less: int) -> int | Node:
    return size - less if isinstance(size, int) else insert(graph, operator.sub, size, less)


def require_layers(layers: Sequence[DecoderLayer], steps: Sequence[Step]) -> None:
    """Raise where the graph does not have the layers of ``steps``."""
    missing = [step.layer for step in steps if step.layer >= len(layers)]
    if missing:
        raise NotApplicable(
            f"{len(layers)} layers of the language model were found in the graph, and tokens are to go before layer "
            f"{missing[0]}",
            "Load the model with attn_implementation='sdpa' or 'eager', and let no hook break its graph",
        )


def insert_inner_steps(
    graph: Graph, view: GraphView, layers: Sequence[DecoderLayer], steps: Sequence[Step], plan: InnerPlan
) -> InnerSteps:
    """Insert all ``steps``; literals that mean the prompt's length still have their old size. ``view`` is of the graph
    before anything was inserted."""
    regions = _regions(view, layers, steps)
    kept: list[Node] = []
    axes: list[ResizedAxis] = []
    video_of = plan.video_of
    for number, (step, region) in enumerate(zip(steps, regions, strict=True)):
        stream = layers[step.layer].input
        with graph.inserting_before(_behind(stream, *kept, plan.slots[number])):
            paid = _attention_paid(graph, layers[step.layer - 1], plan.last[number], step)
            op = torch.ops.earlytom.keep_inner_tokens.default
            shorter = insert(graph, op, stream, paid, video_of, plan.slots[number], step.merge)
            left = insert(graph, operator.getitem, shorter, 0, like=value_of(stream))
            places = insert(graph, operator.getitem, shorter, 1)
            total = _of_whole_prompt(graph, places, kept)
            video_of = insert(graph, torch.ops.earlytom.kept_of_kept.default, video_of, places)
        axes.append(ResizedAxis(left, 1, _name(step), plan.lengths[number]))
        _read_instead(stream, left, region)
        shortened = _Shortened(graph, view, view.dims(stream)[1], total, plan.lengths[number], _name(step))
        for node in _crossing(view, regions, number, stream):
            shortened.read(node, region)
        if plan.padded:
            _mask_padding(graph, layers, region, total)
        axes += shortened.axes
        kept.append(total)
    return InnerSteps(tuple(step.layer for step in steps), tuple(kept), tuple(axes))


def _regions(view: GraphView, layers: Sequence[DecoderLayer], steps: Sequence[Step]) -> list[set[Node]]:
    """What is computed behind each step and before the next, and what is made there for it alone, such as a view of the
    rotary tables in each layer."""
    place = {node: i for i, node in enumerate(view.graph.nodes)}
    streams = [layers[step.layer].input for step in steps]
    regions: list[set[Node]] = []
    for stream, later in zip(streams, [*streams[1:], None], strict=True):
        behind = {node for node in view.flow.behind(stream) if node.op != "output"}
        region = behind - set(view.flow.behind(later)) if later is not None else behind
        pending = list(region)
        while pending:
            for source in pending.pop().all_input_nodes:
                if source not in region and place[source] > place[stream] and source.op.startswith("call"):
                    region.add(source)
                    pending.append(source)
        regions.append(region)
    return regions


def _crossing(view: GraphView, regions: Sequence[set[Node]], number: int, stream: Node) -> list[Node]:
    """What lies along the prompt, was computed before the first step, and is read behind step ``number``; in order."""
    positions, region = view.dims(stream)[1], regions[number]
    read = {source for node in region for source in node.all_input_nodes} - region - {stream}
    along = [node for node in view.graph.nodes if node in read and positions in view.dims(node)]
    between = [node for node in along if any(node in before for before in regions[:number])]
    if between:
        raise NotApplicable(
            f"{describe(between[0])} skips a layer before which video tokens go, and would be as long as the prompt "
            "before it",
            "Leave out fewer tokens inside the language model: one step only",
        )
    return along


@dataclass
class _Shortened:
    """What is read along the prompt, where it is shorter."""

    graph: Graph
    view: GraphView
    positions: object
    """The axis of the prompt."""
    kept: Node
    length: int | Node
    name: str

    def __post_init__(self) -> None:
        self.axes: list[ResizedAxis] = []

    def read(self, node: Node, region: set[Node]) -> None:
        """Let ``region`` read ``node`` at the positions that are left."""
        places = [i for i, dim in enumerate(self.view.dims(node)) if dim is self.positions]
        with self.graph.inserting_before(_behind(node, self.kept)):
            if _is_mask(node) and places == [2, 3]:
                short = insert(self.graph, torch.ops.earlytom.shorten_mask.default, node, self.kept)
            elif places == [1]:
                op = torch.ops.earlytom.take_inner_positions.default
                short = insert(self.graph, op, node, self.kept)
            else:
                raise NotApplicable(
                    f"{describe(node)} has the prompt on axes {places}, and is read by layers that get fewer tokens",
                    "Leave tokens in the language model as they are (no inner_layer)",
                )
        short.meta["example_value"] = value_of(node)
        self.axes += [ResizedAxis(short, place, self.name, self.length) for place in places]
        _read_instead(node, short, region)


def _attention_paid(graph: Graph, layer: DecoderLayer, last: Node, step: Step) -> Node:
    head_dim = int(shape_of(layer.query)[-1])  # type: ignore[index]
    scale = layer.scale if layer.scale is not None else 1 / math.sqrt(head_dim)
    operands = layer.query, layer.key, layer.mask, last, scale, layer.causal, step.scores == "all"
    return insert(graph, torch.ops.earlytom.attention_paid.default, *operands)


def _of_whole_prompt(graph: Graph, kept: Node, before: Sequence[Node]) -> Node:
    """Positions of the step before as positions of the whole prompt."""
    if not before:
        return kept
    return insert(graph, torch.ops.earlytom.kept_of_kept.default, before[-1], kept)


def _mask_padding(graph: Graph, layers: Sequence[DecoderLayer], region: set[Node], kept: Node) -> None:
    """Give attention without a mask one that hides what pads a row."""
    bare = [layer.attention for layer in layers if layer.attention in region and layer.mask is None]
    if not bare:
        return
    with graph.inserting_before(kept.next):
        mask = insert(graph, torch.ops.earlytom.shorten_mask.default, None, kept)
    for attention in bare:
        query, key, value = attention.args[:3]
        attention.args = query, key, value
        rest = {name: x for name, x in attention.kwargs.items() if name not in ("attn_mask", "is_causal")}
        attention.kwargs = {**rest, "attn_mask": mask, "is_causal": False}


def _is_mask(node: Node) -> bool:
    """Whether attention reads it, or a view of it, as its mask."""
    pending = [node]
    while pending:
        read = pending.pop()
        for user in read.users:
            if op_name(user) == "scaled_dot_product_attention":
                return argument(user, 3, "attn_mask") is read
            if op_name(user) in MOVES or op_name(user) == "getitem":
                pending.append(user)
    return False


def _read_instead(node: Node, new: Node, region: set[Node]) -> None:
    for user in [user for user in node.users if user in region]:
        user.replace_input_with(node, new)


def _name(step: Step) -> str:
    return f"tokens from layer {step.layer} of the language model on"


def _behind(*nodes: Node) -> Node:
    """The first place in the graph where all ``nodes`` are known."""
    return max(nodes).next
