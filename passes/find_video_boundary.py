"""Find where a video leaves the vision encoder: where its frames end to be an axis of their own.

    h [V*F, S, D] -> ... whatever the model likes inside a frame ... -> [V*F, P, C] -> flatten [V, F*P, C]
                  (-> newline [V, F*P+1, C]) (-> rows [V*(F*P+1), C] -> masked_scatter into the embeddings)

The frame axis is followed by the axis inference (axes.py). As long as it is one axis, the model projects, pools,
shuffles and resamples inside each frame, and nobody asks how. Where frames and their tokens become one axis is the
boundary: frames merge before it, tokens are selected at it. The patches of images are taken apart, regrouped or sliced
there, so they never match and are never touched.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from earlytom_compile.passes.axes import op_name
from earlytom_compile.passes.axis_algebra import Dim, combine
from earlytom_compile.passes.axis_call import Outputs, TensorAxes
from earlytom_compile.passes.find_pixels import find_pixels
from earlytom_compile.passes.find_vision_encoder import Block, Encoder, GraphView, Miss
from earlytom_compile.passes.patterns import MOVES, argument, peel, readers, shape_of, value_of
from earlytom_compile.passes.reasons import NotApplicable, describe

_IN_ORDER = frozenset(
    ("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "contiguous", "clone", "to", "float", "type_as")
)
"""Moves that leave the numbers in their order."""


@dataclass(frozen=True)
class Placeholders:
    """The scatter of video rows over the prompt's placeholder tokens."""

    scatter: Node
    input_ids: Node  # [R, S]
    token: int


@dataclass(frozen=True)
class VideoPath:
    """Frames on their way through a vision encoder: V videos of F frames, P tokens a frame where they leave it."""

    encoder: Encoder
    videos: int
    frames: int | torch.SymInt  # a symbol where one graph serves videos of every length
    tokens: int
    pixels: Node  # [V, F, ...], or [F, ...] of one video
    pixel_axis: int  # where F is


@dataclass(frozen=True)
class Boundary(VideoPath):
    """A video path that goes on into rows of a language model, of C channels."""

    features: Node  # [V*F, ..., C], or [1, F, ..., C] of one video; P is the product of the axes in the middle
    frame_axes: int  # 1, or 2 with the axis of one video
    judged: Node  # what decides which tokens stay: `features`, or the part of their channels made of the last layer
    flat: Node  # [V, F*P, C] or [V*F*P, C]
    separator: Node | None  # [V, 1, C] or [1, C], joined behind each video's tokens
    end: Node  # last node of the chain that has the axes of `flat`
    rows: Node | None  # [V*(F*P (+1)), C]
    placeholders: Placeholders | None

    @property
    def judged_axes(self) -> int:
        """How many of the first axes of ``judged`` are those of frames."""
        return self.frame_axes if self.judged is self.features else 1

    def rows_of(self, frames: int) -> int:
        """Rows (and so placeholder tokens) of one uncompressed video of so many frames."""
        return frames * self.tokens + (self.separator is not None)


def find_video_boundary(
    view: GraphView, encoders: Sequence[Encoder], misses: Sequence[Miss] = (), *, any_length: bool = False
) -> Boundary:
    """The video path of the graph; :class:`NotApplicable` if there is none that is understood, or more than one.
    Unless ``any_length``, the graph is specialised to its number of frames. ``misses`` are attentions of no block."""
    found, reasons = [], []
    for encoder in encoders:
        try:
            found.append(_match(view, encoder, misses, any_length))
        except NotApplicable as reason:
            reasons.append(reason)
    if len(found) > 1:
        raise NotApplicable(
            f"the graph has {len(found)} video paths ({', '.join(b.encoder.name for b in found)})",
            "Pass the videos of a call as one [V, F, C, H, W] tensor",
        )
    if not found:
        raise reasons[0]
    return found[0]


def _require_whole(view: GraphView, encoder: Encoder, misses: Sequence[Miss], pixels: Node, end: Node) -> None:
    """Raise where the chain is only a part of a tower, whose layers would be counted wrongly."""
    size = list(map(str, (shape_of(encoder.blocks[0].attention) or ())[1:]))
    for miss in misses:
        if not view.flow.is_from(miss.attention, pixels):
            continue
        like_ours = list(map(str, (shape_of(miss.attention) or ())[1:])) == size and view.flow.is_from(
            end, miss.attention
        )
        if view.flow.is_from(encoder.blocks[0].input, miss.attention) or like_ours:
            raise NotApplicable(
                f"the vision encoder {encoder.name} was understood only in part: {describe(miss.at)} was taken for "
                f"{miss.taken_for}, and is not",
                "docs/adding-a-model.md says what a block must be; other models run uncompressed",
            )


