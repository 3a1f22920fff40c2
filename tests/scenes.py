"""Videos as tensors, with scenes that a model can tell apart, and weights that let it: no transformers needed.

pixels = video(12, 24, scenes=3, generator=torch.Generator().manual_seed(0))      # [12, 3, 24, 24]
spread(model)                                                                     # random weights that matter
"""

import torch
from torch import Tensor, nn


def video(
    frames: int,
    image_size: int | tuple[int, int],
    *,
    scenes: int | None = None,
    drift: float = 0.25,
    static: bool = False,
    generator: torch.Generator,
) -> Tensor:
    """``[F, 3, H, W]``: scenes of nearly equal length, each a picture that drifts a bit every frame.
    ``image_size``: the side of a square, or (H, W).

    ``scenes=None``: one for every 8 frames. ``static``: one scene without drift, frames equal bit for bit.
    """

    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size

    def picture() -> Tensor:
        return torch.randn(3, height, width, generator=generator)

    scenes = 1 if static else max(1, frames // 8) if scenes is None else min(scenes, frames)
    result = []
    for scene in range(scenes):
        current = picture()
        for _ in range(frames // scenes + (scene < frames % scenes)):
            result.append(current)
            # The speed changes from frame to frame, so that neighbouring similarities go up and down.
            speed = 0.0 if static else drift * (0.2 + torch.rand((), generator=generator).item())
            current = ((1 - speed**2) ** 0.5) * current + speed * picture() if speed else current
    return torch.stack(result)


def standing_camera(frames: int, image_size: int, *, patch: int, changing: float, generator: torch.Generator) -> Tensor:
    """``[F, 3, H, W]``: from each frame to the next, the share ``changing`` of all patches, drawn anew each time, gets
    other pixels; the others stay bit for bit."""
    side = image_size // patch
    grid = torch.zeros(side, side, dtype=torch.bool)
    current = torch.randn(3, image_size, image_size, generator=generator)
    result = [current]
    for _ in range(frames - 1):
        chosen = torch.randperm(grid.numel(), generator=generator)[: round(changing * grid.numel())]
        moved = grid.flatten().index_fill(0, chosen, True).view_as(grid)
        moved = moved.repeat_interleave(patch, 0).repeat_interleave(patch, 1)
        current = current.clone()
        current[:, : len(moved), : len(moved)][:, moved] = torch.randn(3, int(moved.sum()), generator=generator)
        result.append(current)
    return torch.stack(result)


@torch.no_grad()
def spread(model) -> None:
    """Variance-preserving weights, small biases, and positions that weigh little beside what is in them.

    With transformers' own tiny initialisation every video gives nearly the same logits.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.add_(0.02 * torch.randn_like(parameter))
        elif "position_embedding" in name:
            nn.init.normal_(parameter, std=0.2)
        elif "embed_tokens" in name:
            nn.init.normal_(parameter, std=1.0)
        else:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    if getattr(model.model, "image_newline", None) is not None:
        nn.init.normal_(model.model.image_newline, std=1.0)
    model.lm_head.weight.mul_(3.0)
