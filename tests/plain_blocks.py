"""An encoder of a few blocks in plain tensors, in float64, for tests of what goes on between its operators.

layers, hidden = encoder(3, places=5), states(4, 5)
hidden = layers[0](hidden)                                  # the block itself, [F, S, D]
query, key, value = layers[0].project(x, places)            # or in parts, for rows that lie anywhere
x = layers[0].finish(x, attended)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

HEADS, WIDTH = 2, 3
CHANNELS = HEADS * WIDTH


@dataclass(frozen=True)
class Block:
    """Pre-norm: norm, attention, add, norm, MLP, add; each place turns its queries and keys in its own way.

    ``project`` and ``finish`` treat every row by itself: ``x [..., D]``, ``places [...]`` -> ``[..., H, d]``.
    """

    weights: dict[str, Tensor]
    positions: Tensor  # [S, D]

    def __call__(self, x: Tensor) -> Tensor:
        query, key, value = (part.transpose(1, 2) for part in self.project(x, torch.arange(x.shape[1])))
        scores = query @ key.transpose(-1, -2) * self.scale
        return self.finish(x, (scores.softmax(-1) @ value).transpose(1, 2))

    @property
    def scale(self) -> float:
        return WIDTH**-0.5

    def project(self, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normed = torch.nn.functional.layer_norm(x, (CHANNELS,))
        turned = normed * self.positions[places]
        projected = (turned @ self.weights["query"], turned @ self.weights["key"], normed @ self.weights["value"])
        query, key, value = (part.unflatten(-1, (HEADS, WIDTH)) for part in projected)
        return query, key, value

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + attended.flatten(-2) @ self.weights["out"]
        return x + torch.tanh(torch.nn.functional.layer_norm(x, (CHANNELS,)) @ self.weights["mlp"])


def encoder(layers: int, places: int, seed: int = 0) -> list[Block]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    names = ("query", "key", "value", "out", "mlp")
    return [
        Block({name: draw(CHANNELS, CHANNELS) / CHANNELS**0.5 for name in names}, 1 + 0.5 * draw(places, CHANNELS))
        for _ in range(layers)
    ]


def states(frames: int, places: int, seed: int = 1) -> Tensor:
    """``[F, S, D]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(frames, places, CHANNELS, generator=generator, dtype=torch.float64)
