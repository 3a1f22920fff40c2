"""Merge redundant frames after the chosen encoder layers (algorithm.md, stage 1).

Before: ``h7 = layer7(h6)``  # [T, S, D]
After:  ``sim = frame_similarity(h6); source, weight, counts = plan_merge(sim, counts)``
        ``n = counts.sum().item()                    # the only value the host waits for``
        ``h6, = merge_frames([h6], source, weight, n)  # [n, S, D], n unknown until run time``
        ``h7 = layer7(h6)``

The last merge layer also yields what token selection needs: the importance of every token (the attention it
receives in that layer, which rides along with its frame: ``merge_frames([h23, importance], ...)``) and which frames
begin or end a segment; ``plus``, which compares the tokens themselves, needs neither. Frame counts differ between
videos, so they travel as a tensor; videos stay consecutive and never mix. With the method of another paper no frames
merge, and what that method asks for, importance or the keys of the encoder's attention, is read of its layer.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from earlytom_compile.config import EarlyTomConfig
from earlytom_compile.kernels import all_ops  # noqa: F401  (registers torch.ops.earlytom)
from earlytom_compile.methods.registry import EARLYTOM
from earlytom_compile.passes.find_video_boundary import Boundary, VideoPath, read_behind
from earlytom_compile.passes.find_vision_encoder import Block, GraphView
from earlytom_compile.passes.insert_patch_reuse import ReusedPlaces
from earlytom_compile.passes.opaque_operators import read_instead
from earlytom_compile.passes.patterns import insert, shape_of, value_of
from earlytom_compile.passes.reasons import NotApplicable
from earlytom_compile.passes.retarget_axes import ResizedAxis
from earlytom_compile.passes.video_sizes import HINT, VideoSizes, likely_size

_FEWEST_MERGEABLE = 4
"""A segment's head and tail never merge, and a merge needs two frames between them."""


@dataclass(frozen=True)
class MergedVideo:
    """What stage 1 leaves behind, as graph nodes; N frames in all, S tokens each."""

    importance: Node | None  # float32 [N, S]; None where selection does not need it
    keys: Node | None  # float32 [N, S, d], of the scored layer's attention; likewise
    dynamic: Node | None  # bool [N]; likewise
    counts: tuple[Node, ...]  # int64 [V], frames of each video: at first, then after each merge layer
    first: Node | None  # int64 [N], the first of the frames each is made of; None unless asked for and some merge
    plans: tuple[tuple[Node, Node], ...]  # (source, weight) of each merge layer, see kernels/plan_merge.py
    axes: tuple[ResizedAxis, ...]  # the frame axes that changed


