"""A small video model of our own, with every name and every detail different from transformers'.

Passes that find things by structure must find them here too; each switch breaks one condition of one pass.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from earlytom_compile import EarlyTomConfig
from earlytom_compile.passes.manager import Rewrite, run_passes

VIDEO = 9


@dataclass
class Switches:
    """What is unusual about the model."""

    attention: str = "sdpa"  # "matmul", "causal", "weights returned", "dropout", "grouped"
    post_norm: bool = False
    gated_mlp: bool = False
    pool: str = "avg"  # "bilinear", "none"
    newline: bool = False
    tail: str = "scatter"  # "features", "mean"
    masked: bool = True
    beside: str = "nothing"  # "returned", "used": a norm of the last layer, by the caller or by the language model
    after: int = 0  # layers behind the one whose output the language model gets


class Layer(nn.Module):
    """``h + out(attention(norm(h)))``, then ``h + mlp(norm(h))``."""

    def __init__(self, width: int, heads: int, switches: Switches, causal: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down, self.gate = (
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
            nn.Linear(width, 2 * width),
        )
        self.heads, self.switches, self.causal = heads, switches, causal

    def attend(self, x: Tensor) -> Tensor:
        shape = (x.shape[0], x.shape[1], self.heads, -1)
        q, k, v = (linear(x).view(shape).transpose(1, 2) for linear in (self.q, self.k, self.v))
        kind = self.switches.attention
        if self.causal or kind in ("sdpa", "causal"):
            result = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal or kind == "causal")
        elif kind == "grouped":
            k, v = k[:, : self.heads // 2], v[:, : self.heads // 2]
            result = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            weights = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
            weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
            weights = F.dropout(weights, p=0.5 if kind == "dropout" else 0.0, training=kind == "dropout")
            if kind == "weights returned":
                self.seen = weights
            result = torch.matmul(weights, v)
        return self.out(result.transpose(1, 2).flatten(2))

    def mlp(self, x: Tensor) -> Tensor:
        if self.switches.gated_mlp:
            return self.down(F.silu(self.gate(x)) * self.up(x))
        return self.down(F.gelu(self.up(x)))

    def forward(self, h: Tensor) -> Tensor:
        if self.switches.post_norm:
            h = self.first(h + self.attend(h))
            return self.second(h + self.mlp(h))
        h = h + self.attend(self.first(h))
        return h + self.mlp(self.second(h))


class VideoModel(nn.Module):
    """Frames [V, F, 3, 8, 8] and ids [R, S] to logits [R, S, 10]."""

    def __init__(self, layers: int = 4, width: int = 16, heads: int = 2, **switches) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.switches = Switches(**switches)
        self.patches = nn.Conv2d(3, width, 2, 2)
        self.places = nn.Parameter(0.1 * torch.randn(16, width))
        self.layers = nn.ModuleList(Layer(width, heads, self.switches) for _ in range(layers))
        self.project = nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, 12))
        self.break_line = nn.Parameter(torch.randn(12))
        self.words = nn.Embedding(10, 12)
        self.reader = Layer(12, 3, Switches(), causal=True)
        self.head = nn.Linear(12, 10)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def encode(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        videos, count = frames.shape[:2]
        h = self.patches(frames.flatten(0, 1)).flatten(2).transpose(1, 2) + self.places
        for index, layer in enumerate(self.layers, 1):
            h = layer(h)
            if index == len(self.layers) - self.switches.after:
                taken = h
        last = F.layer_norm(h, h.shape[-1:])
        h = self.project(taken)
        if self.switches.pool != "none":
            h = h.view(videos * count, 4, 4, -1).permute(0, 3, 1, 2)
            bilinear = self.switches.pool == "bilinear"
            h = F.interpolate(h, size=[2, 2], mode="bilinear") if bilinear else F.avg_pool2d(h, 2)
            h = h.flatten(2).transpose(1, 2)
        h = h.reshape(videos, -1, h.shape[-1])
        if self.switches.newline:
            h = torch.cat((h, self.break_line[None, None].repeat(videos, 1, 1)), dim=1)
        return h, last

    def forward(self, ids: Tensor, frames: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        rows, last = self.encode(frames)
        if self.switches.tail == "features":
            return rows
        if self.switches.tail == "mean":
            return rows.mean(1)
        embeds = self.words(ids).masked_scatter((ids == VIDEO).unsqueeze(-1), rows.flatten(0, 1))
        if self.switches.beside == "used":
            embeds = embeds + last.mean()
        logits = self.head(self.reader(embeds))
        return (logits, last) if self.switches.beside == "returned" else logits

    def example(
        self, frames: int = 8, videos: int = 1, rows: int | None = None, seed: int = 0, after: int = 2
    ) -> tuple[Tensor, Tensor]:
        """(ids, frames) with the right placeholders, and ``after`` tokens behind them."""
        generator = torch.Generator().manual_seed(seed)
        rows = rows or videos
        base = torch.randn(videos, 1, 3, 8, 8, generator=generator)
        pixels = base + 0.4 * torch.randn(videos, frames, 3, 8, 8, generator=generator)
        per_frame = 16 if self.switches.pool == "none" else 4
        run = [VIDEO] * (frames * per_frame + self.switches.newline)
        ids = torch.tensor([[1, 2, *(run + [3]) * (videos // rows), *[4] * (after - 1), 5]] * rows)
        return ids, pixels


def capture(model: nn.Module, *inputs: Tensor, dynamic: bool | None = None) -> GraphModule:
    """The Dynamo graph of one call."""
    graphs = []

    def backend(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)(*inputs)
    (graph_module,) = graphs
    graph_module.graph.eliminate_dead_code()
    return graph_module


def rewrite(model: nn.Module, example: tuple[Tensor, ...], compile=None, **options) -> Rewrite:
    """The state after all passes, run inside a compilation as they always are; ``compile(backend)`` is the model's."""
    states = []

    def backend(graph_module, example_inputs):
        config = EarlyTomConfig.from_options(
            {"variant": "paper", "merge_layers": (0, 2), "reuse": False, "tau_seg": 0.0, **options}
        )
        state = Rewrite(graph_module, config, features_only=model.switches.tail == "features")
        states.append(run_passes(state))
        return graph_module.forward

    if compile is None:
        torch._dynamo.reset()
        compile = partial(torch.compile, model, fullgraph=True)  # noqa: A001
    with torch.no_grad():
        compile(backend=backend)(*example)
    return states[0]


def count(graph_module: GraphModule, name: str) -> int:
    """How many calls of an op are in the graph."""
    return sum(name in str(getattr(node.target, "__name__", node.target)) for node in graph_module.graph.nodes)
