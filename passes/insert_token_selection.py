"""Keep the most important tokens of each video (algorithm.md, stage 2), or those that represent it (``plus``).

Before: ``flat = features.reshape(V, F*P, C)``
After:  ``tokens, kept = select_tokens(features, pooled_importance, dynamic, counts, K)   # [V, K, C]``
 plus:  ``tokens, kept = select_representatives(features, counts, K)                      # [V, K, C]``

``paper`` and ``plus`` keep exactly K tokens a video, so the axis F*P becomes the constant K. ``released`` keeps a
number that depends on the content, different for every video: its rows replace the flattened ones, separators
included.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from earlytom_compile.config import EarlyTomConfig
from earlytom_compile.passes.find_video_boundary import Boundary
from earlytom_compile.passes.insert_frame_merge import MergedVideo
from earlytom_compile.passes.patterns import insert, shape_of, value_of
from earlytom_compile.passes.reasons import NotApplicable
from earlytom_compile.passes.retarget_axes import ResizedAxis
from earlytom_compile.passes.video_sizes import VideoSizes


@dataclass(frozen=True)
class SelectedTokens:
    """What stage 2 keeps."""

    budget: int | Node | None  # K, tokens of each video; None where it depends on the content
    kept_counts: Node | None  # int64 [V], tokens of each video where K depends on the content
    axes: tuple[ResizedAxis, ...]  # the token axis, whose size changed


def insert_token_selection(
    graph: Graph, boundary: Boundary, sizes: VideoSizes, video: MergedVideo, config: EarlyTomConfig
) -> SelectedTokens:
    """Replace the flattened video tokens by the selected ones."""
    with graph.inserting_before(boundary.features.next):
        if video.importance is None or video.dynamic is None:
            op = torch.ops.earlytom.select_representatives.default
            selected = insert(graph, op, boundary.features, video.counts[-1], sizes.budget)
            return _kept_exactly(graph, boundary, selected, sizes)
        importance = _pool_like_features(graph, boundary, video.importance)
        operands = (boundary.features, importance, video.dynamic, video.counts[-1])
        if config.keeps_exactly():
            op = torch.ops.earlytom.select_tokens.default
            selected = insert(graph, op, *operands, sizes.budget, static_selection=config.static_selection)
            return _kept_exactly(graph, boundary, selected, sizes)
        return _select_released(graph, boundary, operands, sizes, config)


def _kept_exactly(graph: Graph, boundary: Boundary, selected: Node, sizes: VideoSizes) -> SelectedTokens:
    tokens = insert(graph, operator.getitem, selected, 0, like=value_of(boundary.flat))
    _replace(boundary.flat, tokens)
    return SelectedTokens(sizes.budget, None, (ResizedAxis(tokens, 1, "selected tokens", sizes.budget),))


def _select_released(
    graph: Graph, boundary: Boundary, operands: tuple[Node, ...], sizes: VideoSizes, config: EarlyTomConfig
) -> SelectedTokens:
    ops = torch.ops.earlytom
    op, amount = ops.select_tokens_released.default, (sizes.frames, config.retain_ratio)
    selected = insert(graph, op, *operands, *amount, static_selection=config.static_selection)
    rows = insert(graph, operator.getitem, selected, 0)
    kept_counts = insert(graph, operator.getitem, selected, 2)
    if boundary.separator is not None:
        separator = insert(graph, operator.getitem, boundary.separator, (0, 0))
        rows = insert(graph, ops.append_separators.default, rows, kept_counts, separator)
    if boundary.rows is not None:
        rows.meta["example_value"] = value_of(boundary.rows)
        _replace(boundary.rows, rows)
        axes = [ResizedAxis(rows, 0, "selected tokens", _size(graph, rows))]
        if any(user.op == "output" for user in boundary.end.users):
            # The caller gets the features too (transformers 5.24): as one batch, since videos differ in length.
            batch = insert(graph, "unsqueeze", rows, 0, like=value_of(boundary.rows).unsqueeze(0))
            _replace(boundary.end, batch)
            axes.append(ResizedAxis(batch, 1, "selected tokens", axes[0].size))
    else:
        if boundary.videos > 1:
            raise NotApplicable(
                f'variant="released" keeps a different number of tokens of each of the {boundary.videos} videos, '
                "which one [V, K, C] tensor cannot hold",
                'Encode one video at a time, or use variant="paper"',
            )
        batch = insert(graph, "unsqueeze", rows, 0, like=value_of(boundary.end))
        _replace(boundary.end, batch)
        axes = [ResizedAxis(batch, 1, "selected tokens", _size(graph, rows))]
    return SelectedTokens(None, kept_counts, tuple(axes))


def _pool_like_features(graph: Graph, boundary: Boundary, importance: Node) -> Node:
    """[N, S] -> [N, P] by the very pooling the features go through, seen as a one-channel image."""
    height, width = shape_of(boundary.pool.args[0])[2:]  # type: ignore[index]
    image = insert(graph, "view", importance, -1, 1, int(height), int(width))
    arguments: tuple[Any, ...] = (image, *boundary.pool.args[1:])
    pooled = insert(graph, boundary.pool.target, *arguments, **boundary.pool.kwargs)  # type: ignore[arg-type]
    return insert(graph, "flatten", pooled, 1)


def _size(graph: Graph, rows: Node) -> Node:
    return insert(graph, torch.ops.aten.sym_size.int, rows, 0)


def _replace(old: Node, new: Node) -> None:
    old.replace_all_uses_with(new)
