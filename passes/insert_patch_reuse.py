"""Compute a patch once, and again only when it changes (docs/reuse.md).

Before: ``h1 = layer0(h0); h2 = layer1(h1); h3 = layer2(h2)``                # [V*F, S, D]
After:  ``source, _, computed, _ = plan_reuse(pixels, ...)``                 # from pixels alone
        ``t = computed.sum().item()``                      # the only value the host waits for; a number with a budget
        ``index, rows, offsets = pack_places(source, t)``
        ``x0 = take_places(h0, index)``                                       # [1, t, D], what changed
        ``x1 = layer0(x0); x2 = layer1(x1)``               # attention: reuse_attention(q, k, v, rows, offsets)
        ``h2 = return_places(h0, x2, index, rows)``                           # [V*F, S, D] again
        ``h3 = layer2(h2)``                                                   # a layer in full

Between packing and returning the graph is the model's own: its frame axis has become 1 and its place axis t, which
retarget_axes writes wherever a size is spelled. The finder has shown that all of it is position-wise but the attention,
so it does not mind. Operands that differ from place to place, as rotary tables do, are taken by the packed places.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.fx import Graph, Node

from earlytom_compile.config import EarlyTomConfig
from earlytom_compile.kernels import all_ops  # noqa: F401  (registers torch.ops.earlytom)
from earlytom_compile.passes.dataflow import Dataflow
from earlytom_compile.passes.find_patch_grid import PatchGrid
from earlytom_compile.passes.find_video_boundary import VideoPath
from earlytom_compile.passes.find_vision_encoder import Block, Encoder, GraphView
from earlytom_compile.passes.patterns import insert, shape_of, value_of
from earlytom_compile.passes.reasons import NotApplicable, describe
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
    measured: Node  # float32 [V, 2], the video's noise and the threshold that followed from it
    index: Node  # int64 [T], which place each packed one is
    rows: Node  # int64 [V*F, S], the packed place that each place reads
    offsets: Node  # int64 [V*F + 1], the first packed place of each frame
    total: int | Node  # T
    axes: list[ResizedAxis] = field(default_factory=list)
    # Of what leaves a packed block: what its run was packed from, [N, S, D], and its own value in all places.
    _inputs: dict[Node, Node] = field(default_factory=dict)
    _returned: dict[Node, Node] = field(default_factory=dict)

    def is_packed(self, block: Block) -> bool:
        """Whether only places that changed go through ``block``."""
        return block.output in self._inputs

    def whole(self, graph: Graph, output: Node) -> Node:
        """What leaves a block, of all places: [N, S, D]."""
        if output not in self._inputs:
            return output
        if output not in self._returned:
            hidden = self._inputs[output]
            with graph.inserting_before(_behind(output, self.rows)):
                arguments = (hidden, output, self.index, self.rows)
                returned = insert(graph, torch.ops.earlytom.return_places.default, *arguments, like=value_of(hidden))
            self._returned[output] = returned
        return self._returned[output]

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
    flow = Dataflow(graph)
    with graph.inserting_before(blocks[0].input.next):
        places = _insert_plan(graph, path, grid, sizes, config)
    for begin, end in _runs(len(blocks), full):
        _pack(graph, view, flow, places, begin, end)
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
    total = _times(graph, path.videos, budget) if budget else _read_total(graph, path, count, sizes, computed)
    packing = insert(graph, ops.pack_places.default, source, total)
    index, rows, offsets = (insert(graph, operator.getitem, packing, i) for i in range(3))
    return ReusedPlaces(path, source, change, computed, measured, index, rows, offsets, total)


def _read_total(graph: Graph, path: VideoPath, count: int, sizes: VideoSizes, computed: Node) -> Node:
    total = insert(graph, "item", insert(graph, torch.sum, computed))
    fewest = path.videos * count
    total.meta[HINT] = max(fewest, round(_LIKELY_SHARE * fewest * likely_size(path.frames)))
    # The range of the unbacked size: a frame a video at least, at most all there is.
    insert(graph, torch._check, insert(graph, operator.ge, total, fewest))
    insert(graph, torch._check, insert(graph, operator.le, total, _times(graph, fewest, sizes.frames)))
    return total


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


def _runs(layers: int, full: Sequence[int]) -> list[tuple[int, int]]:
    """(first, last) of each run of layers that reuse."""
    reusing = [layer for layer in range(layers) if layer not in full]
    begins = [layer for layer in reusing if layer - 1 not in reusing]
    ends = [layer for layer in reusing if layer + 1 not in reusing]
    return list(zip(begins, ends, strict=True))


def _pack(graph: Graph, view: GraphView, flow: Dataflow, places: ReusedPlaces, begin: int, end: int) -> None:
    """Let layers ``begin`` to ``end`` run on packed places."""
    blocks = list(places.path.encoder.blocks)
    chosen, hidden = blocks[begin : end + 1], blocks[begin].input
    region = flow.between(hidden, chosen[-1].output)
    with graph.inserting_before(_behind(hidden, places.rows)):
        packed = insert(graph, torch.ops.earlytom.take_places.default, hidden, places.index, like=value_of(hidden))
    _reroute(graph, hidden, packed, region)
    places.axes += [
        ResizedAxis(packed, 0, "frames of packed places", 1),
        ResizedAxis(packed, 1, "packed places", places.total),
    ]
    for block in chosen:
        _attend(places, block.attention)
        places._inputs[block.output] = hidden
    _gather_operands(graph, view, places, hidden, region)
    _hand_out(graph, places, region)
    blocks[begin] = replace(chosen[0], input=packed)
    if end + 1 < len(blocks) and blocks[end + 1].input is chosen[-1].output:
        blocks[end + 1] = replace(blocks[end + 1], input=places.whole(graph, chosen[-1].output))
    places.path = replace(places.path, encoder=Encoder(tuple(blocks)))


def _attend(places: ReusedPlaces, attention: Node) -> None:
    """Attention of the packed places [1, H, T, d] to all places of their frames, in the same node."""
    query, key, value = attention.args[:3]
    shapes = [tuple(map(str, (shape_of(operand) or ())[:3])) for operand in (query, key, value)]
    if len(set(shapes)) > 1 or shape_of(query)[3] != shape_of(key)[3]:  # type: ignore[index]
        raise NotApplicable(
            f"attention in the vision encoder has queries {shape_of(query)}, keys {shape_of(key)} and values "
            f"{shape_of(value)}; patches are reused only where all have the same heads and tokens",
            "Merge frames instead: reuse=False",
        )
    scale = attention.kwargs.get("scale")
    attention.target = torch.ops.earlytom.reuse_attention.default
    attention.args = (query, key, value, places.rows, places.offsets)
    attention.kwargs = {"scale": scale if scale is not None else int(shape_of(query)[3]) ** -0.5}  # type: ignore[index]


def _gather_operands(
    graph: Graph, view: GraphView, places: ReusedPlaces, hidden: Node, region: Sequence[Node]
) -> None:
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
                raise NotApplicable(
                    f"{describe(node)} reads {describe(read)}, which differs from frame to frame, in a layer that "
                    "reuses patches",
                    "Merge frames instead: reuse=False",
                )
            if read not in gathered:
                gathered[read] = _by_place(graph, places, read, dims.index(tokens))
            node.replace_input_with(read, gathered[read])


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
        if readers and node not in places._inputs:
            raise NotApplicable(
                f"{describe(readers[0])} reads {describe(node)}, which lies inside a layer of the vision encoder that "
                "reuses patches",
                "Merge frames instead: reuse=False",
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
                for read in node.all_input_nodes:
                    node.replace_input_with(read, taken.get(read, read))


def _is_size(node: Node) -> bool:
    """Whether a node is a size, or computed from sizes."""
    return node.op != "output" and isinstance(value_of(node), (int, torch.SymInt, torch.Size))


def _behind(*nodes: Node) -> Node:
    """The first place in the graph where all ``nodes`` are known."""
    return max(nodes).next