def find_tower_path(
    view: GraphView, encoders: Sequence[Encoder], misses: Sequence[Miss] = (), *, any_length: bool = False
) -> VideoPath:
    """The path of the only video [F, ...] of a graph that is a vision tower and nothing else, whose result has a row
    for each frame; :class:`NotApplicable` if it is something else."""
    if len(encoders) > 1:
        raise NotApplicable(
            f"the tower has {len(encoders)} encoders ({', '.join(each.name for each in encoders)}), whose frames would "
            "merge in different ways",
            "Compile the part of it that you need",
        )
    (encoder,) = encoders
    pixels, axis, batch = find_pixels(view, encoder)
    videos, frames = _counts(pixels, axis, any_length)
    ends = _exits(view, encoder.blocks[0].output, batch) if not statically_known_true(frames == 1) else []
    if ends:
        raise NotApplicable(
            f"the frames of the vision encoder {encoder.name} flow into {describe(ends[0])}, behind which there is no "
            "row for each of them",
            "Give a tower that returns [frames, tokens, channels], or compile the whole model with "
            "earlytom_compile.compile(model)",
        )
    (output,) = (node for node in view.graph.nodes if node.op == "output")
    for end in output.all_input_nodes:
        _require_whole(view, encoder, misses, pixels, end)
    hidden = encoder.blocks[-1].output
    if mixing := view.first_mixing(hidden, (0,), *(n for n in output.all_input_nodes if view.flow.is_from(n, hidden))):
        raise NotApplicable(f"{describe(mixing)} mixes the frames behind the vision encoder {encoder.name}", _LEAVE)
    return VideoPath(encoder, videos, frames, int(shape_of(hidden)[1]), pixels, axis)  # type: ignore[index]


_LEAVE = "Frames can merge only where nothing but the prompt brings them together; leave this model to another backend"


def _counts(pixels: Node, axis: int, any_length: bool) -> tuple[int, int | torch.SymInt]:
    """(V, F). The number of videos and the resolution are what a compiled video path is specialised to: int() guards
    them."""
    shape = shape_of(pixels)
    assert shape is not None
    return int(shape[0]) if axis else 1, shape[axis] if any_length else int(shape[axis])


def _match(view: GraphView, encoder: Encoder, misses: Sequence[Miss], any_length: bool) -> Boundary:
    pixels, axis, batch = find_pixels(view, encoder)
    videos, frames = _counts(pixels, axis, any_length)
    if statically_known_true(frames == 1):
        if axis == 0 and not any_length:  # in a graph of a whole call; a path for videos gets nothing else
            raise NotApplicable(
                f"{pixels.target} has one picture, [1, channels, height, width], which is an image",
                "Images are never compressed; a video of one frame is [1, 1, channels, height, width]",
            )
        flat = _flat_of_single_frames(view, encoder, videos)
        features, frame_axes = flat, 1
    elif any_length and (single := _rows_of_single_tokens(view, batch)) is not None:
        flat, features, frame_axes = *single, 1
    else:
        flat, features, frame_axes = _flatten(view, encoder, videos, batch)
    used = next(n for n in range(len(encoder.blocks), 0, -1) if view.flow.is_from(flat, encoder.blocks[n - 1].output))
    _require_whole(view, encoder, misses, pixels, flat)
    for hidden in (encoder.blocks[used - 1].output, *read_behind(view, encoder.blocks[:used], flat)):
        if mixing := view.first_mixing(hidden, (0,), features):
            raise NotApplicable(
                f"{describe(mixing)} mixes the frames of a video behind the vision encoder {encoder.name}, tells them "
                "apart as a time embedding does, or has no axis rule; it was taken for a part of the projector, which "
                "sees each frame alone",
                _LEAVE,
            )
    shape = shape_of(features)
    assert shape is not None
    tokens = math.prod([int(size) for size in shape[frame_axes:-1]])
    flat = _last_of_its_shape(flat)
    separator, end = _separator_after(flat)
    rows = end if len(shape_of(end) or ()) == 2 else _rows_after(end)
    return Boundary(
        Encoder(encoder.blocks[:used]),
        videos,
        frames,
        tokens,
        pixels,
        axis,
        features,
        frame_axes,
        _judged(view, features, encoder.blocks[used - 1].output, batch),
        flat,
        separator,
        end,
        rows,
        _placeholders(rows if rows is not None else end),
    )


def read_behind(view: GraphView, blocks: Sequence[Block], end: Node) -> dict[Node, list[Node]]:
    """What leaves a layer before the last and goes on to ``end`` beside the next layer, as with several
    ``vision_feature_layer`` or DeepStack -> who reads it there."""
    found = {}
    for block, following in pairwise(blocks):
        inside = {following.output, *view.flow.between(block.output, following.output)}
        beside = [user for user in block.output.users if user not in inside and view.flow.is_from(end, user)]
        if beside:
            found[block.output] = beside
    return found


