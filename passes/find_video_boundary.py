"""Find where a video leaves the vision encoder, and tell it from images.

    h [V*F, S, D] -> projector -> 2-D pooling -> [V*F, P, C] -> flatten [V, F*P, C]
                  (-> newline [V, F*P+1, C]) (-> rows [V*(F*P+1), C] -> masked_scatter into the embeddings)

What makes it a video is the data flow: the encoder's frames come from a five-dimensional [V, F, C, H, W] input,
stay one batch up to the 2-D pooling, and only then join with the tokens of their frame. Image patches are split,
regrouped or sliced right after the projector, so they never match and are never touched.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from earlytom_compile.passes.find_vision_encoder import NORMS, Encoder
from earlytom_compile.passes.patterns import ACTIVATIONS, MOVES, argument, op_name, peel, readers, shape_of
from earlytom_compile.passes.reasons import NotApplicable

POOLS = frozenset(("interpolate", "avg_pool2d", "max_pool2d", "adaptive_avg_pool2d"))
_PROJECTOR = NORMS | ACTIVATIONS | MOVES | {"linear"}


@dataclass(frozen=True)
class Placeholders:
    """The scatter of video rows over the prompt's placeholder tokens."""

    scatter: Node
    input_ids: Node  # [R, S]
    token: int


@dataclass(frozen=True)
class Boundary:
    """One video path. V videos of F frames, P tokens a frame after pooling, C channels of the language model."""

    encoder: Encoder
    videos: int
    frames: int | torch.SymInt  # a symbol where one graph serves videos of every length
    tokens: int
    pixels: Node  # [V, F, 3, H, W]
    pool: Node  # [V*F, C, h, w] -> [V*F, C, h', w']
    features: Node  # [V*F, P, C]
    flat: Node  # [V, F*P, C]
    separator: Node | None  # [V, 1, C], joined behind each video's tokens
    end: Node  # last node of the chain in the shape [V, F*P (+1), C]
    rows: Node | None  # [V*(F*P (+1)), C]
    placeholders: Placeholders | None

    def rows_of(self, frames: int) -> int:
        """Rows (and so placeholder tokens) of one uncompressed video of so many frames."""
        return frames * self.tokens + (self.separator is not None)


def find_video_boundary(encoders: list[Encoder], *, any_length: bool = False) -> Boundary | None:
    """The video path of the graph; None if there is none, :class:`NotApplicable` if there is one that is
    not understood or more than one. Unless ``any_length``, the graph is specialised to its number of frames."""
    found = [boundary for encoder in encoders if (boundary := _match(encoder, any_length)) is not None]
    if len(found) > 1:
        raise NotApplicable(
            f"the graph has {len(found)} video paths ({', '.join(b.encoder.name for b in found)})",
            "Pass the videos of a call as one [V, F, C, H, W] tensor",
        )
    return found[0] if found else None


def _match(encoder: Encoder, any_length: bool) -> Boundary | None:
    pixels = _video_input(encoder)
    if pixels is None:
        return None
    # The features may be taken before the last layer, which runs for the caller alone then (transformers 5.24).
    lengths = range(len(encoder.blocks), 0, -1)
    used, pool = next(((n, pool) for n in lengths if (pool := _path_to_pool(encoder.blocks[n - 1].output))), (0, None))
    if pool is None:
        return None
    encoder = Encoder(encoder.blocks[:used])
    # The number of videos and the resolution are what a compiled video path is specialised to: int() guards them.
    videos, frames = shape_of(pixels)[:2]  # type: ignore[index]
    videos, frames = int(videos), frames if any_length else int(frames)
    features, flat = _flatten_after(pool, videos, frames)
    tokens = int(shape_of(features)[1])  # type: ignore[index]
    separator, end = _separator_after(flat)
    rows = _rows_after(end)
    return Boundary(
        encoder,
        videos,
        frames,
        tokens,
        pixels,
        pool,
        features,
        flat,
        separator,
        end,
        rows,
        _placeholders(rows),
    )


