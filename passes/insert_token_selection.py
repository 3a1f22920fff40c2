"""Keep the most important tokens of each video (algorithm.md, stage 2), those that represent it (``plus``), or those
that another method keeps.

Before: ``flat = features.reshape(V, F*P, C)``
After:  ``tokens, kept = select_tokens(features, pooled_importance, dynamic, counts, K)   # [V, K, C]``
 plus:  ``tokens, kept = select_representatives(features, counts, K)                      # [V, K, C]``
other:  ``tokens, kept = keep_by_method(features, importance, keys, counts, K, "visionzip") # [V, K, C]``

All but ``released`` keep exactly K tokens a video, so the axis F*P becomes the constant K. ``released`` keeps a
number that depends on the content, different for every video: its rows replace the flattened ones, separators
included.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from earlytom_compile.config import EarlyTomConfig
from earlytom_compile.methods.registry import EARLYTOM
from earlytom_compile.passes.find_video_boundary import Boundary
from earlytom_compile.passes.insert_frame_merge import MergedVideo
from earlytom_compile.passes.patterns import argument, insert, op_name, shape_of, value_of
from earlytom_compile.passes.reasons import NotApplicable
from earlytom_compile.passes.retarget_axes import ResizedAxis
from earlytom_compile.passes.token_map import TokenMap
from earlytom_compile.passes.video_sizes import VideoSizes


@dataclass(frozen=True)
class SelectedTokens:
    """What stage 2 keeps."""

    budget: int | Node | None  # K, tokens of each video; None where it depends on the content
    kept: Node  # int64 [V, K, 2] or [M, 2], the (merged frame, token) that each came from
    kept_counts: Node | None  # int64 [V], tokens of each video where K depends on the content
    axes: tuple[ResizedAxis, ...]  # the token axis, whose size changed


def insert_token_selection(
    graph: Graph,
    boundary: Boundary,
    sizes: VideoSizes,
    video: MergedVideo,
    config: EarlyTomConfig,
    token_map: TokenMap | None,
) -> SelectedTokens:
    """Replace the flattened video tokens by the selected ones."""
    ends = (boundary.flat, boundary.end, boundary.rows)
    consumers = {node: list(node.users) for node in ends if node is not None}  # before our own are among them
    with graph.inserting_before(boundary.features.next):
        features = _by_frame(graph, boundary, boundary.features, boundary.frame_axes)
        judged = features
        if boundary.judged is not boundary.features:
            judged = _by_frame(graph, boundary, boundary.judged, boundary.judged_axes)
        if config.method != EARLYTOM:
            selected = _kept_by_method(graph, judged, video, sizes, config, token_map)
            return _kept_exactly(graph, boundary, consumers, selected, sizes, features)
        if video.importance is None or video.dynamic is None:
            op = torch.ops.earlytom.select_representatives.default
            selected = insert(graph, op, judged, video.counts[-1], sizes.budget)
            return _kept_exactly(graph, boundary, consumers, selected, sizes, features)
        assert token_map is not None
        importance = token_map.carry(graph, video.importance)
        operands = (features, importance, video.dynamic, video.counts[-1])
        if config.keeps_exactly():
            op = torch.ops.earlytom.select_tokens.default
            selected = insert(graph, op, *operands, sizes.budget, static_selection=config.static_selection)
            return _kept_exactly(graph, boundary, consumers, selected, sizes)
        return _select_released(graph, boundary, consumers, operands, sizes, config)


def _kept_by_method(
    graph: Graph,
    features: Node,
    video: MergedVideo,
    sizes: VideoSizes,
    config: EarlyTomConfig,
    token_map: TokenMap | None,
) -> Node:
    importance, keys = video.importance, video.keys
    if importance is not None or keys is not None:
        assert token_map is not None
        importance = None if importance is None else token_map.carry(graph, importance)
        keys = None if keys is None else token_map.carry_keys(graph, keys)
    op = torch.ops.earlytom.keep_by_method.default
    return insert(graph, op, features, importance, keys, video.counts[-1], sizes.budget, config.method)


def _by_frame(graph: Graph, boundary: Boundary, features: Node, frame_axes: int) -> Node:
    """Features as [V*F, P, C], a node of their own."""
    rank = len(shape_of(features) or ())
    if frame_axes > 1:
        features = insert(graph, "flatten", features, 0, frame_axes - 1)
    if rank != frame_axes + 2:
        features = (
            insert(graph, "flatten", features, 1, -2)
            if rank > frame_axes + 2
            else insert(graph, "unsqueeze", features, 1)
        )
    if features is boundary.flat:
        features = insert(graph, "contiguous", features)
    return features


def _kept_exactly(
    graph: Graph,
    boundary: Boundary,
    consumers: Mapping[Node, Sequence[Node]],
    selected: Node,
    sizes: VideoSizes,
    whole: Node | None = None,
) -> SelectedTokens:
    """``whole``, [N, P, C], has all channels where ``selected`` has those that the choice was made by."""
    kept = insert(graph, operator.getitem, selected, 1)
    tokens, axis, size = insert(graph, operator.getitem, selected, 0), 1, sizes.budget
    if whole is not None and boundary.judged is not boundary.features:
        tokens = _with_other_channels(graph, boundary, whole, tokens, kept)
    if len(shape_of(boundary.flat) or ()) == 2:
        tokens, axis = insert(graph, "flatten", tokens, 0, 1), 0
        if boundary.videos > 1:
            size = (
                boundary.videos * size if isinstance(size, int) else insert(graph, operator.mul, boundary.videos, size)
            )
    tokens.meta["example_value"] = value_of(boundary.flat)
    _replace(boundary.flat, tokens, consumers[boundary.flat])
    return SelectedTokens(sizes.budget, kept, None, (ResizedAxis(tokens, axis, "selected tokens", size),))


def _with_other_channels(graph: Graph, boundary: Boundary, whole: Node, tokens: Node, kept: Node) -> Node:
    """``tokens`` [1, K, c] with what ``whole`` [N, P, C] has of the same tokens in its other channels: [1, K, C]."""
    if boundary.videos > 1:
        raise NotApplicable(
            f"channels of several layers of {boundary.videos} videos go side by side to the language model",
            "Encode one video at a time",
        )
    frame, token = (insert(graph, "select", kept, -1, place) for place in (0, 1))
    all_channels = insert(graph, operator.getitem, whole, (frame, token))
    parts = [
        tokens if part is boundary.judged else insert(graph, "narrow", all_channels, -1, start, width)
        for part, start, width in _channels(boundary)
    ]
    return insert(graph, torch.cat, parts, dim=-1)


def _channels(boundary: Boundary) -> list[tuple[Node, int, int]]:
    """Of the parts that stand side by side in the features: each, its first channel, and how many it has."""
    found, start = [], 0
    joined = next(user for user in boundary.judged.users if op_name(user) in ("cat", "concat"))
    for part in argument(joined, 0, "tensors"):
        width = int(shape_of(part)[-1])  # type: ignore[index]
        found.append((part, start, width))
        start += width
    return found


def _select_released(
    graph: Graph,
    boundary: Boundary,
    consumers: Mapping[Node, Sequence[Node]],
    operands: tuple[Node, ...],
    sizes: VideoSizes,
    config: EarlyTomConfig,
) -> SelectedTokens:
    ops = torch.ops.earlytom
    op, amount = ops.select_tokens_released.default, (sizes.frames, config.retain_ratio)
    selected = insert(graph, op, *operands, *amount, static_selection=config.static_selection)
    rows = insert(graph, operator.getitem, selected, 0)
    kept, kept_counts = (insert(graph, operator.getitem, selected, place) for place in (1, 2))
    if boundary.separator is not None:
        corner = (0,) * (len(shape_of(boundary.separator) or ()) - 1)
        separator = insert(graph, operator.getitem, boundary.separator, corner)
        rows = insert(graph, ops.append_separators.default, rows, kept_counts, separator)
    if boundary.rows is not None:
        rows.meta["example_value"] = value_of(boundary.rows)
        _replace(boundary.rows, rows, consumers[boundary.rows])
        axes = [ResizedAxis(rows, 0, "selected tokens", _size(graph, rows))]
        if boundary.end is not boundary.rows and any(user.op == "output" for user in boundary.end.users):
            # The caller gets the features too (transformers 5.24): as one batch, since videos differ in length.
            batch = insert(graph, "unsqueeze", rows, 0, like=value_of(boundary.rows).unsqueeze(0))
            _replace(boundary.end, batch, consumers[boundary.end])
            axes.append(ResizedAxis(batch, 1, "selected tokens", axes[0].size))
    else:
        if boundary.videos > 1:
            raise NotApplicable(
                f'variant="released" keeps a different number of tokens of each of the {boundary.videos} videos, '
                "which one [V, K, C] tensor cannot hold",
                'Encode one video at a time, or use variant="paper"',
            )
        batch = insert(graph, "unsqueeze", rows, 0, like=value_of(boundary.end))
        _replace(boundary.end, batch, consumers[boundary.end])
        axes = [ResizedAxis(batch, 1, "selected tokens", _size(graph, rows))]
    return SelectedTokens(None, kept, kept_counts, tuple(axes))


def _size(graph: Graph, rows: Node) -> Node:
    return insert(graph, torch.ops.aten.sym_size.int, rows, 0)


def _replace(old: Node, new: Node, consumers: Sequence[Node]) -> None:
    for consumer in consumers:
        consumer.replace_input_with(old, new)