def insert_frame_merge(
    graph: Graph,
    view: GraphView,
    path: VideoPath,
    sizes: VideoSizes,
    config: EarlyTomConfig,
    reused: ReusedPlaces | None = None,
    *,
    tell_first: bool = False,
) -> MergedVideo:
    """Insert the merge ops of every merge layer; literals that mean the frame axis still have their old size. Where
    patches are ``reused`` instead no frames merge, and what selection needs is read of all their places."""
    encoder = path.encoder
    blocks, layers = encoder.blocks, config.resolve_merge_layers(len(encoder.blocks), encoder.full_layers)
    scored = blocks[config.scored_layer(len(blocks), encoder.full_layers)]
    riding = _Riding.of(view, path) if layers else _Riding({})
    importance, keys, dynamic = None, None, None
    with graph.inserting_before(scored.attention):
        if config.selects_by_attention():
            importance = _attention_received(graph, scored, reused)
        if config.selects_by_keys():
            keys = _mean_keys(graph, scored, reused)
    # Where frames are counted at run time, no operator between pixels and layers may ask for their number.
    with graph.inserting_before(sizes.frames.next if isinstance(sizes.frames, Node) else blocks[0].input.next):
        counts = [_frame_counts(graph, path, sizes)]
    features = reused.whole(graph, scored.output) if reused is not None else scored.output
    axes, plans, first = [], [], None
    for layer in layers:
        if isinstance(path.frames, int) and path.frames < _FEWEST_MERGEABLE:
            counts.append(counts[-1])
            continue
        outputs, scores = riding.at(blocks[:layer]), [importance] if blocks[layer] is scored and importance else []
        riders = [*scores, *map(riding.as_merged, outputs)]
        merge = _merge_behind(graph, blocks[layer], riders, counts[-1], path, sizes, config)
        counts.append(merge.counts)
        plans.append(merge.plan)
        axes.append(ResizedAxis(merge.hidden, 0, f"frames after layer {layer}", merge.size))
        for output, merged in zip(outputs, merge.riders[len(scores) :], strict=True):
            riding.note(output, merged, merge.size)
        riding.read[blocks[layer].output] = merge.hidden
        if tell_first and path.videos == 1:
            first = _first_of_merged(graph, first, merge)
        if scores:
            features, importance = merge.hidden, merge.riders[0]
    axes += riding.arrive()
    if importance is not None and config.method == EARLYTOM:
        with graph.inserting_before(_behind(features, importance)):
            band = sizes.similarity_band
            similarity = insert(graph, torch.ops.earlytom.frame_similarity.default, features, band)
            dynamic = insert(
                graph, torch.ops.earlytom.dynamic_frames.default, similarity, counts[-1], **_segmentation(config)
            )
    return MergedVideo(importance, keys, dynamic, tuple(counts), first, tuple(plans), tuple(axes))


@dataclass
class _Riding:
    """What leaves earlier layers and goes on beside the encoder: it merges as the frames it is of do later."""

    readers: dict[Node, list[Node]]
    """Output of a layer, as the model has it -> who reads it beside the next layer."""
    read: dict[Node, Node] = field(default_factory=dict)
    """-> what these read as long as nobody else is told: the output, or that of a merge right behind it."""
    now: dict[Node, ResizedAxis] = field(default_factory=dict)
    """-> what it has become by the merges so far."""

    @classmethod
    def of(cls, view: GraphView, path: VideoPath) -> "_Riding":
        """None rides in a tower that goes no further."""
        return cls(read_behind(view, path.encoder.blocks, path.flat) if isinstance(path, Boundary) else {})

    def at(self, blocks: Sequence[Block]) -> list[Node]:
        """Outputs of ``blocks``, the layers before one that merges, that ride along there."""
        return [block.output for block in blocks if block.output in self.readers]

    def as_merged(self, output: Node) -> Node:
        """What rides for ``output``."""
        return self.now[output].node if output in self.now else self.read.get(output, output)

    def note(self, output: Node, merged: Node, size: Node) -> None:
        """It is ``merged`` now, of ``size`` frames."""
        self.now[output] = ResizedAxis(merged, 0, "frames of an earlier layer", size)

    def arrive(self) -> list[ResizedAxis]:
        """Let the readers read what it has become; returns the frame axes that changed."""
        for output, axis in self.now.items():
            for reader in self.readers[output]:
                reader.replace_input_with(self.read.get(output, output), axis.node)
        return list(self.now.values())


@dataclass(frozen=True)
class _Merge:
    """What one merge layer leaves."""

    hidden: Node  # [n, S, D]
    riders: list[Node]  # [n, ...], what was merged with the frames
    counts: Node  # int64 [V]
    size: Node  # n, their sum
    plan: tuple[Node, Node]  # source and weight


