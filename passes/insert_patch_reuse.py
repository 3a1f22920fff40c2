"""Compute a patch once, and again only when it changes (docs/reuse.md).

Before: ``h1 = layer0(h0); h2 = layer1(h1); h3 = layer2(h2)``                # [V*F, S, D]
After:  ``source, _, computed, _ = plan_reuse(pixels, ...)``                 # from pixels alone
        ``t = computed.sum().item()``                      # the only value the host waits for; a number with a budget
        ``index, rows, offsets = pack_places(source, t)``
        ``x0 = take_places(h0, index)``                                       # [1, t, D], what changed
        ``x1 = layer0(x0); x2 = layer1(x1)``               # attention: reuse_attention(q, k, v, rows, offsets)
        ``h2 = return_places(h0, x2, index, rows)``                           # [V*F, S, D] again
        ``h3 = return_frames(layer2(take_frames(h2, same, n)), same)``        # a layer in full

Between packing and returning the graph is the model's own: its frame axis has become 1 and its place axis t, which
retarget_axes writes wherever a size is spelled. The finder has shown that all of it is position-wise but the attention,
so it does not mind. Operands that differ from place to place, as rotary tables do, are taken by the packed places.
Layers in full leave out frames that repeat one before them exactly, which changes nothing but the time; where a budget
fixes all sizes, they compute every frame.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from torch.fx import Graph, Node

from earlytom_compile.config import EarlyTomConfig
from earlytom_compile.kernels import all_ops  # noqa: F401  (registers torch.ops.earlytom)
from earlytom_compile.passes.dataflow import Dataflow
from earlytom_compile.passes.find_patch_grid import PatchGrid
from earlytom_compile.passes.find_video_boundary import VideoPath
from earlytom_compile.passes.find_vision_encoder import Block, Encoder, GraphView
from earlytom_compile.passes.opaque_operators import read_instead
from earlytom_compile.passes.patterns import insert, shape_of, value_of
from earlytom_compile.passes.reasons import NotReusable, describe
from earlytom_compile.passes.retarget_axes import ResizedAxis
from earlytom_compile.passes.video_sizes import HINT, VideoSizes, likely_size

_LIKELY_SHARE = 0.4
"""Of the places, what is computed of a video that nobody has seen yet: Inductor compiles for about so many."""


@dataclass
class ReusedPlaces:
    """What the rewrite leaves behind, as graph nodes."""

    path: VideoPath  # whose blocks read what they read now
    source: Node  # int64 [V, F, S], the frame in which each place was last computed
    change: Node  # float32 [V, F, S], how much it differed from then
    computed: Node  # int64 [V], places of each video that are computed
    distinct: Node  # int64 [V], frames of each video that layers in full compute
    measured: Node  # float32 [V, 2], the video's noise and the threshold that followed from it
    index: Node  # int64 [T], which place each packed one is
    rows: Node  # int64 [V*F, S], the packed place that each place reads
    offsets: Node  # int64 [V*F + 1], the first packed place of each frame
    total: int | Node  # T
    frames: tuple[Node, Node] | None  # int64 [V*F], number of each among the distinct frames, and how many these are
    axes: list[ResizedAxis] = field(default_factory=list)
    # Of what leaves a block: [N, S, D] that its run was taken from, and its own value of all places of all frames.
    _packed_from: dict[Node, Node] = field(default_factory=dict)
    _distinct_of: dict[Node, Node] = field(default_factory=dict)
    _returned: dict[Node, Node] = field(default_factory=dict)

    def is_packed(self, block: Block) -> bool:
        """Whether only places that changed go through ``block``."""
        return block.output in self._packed_from

    def has_distinct_frames(self, block: Block) -> bool:
        """Whether only frames that repeat no other go through ``block``, whole."""
        return block.output in self._distinct_of

    def whole(self, graph: Graph, output: Node) -> Node:
        """What leaves a block, of all places of all frames: [N, S, D]."""
        if output not in self._packed_from and output not in self._distinct_of:
            return output
        if output not in self._returned:
            with graph.inserting_before(_behind(output, self.rows)):
                self._returned[output] = self._return(graph, output)
        return self._returned[output]

    def _return(self, graph: Graph, output: Node) -> Node:
        if output in self._distinct_of:
            return self.of_all_frames(graph, output)
        hidden = self._packed_from[output]
        arguments = (hidden, output, self.index, self.rows)
        return insert(graph, torch.ops.earlytom.return_places.default, *arguments, like=value_of(hidden))

    def of_all_frames(self, graph: Graph, x: Node) -> Node:
        """[N, ...] of what was computed of distinct frames."""
        assert self.frames is not None
        return insert(graph, torch.ops.earlytom.return_frames.default, x, self.frames[0], like=value_of(x))

    def spread(self, graph: Graph, heads: Node) -> Node:
        """Queries or keys of a packed block, of all places: [N, H, S, d]."""
        return insert(graph, torch.ops.earlytom.spread_places.default, heads, self.rows, like=value_of(heads))


def insert_patch_reuse(
    graph: Graph, view: GraphView, path: VideoPath, grid: PatchGrid, sizes: VideoSizes, config: EarlyTomConfig
) -> ReusedPlaces:
    """Insert the plan, and run every layer that is not one of the ``full_layers`` on what changed; literals that mean
    frames or places still have their old sizes."""
    blocks = path.encoder.blocks
    full = config.resolve_full_layers(len(blocks))
    if windows := [layer for layer, block in enumerate(blocks) if block.windows and layer not in full]:
        raise NotReusable(
            f"attention stays in windows of a frame in layer {windows[0]} of the vision encoder {path.encoder.name}, "
            "and the places that changed are packed without them",
        )
    flow = Dataflow(graph)
    with graph.inserting_before(blocks[0].input.next):
        places = _insert_plan(graph, path, grid, sizes, config)
    for begin, end, reuses in _runs(len(blocks), full):
        if reuses:
            _pack(graph, view, flow, places, blocks[begin : end + 1], begin)
        elif places.frames is not None:
            _leave_out_repeats(graph, flow, places, blocks[begin : end + 1], begin)
    return places


def _insert_plan(
    graph: Graph, path: VideoPath, grid: PatchGrid, sizes: VideoSizes, config: EarlyTomConfig
) -> ReusedPlaces:
    ops, first = torch.ops.earlytom, path.encoder.blocks[0].input
    count = int(shape_of(first)[1])  # type: ignore[index]
    budget = _budget(graph, path, count, grid.prefix, sizes, config)
    arguments = (path.pixels, list(grid.grid), list(grid.patch), grid.prefix, float(config.tau_reuse), budget)
    plan = insert(graph, ops.plan_reuse.default, *arguments)
    source, change, computed, measured = (insert(graph, operator.getitem, plan, i) for i in range(4))
    total: int | Node
    if budget:
        total, frames = _times(graph, path.videos, budget), None
        distinct = insert(graph, torch.full_like, computed, sizes.frames)
    else:
        found = insert(graph, ops.distinct_frames.default, source, change, grid.prefix)
        same, distinct = (insert(graph, operator.getitem, found, i) for i in range(2))
        sums = insert(graph, torch.sum, insert(graph, torch.stack, [computed, distinct]), 1)
        on_host = insert(graph, "to", sums, "cpu")  # the one time that the host waits
        likely = likely_size(path.frames)
        share = max(1, round(_LIKELY_SHARE * likely))
        total = _read(graph, on_host, 0, path.videos * count, sizes.frames, likely=share)
        frames = same, _read(graph, on_host, 1, path.videos, sizes.frames, likely=likely)
    packing = insert(graph, ops.pack_places.default, source, total)
    index, rows, offsets = (insert(graph, operator.getitem, packing, i) for i in range(3))
    return ReusedPlaces(path, source, change, computed, distinct, measured, index, rows, offsets, total, frames)


def _read(graph: Graph, numbers: Node, place: int, of_frame: int, frames: int | Node, *, likely: int) -> Node:
    """A number on the host, from that ``of_frame`` to that of ``frames`` times as many."""
    number = insert(graph, "item", insert(graph, operator.getitem, numbers, place))
    number.meta[HINT] = of_frame * likely
    # The range of the unbacked size.
    insert(graph, torch._check, insert(graph, operator.ge, number, of_frame))
    insert(graph, torch._check, insert(graph, operator.le, number, _times(graph, of_frame, frames)))
    return number


def _times(graph: Graph, factor: int, size: int | Node) -> int | Node:
    if isinstance(size, int):
        return factor * size
    return size if factor == 1 else insert(graph, operator.mul, factor, size)


def _budget(
    graph: Graph, path: VideoPath, places: int, prefix: int, sizes: VideoSizes, config: EarlyTomConfig
) -> int | Node:
    if isinstance(sizes.frames, int):
        return config.place_budget(sizes.frames, places, prefix)
    if config.encode_ratio is None:
        return 0
    arguments = (sizes.frames, places, prefix, config.encode_ratio)
    number = insert(graph, "item", insert(graph, torch.ops.earlytom.place_budget.default, *arguments))
    number.meta[HINT] = config.place_budget(likely_size(path.frames), places, prefix)
    insert(graph, torch._check, insert(graph, operator.ge, number, places))
    return number


def _runs(layers: int, full: Sequence[int]) -> list[tuple[int, int, bool]]:
    """(first, last, whether they reuse) of each run of layers that all do, or all do not."""
    runs = [list(run) for _, run in groupby(range(layers), lambda layer: layer in full)]
    return [(run[0], run[-1], run[0] not in full) for run in runs]


def _pack(
    graph: Graph, view: GraphView, flow: Dataflow, places: ReusedPlaces, chosen: Sequence[Block], begin: int
) -> None:
    """Let the blocks ``chosen``, of which the first is number ``begin``, run on packed places."""
    region, hidden = flow.between(chosen[0].input, chosen[-1].output), places.path.encoder.blocks[begin].input
    with graph.inserting_before(_behind(hidden, places.rows)):
        packed = insert(graph, torch.ops.earlytom.take_places.default, hidden, places.index, like=value_of(hidden))
    _reroute(graph, hidden, packed, region)
    places.axes += [
        ResizedAxis(packed, 0, "frames of packed places", 1),
        ResizedAxis(packed, 1, "packed places", places.total),
    ]
    for block in chosen:
        _attend(places, block.attention)
        places._packed_from[block.output] = hidden
    _gather_operands(graph, view, places, chosen[0].input, region)
    _hand_out(graph, places, region)
    _note_inputs(graph, places, chosen, begin, packed)


def _leave_out_repeats(graph: Graph, flow: Dataflow, places: ReusedPlaces, chosen: Sequence[Block], begin: int) -> None:
    """Let the blocks ``chosen``, of which the first is number ``begin``, run on the distinct frames."""
    assert places.frames is not None
    same, distinct = places.frames
    region, hidden = flow.between(chosen[0].input, chosen[-1].output), places.path.encoder.blocks[begin].input
    with graph.inserting_before(_behind(hidden, places.rows)):
        taken = insert(graph, torch.ops.earlytom.take_frames.default, hidden, same, distinct, like=value_of(hidden))
    _reroute(graph, hidden, taken, region)
    places.axes.append(ResizedAxis(taken, 0, "distinct frames", distinct))
    places._distinct_of |= {block.output: hidden for block in chosen}
    _hand_out(graph, places, region)
    _note_inputs(graph, places, chosen, begin, taken)


def _note_inputs(graph: Graph, places: ReusedPlaces, chosen: Sequence[Block], begin: int, taken: Node) -> None:
    """What the first block of a run reads now, and the one behind the run."""
    blocks, behind = list(places.path.encoder.blocks), begin + len(chosen)
    blocks[begin] = replace(chosen[0], input=taken)
    if behind < len(blocks) and blocks[behind].input is chosen[-1].output:
        blocks[behind] = replace(blocks[behind], input=places.whole(graph, chosen[-1].output))
    places.path = replace(places.path, encoder=Encoder(tuple(blocks)))


def _attend(places: ReusedPlaces, attention: Node) -> None:
    """Attention of the packed places [1, H, T, d] to all places of their frames, in the same node."""
    query, key, value = attention.args[:3]
    shapes = [tuple(map(str, (shape_of(operand) or ())[:3])) for operand in (query, key, value)]
    if len(set(shapes)) > 1 or shape_of(query)[3] != shape_of(key)[3]:  # type: ignore[index]
        raise NotReusable(
            f"attention in the vision encoder has queries {shape_of(query)}, keys {shape_of(key)} and values "
            f"{shape_of(value)}; patches are reused only where all have the same heads and tokens",
        )
    scale = attention.kwargs.get("scale")
    attention.target = torch.ops.earlytom.reuse_attention.default
    attention.args = (query, key, value, places.rows, places.offsets)
    attention.kwargs = {"scale": scale if scale is not None else int(shape_of(query)[3]) ** -0.5}  # type: ignore[index]


def _gather_operands(graph: Graph, view: GraphView, places: ReusedPlaces, hidden: Node, region: Sequence[Node]) -> None:
    """Let a run's operators read what differs from place to place, such as rotary tables, in the order in which the
    places are packed."""
    frames, tokens, *_ = view.dims(hidden) or view.dims(hidden.args[0])  # of a copy, what it is a copy of
    known = {*region, places.index, places.rows, places.offsets}
    gathered = dict[Node, Node]()
    for node in region:
        for read in node.all_input_nodes:
            dims = view.dims(read)
            if read in known or tokens not in dims:
                continue
            if frames in dims and not frames.size.is_(1):
                raise NotReusable(
                    f"{describe(node)} reads {describe(read)}, which differs from frame to frame, in a layer that "
                    "reuses patches",
                )
            if read not in gathered:
                gathered[read] = _by_place(graph, places, read, dims.index(tokens))
            read_instead(node, read, gathered[read])


def _by_place(graph: Graph, places: ReusedPlaces, operand: Node, axis: int) -> Node:
    with graph.inserting_before(_behind(places.index, operand)):
        arguments = (operand, places.index, axis)
        gathered = insert(graph, torch.ops.earlytom.at_places.default, *arguments, like=value_of(operand))
    places.axes.append(ResizedAxis(gathered, axis, "packed places", places.total))
    return gathered


def _hand_out(graph: Graph, places: ReusedPlaces, region: Sequence[Node]) -> None:
    """Give readers behind the run what leaves its blocks, of all places."""
    inside = set(region)
    for node in region:
        readers = [user for user in node.users if user not in inside and not _is_size(user)]
        if readers and node not in {*places._packed_from, *places._distinct_of}:
            raise NotReusable(
                f"{describe(readers[0])} reads {describe(node)}, which lies inside a layer of the vision encoder whose "
                "patches are reused",
            )
        if readers:
            whole = places.whole(graph, node)
            _reroute(graph, node, whole, [reader for reader in graph.nodes if reader not in {*inside, whole}])


def _reroute(graph: Graph, old: Node, new: Node, readers: Sequence[Node]) -> None:
    """Let ``readers`` take ``new`` for ``old``, and its sizes too, which may be read in nodes of their own."""
    taken, among = {old: new}, set(readers)
    for node in list(graph.nodes):
        if not taken.keys().isdisjoint(node.all_input_nodes):
            if _is_size(node):
                with graph.inserting_after(max(node, new)):
                    taken[node] = graph.node_copy(node, lambda read: taken.get(read, read))
            elif node in among:
                for read in taken.keys() & set(node.all_input_nodes):
                    read_instead(node, read, taken[read])


def _is_size(node: Node) -> bool:
    """Whether a node is a size, or computed from sizes."""
    return node.op != "output" and isinstance(value_of(node), (int, torch.SymInt, torch.Size))


def _behind(*nodes: Node) -> Node:
    """The first place in the graph where all ``nodes`` are known."""
    return max(nodes).next