def _judged(view: GraphView, features: Node, hidden: Node, batch: Dim) -> Node:
    """The only part of ``features`` that is made of ``hidden``, [T, ..., c], where channels of other layers stand
    beside it."""
    joined = peel(features, _IN_ORDER)
    if op_name(joined) not in ("cat", "concat") or _joins_tokens(joined):
        return features
    own = [part for part in argument(joined, 0, "tensors") if view.flow.is_from(part, hidden)]
    one_frame = batch.size.is_(1)
    return own[0] if len(own) == 1 and (one_frame or view.dims(own[0])[:1] == (batch,)) else features


# Frames: from the encoder to where they meet their tokens


def _flatten(view: GraphView, encoder: Encoder, videos: int, batch: Dim) -> tuple[Node, Node, int]:
    """(the node at which frames and tokens become one axis, the features before it, the frame axes of those)."""
    exits = _exits(view, encoder.blocks[0].output, batch)
    if not exits:
        raise NotApplicable(
            f"the frames of the vision encoder {encoder.name} never meet their tokens in one axis before the graph "
            "ends: a graph break inside the vision path, or a vision tower compiled alone",
            'Look for graph breaks with TORCH_LOGS="graph_breaks", or use earlytom_compile.compile(model); a vision '
            "tower alone is for earlytom_compile.compile_tower(tower)",
        )
    joined = [found for node in exits if (found := _joined(view, node, videos, batch)) is not None]
    if len(joined) != 1 or len(exits) != 1:
        strange = next((node for node in exits if _joined(view, node, videos, batch) is None), exits[-1])
        raise NotApplicable(
            f"no video passes through the vision encoder {encoder.name} in a way that is understood: its frames flow "
            f"into {describe(strange)}, which was taken for the place where frames and their tokens become one axis",
            "Images, whose patches are taken apart there, are never compressed; a vision tower alone is for "
            "earlytom_compile.compile_tower(tower); for other models see docs/adding-a-model.md",
        )
    return joined[0]


def _rows_of_single_tokens(view: GraphView, batch: Dim) -> tuple[Node, Node] | None:
    """(rows [F, C], features [F, 1, C]) where a frame has one token, so that a video's rows have its frames' axis."""
    (output,) = (node for node in view.graph.nodes if node.op == "output")
    flat = output.all_input_nodes[0]
    if op_name(flat) not in _IN_ORDER or not _has(view, flat.all_input_nodes[0], batch):
        return None
    dims = view.dims(flat.all_input_nodes[0])
    single = len(view.dims(flat)) == 2 and len(dims) == 3 and dims[0].root is batch and dims[1].size.is_(1)
    return (flat, flat.all_input_nodes[0]) if single else None


def _has(view: GraphView, node: Node, batch: Dim) -> bool:
    """Whether a node, or each of its results, has the frames as an axis of its own."""

    def has(value: object) -> bool:
        if isinstance(value, Outputs):
            return all(map(has, value))
        return isinstance(value, TensorAxes) and any(dim.root is batch for dim in value.dims)

    return has(view.axes.values.get(node))


def _exits(view: GraphView, source: Node, batch: Dim) -> list[Node]:
    """The first nodes behind ``source`` that do not have the frames as an axis of their own, and behind which nothing
    has: a linear over the rows [T * S, D] is none."""
    behind = [node for node in view.flow.behind(source) if node.op != "output" and _is_data(node)]
    framed = {source, *(node for node in behind if _has(view, node, batch))}
    ends = [node for node in behind if node not in framed and not framed.isdisjoint(node.all_input_nodes)]
    return [node for node in ends if framed.isdisjoint(view.flow.behind(node))]


def _is_data(node: Node) -> bool:
    value = value_of(node)
    return value is None or (isinstance(value, (torch.Tensor, tuple, list)) and not isinstance(value, torch.Size))


def _joined(view: GraphView, node: Node, videos: int, batch: Dim) -> tuple[Node, Node, int] | None:
    """(flat, features, their frame axes) if ``node``, or what follows it, lays the tokens of each frame behind those of
    the frame before: [V*F, P, C] as [V, F*P, C], [V*F*P, C], or first as [V, F, P, C]."""
    features = next(arg for arg in node.all_input_nodes if _has(view, arg, batch))
    dims = view.dims(features)
    frame = next(i for i, dim in enumerate(dims) if dim is batch)
    if len(dims) < frame + 2 or any(not dim.size.is_(1) for dim in dims[:frame]):
        return None
    rows = combine("product", [dim.size for dim in dims[:-1]])
    while op_name(node) in _IN_ORDER:
        shape, own = shape_of(node) or (), view.dims(node)
        by_video = len(own) == 2 or (len(own) == 3 and statically_known_true(shape[0] == videos))
        if by_video and own[-1] is dims[-1] and combine("product", [dim.size for dim in own[:-1]]).same(rows):
            return node, features, frame + 1
        if len(following := readers(node)) != 1:
            return None
        (node,) = following
    return None


