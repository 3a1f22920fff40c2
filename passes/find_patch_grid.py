"""Which pixels each place of an encoder is made of: [F, 3, 384, 384] -> 27 x 27 patches of 14 x 14 -> [F, 729, D].

A place whose pixels did not change is not computed again (insert_patch_reuse.py), so this must be known and not
guessed. Some places are made of no pixels: class and register tokens, in front of the patches. What a convolution or
the sizes suggest is tried out with the model's own weights: each patch has a number, and one picture for each binary
digit of it is changed in the patches that have this digit. Place s is made of patch s and nothing else if it changes
in exactly these pictures, and in the others where the patches without the digit change. Frames of equal pixels must
have equal places too, since layers in full leave out frames that repeat: no embedding of the frame's number.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from earlytom_compile.passes.axes import op_name
from earlytom_compile.passes.find_video_boundary import VideoPath
from earlytom_compile.passes.find_vision_encoder import GraphView
from earlytom_compile.passes.patterns import CASTS, MOVES, argument, peel, shape_of
from earlytom_compile.passes.probe import Probe, Unknown
from earlytom_compile.passes.reasons import NotReusable
from earlytom_compile.passes.token_map import rearranges

_MOST_PREFIX_TOKENS = 16


@dataclass(frozen=True)
class PatchGrid:
    """Places [S] of an encoder: ``prefix`` of no pixels, then patches of ``patch`` pixels in raster order."""

    grid: tuple[int, int]
    patch: tuple[int, int]
    prefix: int


def find_patch_grid(view: GraphView, path: VideoPath, probe: Probe) -> PatchGrid:
    """The grid of the path's encoder; :class:`NotReusable` if its places are made of pixels in another way."""
    first = path.encoder.blocks[0].input
    for found, certain in _candidates(view, path, first):
        works = _try_out(found, path.pixels, first, probe)
        if works or (works is None and certain):
            return found
    shape = "x".join(map(str, shape_of(path.pixels) or ()))
    raise NotReusable(
        f"the {shape_of(first)[1]} places of the vision encoder {path.encoder.name} are not made "  # type: ignore[index]
        f"of one patch of the pixels {shape} each and of nothing else, in raster order, so that it is unknown which of "
        "them did not change",
    )


def _candidates(view: GraphView, path: VideoPath, first: Node) -> Iterator[tuple[PatchGrid, bool]]:
    """What it may be, and whether that is certain where it cannot be tried: a convolution says it."""
    places = int(shape_of(first)[1])  # type: ignore[index]
    height, width = (int(size) for size in shape_of(path.pixels)[-2:])  # type: ignore[index]
    for node in view.flow.between(path.pixels, first):
        grid = tuple(int(size) for size in (shape_of(node) or ())[-2:])
        patch = _kernel(node) if op_name(node) == "conv2d" else None
        if patch is not None and len(grid) == 2 and grid[0] * grid[1] <= places:
            found = PatchGrid(grid, patch, places - grid[0] * grid[1])  # type: ignore[arg-type]
            yield found, found.prefix == 0 and _says_it(view, path.pixels, node, first)
    for prefix in range(min(_MOST_PREFIX_TOKENS + 1, places)):
        for rows in range(1, places - prefix + 1):
            columns, rest = divmod(places - prefix, rows)
            patch = height // rows, width // columns if columns else 0
            if rest == 0 and patch[0] == patch[1] > 0:
                yield PatchGrid((rows, columns), patch, prefix), False


def _says_it(view: GraphView, pixels: Node, convolution: Node, first: Node) -> bool:
    """Whether the operators alone show that the places are what a convolution makes of the pixels, in its order."""
    if peel(argument(convolution, 0, "input"), MOVES | CASTS) is not pixels:
        return False
    behind = view.flow.between(convolution, first)
    return not any(map(rearranges, behind)) and view.first_mixing(convolution, (0, 2, 3), first) is None


def _kernel(node: Node) -> tuple[int, int] | None:
    """Height and width of the patches of a convolution that takes each pixel once."""
    weight = shape_of(argument(node, 1, "weight"))
    stride, padding = argument(node, 3, "stride", 1), argument(node, 4, "padding", 0)
    if weight is None or argument(node, 5, "dilation", 1) not in (1, (1, 1), [1, 1]):
        return None
    kernel = int(weight[-2]), int(weight[-1])
    if padding not in (0, (0, 0), [0, 0], "valid") or _pair(stride) != kernel:
        return None
    return kernel


def _pair(value: object) -> tuple[object, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def _try_out(found: PatchGrid, pixels: Node, first: Node, probe: Probe) -> bool | None:
    """Whether the places change with their own patches alone; None where the weights are not there."""
    try:
        x = probe.random(pixels)
        frames = x.flatten(0, -4)
        before = probe.run(pixels, first, x)
        alike = probe.run(pixels, first, frames[:1].expand_as(frames).contiguous().view_as(x))
        if bool(_moved(alike[:1], alike).any()):
            return False
        for masks in _masks(found, len(frames)):
            masks = masks.to(x.device)
            changed = torch.where(_pixels_of(masks, found, frames), probe.random(pixels).view_as(frames), frames)
            after = probe.run(pixels, first, changed.view_as(x))
            if not _changes_where(before, after, masks, found.prefix):
                return False
        return True
    except Unknown:
        return None


def _masks(found: PatchGrid, frames: int) -> Iterator[Tensor]:
    """Bool [frames, patches], which patches change in each frame: those with a binary digit, and those without."""
    numbers = torch.arange(1, found.grid[0] * found.grid[1] + 1)
    digits = [(numbers >> bit & 1).bool() for bit in range(int(numbers[-1]).bit_length())]
    every = torch.stack([*digits, *(~digit for digit in digits)])
    for masks in every.split(frames):
        yield torch.cat([masks, masks[:1].expand(frames - len(masks), -1)])


def _pixels_of(masks: Tensor, found: PatchGrid, frames: Tensor) -> Tensor:
    """The same by pixel, bool [frames, 1, H, W]; pixels that belong to no patch change always."""
    (rows, columns), (height, width) = found.grid, found.patch
    inside = masks.view(-1, rows, columns).repeat_interleave(height, 1).repeat_interleave(width, 2)
    margins = frames.shape[-1] - inside.shape[2], frames.shape[-2] - inside.shape[1]
    return torch.nn.functional.pad(inside, (0, margins[0], 0, margins[1]), value=True)[:, None]


def _changes_where(before: Tensor, after: Tensor, masks: Tensor, prefix: int) -> bool:
    moved = _moved(before, after)
    return not bool(moved[:, :prefix].any()) and torch.equal(moved[:, prefix:], masks)


def _moved(before: Tensor, after: Tensor) -> Tensor:
    """Bool [frames, places], which differ by more than rounding."""
    return (before.float() - after.float()).abs().amax(-1) > 1e-4 * before.float().abs().amax().clamp_min(1e-6)