def _video_input(encoder: Encoder) -> Node | None:
    """The [V, F, C, H, W] tensor whose frames the encoder's first convolution sees as one batch."""
    node = peel(encoder.blocks[0].input)
    while op_name(node) in ("add", "iadd", "layer_norm"):  # patch embeddings + positions (+ a norm)
        patches = [peel(arg) for arg in node.args if op_name(peel(arg)) not in ("", "embedding")]
        if len(patches) != 1:
            return None
        node = patches[0]
    pixels = node.args[0] if op_name(node) == "conv2d" else None
    while len(shape_of(pixels) or ()) != 5 and op_name(pixels) in MOVES:
        pixels = pixels.args[0]  # type: ignore[union-attr]
    return pixels if len(shape_of(pixels) or ()) == 5 else None


def _path_to_pool(node: Node) -> Node | None:
    """Walk from a layer's output through a position-wise projector to a 2-D pooling; None if it goes elsewhere."""
    for _ in range(64):
        following = _way_on(node)
        if following is None or op_name(following) in POOLS:
            return following
        if op_name(following) not in _PROJECTOR:
            return None
        node = following
    return None


def _way_on(node: Node) -> Node | None:
    """The one reader of ``node`` that matters, None if several do.

    Transformers 5.24 returns the encoder's own outputs beside the logits, so that a norm reads the last layer for
    the caller alone: nothing computed from it meets anything computed from the features.
    """
    following = readers(node)
    if len(following) < 2:
        return following[0] if following else None
    reached = {user: set(_downstream(user)) for user in following}
    ways = [user for user in following if any(op_name(other) in POOLS for other in reached[user])]
    if len(ways) != 1 or any(reached[user] & reached[ways[0]] for user in following if user is not ways[0]):
        return None
    return ways[0]


def _downstream(node: Node) -> Iterator[Node]:
    """``node`` and everything computed from it, without the graph's output."""
    pending, seen = [node], {node}
    while pending:
        yield (current := pending.pop())
        following = {user for user in current.users if user.op != "output"} - seen
        seen |= following
        pending += following


def _flatten_after(pool: Node, videos: int, frames: int | torch.SymInt) -> tuple[Node, Node]:
    """([V*F, P, C], [V, F*P, C]): the last node of each shape in the run of moves behind the pooling."""
    channels = shape_of(pool)[1]  # type: ignore[index]
    run = [pool]
    while len(following := readers(run[-1])) == 1 and op_name(following[0]) in MOVES:
        run += following
    height, width = map(int, shape_of(pool)[2:])  # type: ignore[index]
    area = height * width
    per_frame = [n for n in run if _is(shape_of(n), videos * frames, area, channels)]
    per_video = [n for n in run if _is(shape_of(n), videos, frames * area, channels)]
    if not per_frame or not per_video:
        shapes = [tuple(map(str, shape_of(n) or ())) for n in run]
        raise NotApplicable(
            f"the video's pooled features never take the shape [{videos}, {frames * area}, {channels}] "
            f"(videos, frames*tokens, channels); shapes seen: {shapes}",
            "Models that arrange video tokens in another way are not supported yet",
        )
    # With one frame both shapes are equal: the first such node is the frame's, the last one the video's.
    features = per_frame[0] if statically_known_true(frames == 1) else per_frame[-1]
    return features, per_video[-1]


def _separator_after(flat: Node) -> tuple[Node | None, Node]:
    """``cat((flat, separator [V, 1, C]), dim=1)``, the newline embedding, if the model has one."""
    (joined,) = [*readers(flat, "cat", "concat"), None][:1]
    if joined is None or len(readers(flat)) != 1:
        return None, flat
    parts = argument(joined, 0, "tensors")
    if argument(joined, 1, "dim", 0) not in (1, -2) or len(parts) != 2 or parts[0] is not flat:
        raise NotApplicable(
            f"video tokens are joined with other tokens in an unknown way ({joined.name})",
            "Only separators behind each video are supported",
        )
    shape = shape_of(parts[1])
    if shape is None or int(shape[1]) != 1:
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


def _placeholders(rows: Node | None) -> Placeholders | None:
    """The ``masked_scatter`` of ``rows`` where ``input_ids == token``."""
    if rows is None:
        return None
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
        f"video features flow into {op_name(node) or node.op} ({node.name}), which is not understood",
        "Only projector, 2-D pooling, newline and masked_scatter are known",
    )


def _is(shape: tuple[object, ...] | None, *sizes: object) -> bool:
    return (
        shape is not None
        and len(shape) == len(sizes)
        and all(statically_known_true(a == b) for a, b in zip(shape, sizes, strict=True))  # type: ignore[arg-type]
    )