def _flat_of_single_frames(view: GraphView, encoder: Encoder, videos: int) -> Node:
    """The tokens [V, P, C] of videos of one frame each, whose frame axis cannot be told from one of size 1: the last
    such node before another joins them, or before they become rows."""
    flat = None
    for node in (encoder.blocks[-1].output, *view.flow.behind(encoder.blocks[-1].output)):
        shape = shape_of(node)
        ends = op_name(node) == "masked_scatter" or _joins_tokens(node) or (shape is not None and len(shape) == 2)
        if node.op == "output" or (ends and flat is not None and view.flow.is_from(node, flat)):
            break
        if shape is not None and len(shape) == 3 and statically_known_true(shape[0] == videos):
            flat = node
    if flat is None:
        raise NotApplicable(
            f"the tokens of a video of one frame never take the shape [{videos}, tokens, channels] behind the vision "
            f"encoder {encoder.name}",
            "Give the video two frames or more",
        )
    return flat


def _joins_tokens(node: Node) -> bool:
    """Whether a node puts tensors side by side along any axis but that of their channels."""
    joins = op_name(node) in ("cat", "concat")
    return joins and argument(node, 1, "dim", 0) not in (-1, len(shape_of(node) or ()) - 1)


# Behind the boundary


def _last_of_its_shape(flat: Node) -> Node:
    """The last in a run of moves that leave the shape of ``flat`` alone."""
    while len(following := readers(flat)) == 1 and (op_name(following[0]) in MOVES or _joins_one(following[0])):
        if list(map(str, shape_of(following[0]) or ())) != list(map(str, shape_of(flat) or ())):
            break
        flat = following[0]
    return flat


def _joins_one(node: Node) -> bool:
    """``cat([video])``, which is what joins the videos of a call where there is one."""
    parts = argument(node, 0, "tensors")
    return op_name(node) in ("cat", "concat") and isinstance(parts, (tuple, list)) and len(parts) == 1


def _separator_after(flat: Node) -> tuple[Node | None, Node]:
    """``cat((flat, separator), dim)`` along the tokens, the newline embedding, if the model has one."""
    (joined,) = [*readers(flat, "cat", "concat"), None][:1]
    if joined is None or len(readers(flat)) != 1:
        return None, flat
    along = len(shape_of(flat) or ()) - 2
    parts = argument(joined, 0, "tensors")
    if argument(joined, 1, "dim", 0) not in (along, -2) or len(parts) != 2 or parts[0] is not flat:
        raise NotApplicable(
            f"video tokens are joined with other tokens in an unknown way by {describe(joined)}",
            "Only one separator behind each video is supported",
        )
    shape = shape_of(parts[1])
    if shape is None or int(shape[along]) != 1:
        raise NotApplicable(f"the separator of {joined.name} has shape {shape}", "One row a video is supported")
    return parts[1], joined


def _rows_after(end: Node) -> Node | None:
    """The [V*rows, C] reshape of ``end``, if the graph goes that far."""
    following = readers(end)
    if not following:
        return None
    if len(following) == 1 and op_name(following[0]) in MOVES and len(shape_of(following[0]) or ()) == 2:
        return following[0]
    if len(following) == 1 and op_name(following[0]) in MOVES and not readers(following[0], "masked_scatter"):
        return _rows_after(following[0])
    return None if any(op_name(user) == "masked_scatter" for user in following) else _unknown(following[0])


def _placeholders(rows: Node) -> Placeholders | None:
    """The ``masked_scatter`` of ``rows`` where ``input_ids == token``."""
    carriers = [rows]
    while not readers(carriers[-1], "masked_scatter"):
        following = [user for user in readers(carriers[-1]) if op_name(user) in MOVES]
        if len(following) != 1:
            return None
        carriers.append(following[0])
    (scatter,) = readers(carriers[-1], "masked_scatter")
    mask = peel(argument(scatter, 1, "mask"))
    ids, token = (mask.args + (None, None))[:2] if op_name(mask) == "eq" else (None, None)
    if not isinstance(ids, Node) or ids.op != "placeholder" or not isinstance(token, int):
        raise NotApplicable(
            "the positions of the video in the prompt are not computed from input_ids "
            f"({scatter.name} is masked by {getattr(mask, 'name', mask)})",
            "Call the model with input_ids, not with inputs_embeds",
        )
    return Placeholders(scatter, ids, token)


def _unknown(node: Node) -> Node:
    raise NotApplicable(
        f"video features flow into {op_name(node) or node.op} ({describe(node)}), which is not understood",
        "Only newlines and masked_scatter are known behind the place where frames and tokens become one axis",
    )