def _merge_behind(
    graph: Graph,
    block: Block,
    riders: Sequence[Node],
    counts: Node,
    path: VideoPath,
    sizes: VideoSizes,
    config: EarlyTomConfig,
) -> _Merge:
    """Insert the ops of one merge layer right behind its block; whoever read the block reads the merged frames."""
    ops, before = torch.ops.earlytom, block.output
    consumers = list(before.users)
    options = {
        **_segmentation(config),
        "tau_merge": math.nan if config.tau_merge == "segment" else float(config.tau_merge),
        "min_frames": sizes.fewest_frames,
    }
    with graph.inserting_before(before.next):
        similarity = insert(graph, ops.frame_similarity.default, before, sizes.similarity_band)
        plan = insert(graph, ops.plan_merge.default, similarity, counts, **options)
        source, weight, counts = (insert(graph, operator.getitem, plan, i) for i in range(3))
        size = insert(graph, "item", insert(graph, torch.sum, counts))
        size.meta[HINT] = path.videos * likely_size(path.frames)
        # The range of the unbacked size: at least a frame a video, at most what there was.
        insert(graph, torch._check, insert(graph, operator.ge, size, path.videos))
        insert(graph, torch._check, insert(graph, operator.le, size, _times(graph, path.videos, sizes.frames)))
        merged = insert(graph, ops.merge_frames.default, [before, *riders], source, weight, size)
        hidden = insert(graph, operator.getitem, merged, 0, like=value_of(before))
        riders = [insert(graph, operator.getitem, merged, i, like=value_of(x)) for i, x in enumerate(riders, 1)]
    for consumer in consumers:
        read_instead(consumer, before, hidden)
    return _Merge(hidden, riders, counts, size, (source, weight))


def _first_of_merged(graph: Graph, first: Node | None, merge: _Merge) -> Node:
    """int64 [n]: of the frames that a merged one is made of, the first."""
    source, _ = merge.plan
    with graph.inserting_before(merge.hidden.next):
        return insert(graph, torch.ops.earlytom.first_of_merged.default, first, source, merge.size)


def _times(graph: Graph, videos: int, frames: int | Node) -> int | Node:
    return videos * frames if isinstance(frames, int) else insert(graph, operator.mul, videos, frames)


def _frame_counts(graph: Graph, path: VideoPath, sizes: VideoSizes) -> Node:
    device = value_of(path.pixels).device  # type: ignore[union-attr]
    return insert(graph, torch.full, (path.videos,), sizes.frames, dtype=torch.int64, device=device)


def _attention_received(graph: Graph, block: Block, reused: ReusedPlaces | None) -> Node:
    query, key = shape_of(block.query), shape_of(block.key)
    if query != key:
        raise NotApplicable(
            f"attention in the vision encoder has queries {query} and keys {key}; the importance of a token is "
            "known only where both have the same heads and tokens",
            "Repeat grouped key heads to the query's heads in the model, or leave it to another backend",
        )
    head_dim = int(shape_of(block.query)[-1])  # type: ignore[index]
    scale = block.scale if block.scale is not None else 1 / math.sqrt(head_dim)
    heads = block.query, block.key
    if reused is not None and reused.is_packed(block):
        heads = reused.spread(graph, block.query), reused.spread(graph, block.key)
    if block.windows:
        return insert(graph, torch.ops.earlytom.window_attention_received.default, *heads, block.windows, scale)
    received = insert(graph, torch.ops.earlytom.attention_received.default, *heads, scale)
    if reused is not None and reused.has_distinct_frames(block):
        return reused.of_all_frames(graph, received)
    return received


def _mean_keys(graph: Graph, block: Block, reused: ReusedPlaces | None) -> Node:
    """float32 [N, S, d]: keys of a block, mean over heads."""
    key = block.key
    if reused is not None and reused.is_packed(block):
        key = reused.spread(graph, key)
    mean = insert(graph, torch.mean, key, 1, dtype=torch.float32)
    if reused is not None and reused.has_distinct_frames(block):
        return reused.of_all_frames(graph, mean)
    return mean


def _segmentation(config: EarlyTomConfig) -> dict[str, Any]:
    return {
        "variant": config.merge_variant(),
        "tau_seg": float(config.tau_seg),
        "alpha": float(config.alpha),
        "max_window": config.window(),
    }


def _behind(*nodes: Node) -> Node:
    """The first place in the graph where all ``nodes`` are known."""
    return max(nodes).next
