"""The numbers that follow from how many frames a video has: constants of a graph, or nodes that compute them.

One graph for videos of 8 frames::                     One graph for every length::

    frames = 8                                             frames = pixels.size(1)
    budget, fewest = 13, 1                                 budget, fewest = video_budget(frames, 16, 0.1)
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from earlytom_compile.config import EarlyTomConfig
from earlytom_compile.kernels import all_ops  # noqa: F401  (registers torch.ops.earlytom)
from earlytom_compile.passes.find_video_boundary import VideoPath
from earlytom_compile.passes.patterns import insert

HINT = "earlytom_hint"
"""Key of ``node.meta``: the number that a size known at run time only is likely to be."""


@dataclass(frozen=True)
class VideoSizes:
    """Of one video; where its length is a symbol all are nodes."""

    frames: int | Node  # F
    budget: int | Node  # K, tokens to keep
    fewest_frames: int | Node  # that merging leaves
    similarity_band: int | Node  # how many frames back similarities are needed


def video_sizes(graph: Graph, path: VideoPath, config: EarlyTomConfig) -> VideoSizes:
    """The numbers for ``path``; nodes that compute them are inserted in front of all others."""
    if isinstance(path.frames, int):
        frames = path.frames
        budget, fewest = config.token_budget(frames, path.tokens), config.min_frames(frames)
        return VideoSizes(frames, budget, fewest, config.similarity_band(frames))
    with graph.inserting_before(next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))):
        return _computed(graph, path, path.frames, config)


def _computed(graph: Graph, path: VideoPath, symbol: torch.SymInt, config: EarlyTomConfig) -> VideoSizes:
    frames = insert(graph, torch.ops.aten.sym_size.int, path.pixels, path.pixel_axis, like=symbol)
    band = insert(graph, torch.sym_min, insert(graph, operator.sub, frames, 1), config.similarity_band(config.window()))
    if not config.keeps_exactly():
        return VideoSizes(frames, 0, config.min_frames(1), band)
    table = insert(graph, torch.ops.earlytom.video_budget.default, frames, path.tokens, config.ratio_behind_encoder())
    likely = likely_size(symbol)
    budget = _read(graph, table, 0, config.token_budget(likely, path.tokens))
    most = insert(graph, operator.mul, frames, path.tokens)
    insert(graph, torch._check, insert(graph, operator.le, budget, most))
    return VideoSizes(frames, budget, _read(graph, table, 1, config.min_frames(likely)), band)


def _read(graph: Graph, table: Node, place: int, likely: int) -> Node:
    number = insert(graph, "item", insert(graph, operator.getitem, table, place))
    number.meta[HINT] = likely
    insert(graph, torch._check, insert(graph, operator.ge, number, 1))
    return number


def likely_size(size: Any) -> int:
    """A size as a number: that of the call which is compiled for, where it is a symbol."""
    return size if isinstance(size, int) else int(size.node.hint)
