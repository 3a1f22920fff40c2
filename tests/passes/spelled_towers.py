"""Vision towers whose every part is spelled in the way a test asks for, and what their compression must compute.

    tower = Tower(linear="lora", qkv="fused, chunk", patches="conv3d", specials=1, scales=True)
    rows = tower(pixels [1, F, 3, 12, 12])          # [1, F * P, C], as one that compresses must leave K of
    expected_rows(tower, pixels, retain_ratio=0.2)  # [K, C]

The oracle runs the tower's own modules layer by layer and applies the functions of ``reference.py`` between them.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earlytom_compile.reference import plan_frame_merge, segment_frames, select_representatives, select_tokens

SIDE, PATCH = 12, 3  # 4 x 4 patches
WINDOWS = [1, 8, 2, 4]  # of 16: one of 8 places and two of 4


@dataclass
class Spelling:
    """How each part is written; the first of each list is the plain one."""

    linear: str = "linear"  # LINEARS
    qkv: str = "separate"  # "fused, chunk", "fused, split", "fused, unbind", "fused, slices", "grouped by head"
    attention: str = "sdpa"  # "matmul", "bmm", "einsum", or a function
    patches: str = "conv2d"  # "conv3d", "unfold", "F.unfold", "view"
    specials: int = 0  # class and register tokens
    scales: bool = False  # LayerScale
    qk_norm: bool = False
    rope: bool = False
    mixing: str = ""  # what must not be taken for a projection: MIXERS
    tokens: str = "all"  # "avg", "merger", "pixel shuffle", "mean", "resampler", "newline rows"
    joined: str = "videos"  # "rows", "flatten", "split into videos"
    beside: tuple[int, ...] = ()  # layers whose output goes on beside the encoder, as DeepStack's does
    order: bool = False  # whether tokens are put into another order behind the pooling, as windows need it


class LoRA(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.base = nn.Linear(inner, outer)
        self.down, self.up = nn.Linear(inner, 2, bias=False), nn.Linear(2, outer, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(F.dropout(self.down(x), 0.1, training=False)) * 0.7


class DoRA(LoRA):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.base.weight + self.up.weight @ self.down.weight
        return F.linear(x, weight * (1.3 / weight.norm(dim=1, keepdim=True)), self.base.bias)


class Flat(nn.Linear):
    """As Conv1D of GPT-2: all positions of all frames are rows of one matrix."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight.t()).view(*x.shape[:-1], -1)


class DynamicInt8(nn.Linear):
    """Activations are rounded with a scale of each token's own."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-5) / 127
        return F.linear((x / scale).round().clamp(-127, 127) * scale, self.weight, self.bias)


@torch.library.custom_op("spelled::packed_linear", mutates_args=())
def packed_linear(x: Tensor, packed: Tensor, scale: Tensor, width: int) -> Tensor:
    low, high = packed & 15, packed >> 4
    weight = (torch.stack((low, high), -1).flatten(1).float() - 8) * scale[:, None]
    assert weight.shape[1] == width
    return x @ weight.t().to(x.dtype)


@torch.library.custom_op("spelled::linear_by_mode", mutates_args=())
def linear_by_mode(x: Tensor, weight: Tensor, mode: str) -> Tensor:
    if mode == "frame before":
        x = x.roll(1, 0)
    return x @ weight.t()


@linear_by_mode.register_fake
def _(x: Tensor, weight: Tensor, mode: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("spelled::observed_linear", mutates_args=("seen",))
def observed_linear(x: Tensor, weight: Tensor, seen: Tensor) -> Tensor:
    seen.copy_(torch.maximum(seen, x.abs().max()))
    return x @ weight.t()


@observed_linear.register_fake
def _(x: Tensor, weight: Tensor, seen: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("spelled::clamped_linear", mutates_args=())
def clamped_linear(x: Tensor, weight: Tensor) -> Tensor:
    return (x / x.abs().max().clamp(max=2)) @ weight.t()


@clamped_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@packed_linear.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, width: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


@torch.library.custom_op("spelled::coarse_linear", mutates_args=())
def coarse_linear(x: Tensor, weight: Tensor) -> Tensor:
    scale = x.abs().max() / 127  # one for all tokens of all frames
    return ((x / scale).round() * scale) @ weight.t()


@coarse_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class Packed(nn.Module):
    """4-bit weights behind an operator of another library."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.register_buffer("packed", torch.randint(0, 256, (outer, inner // 2), dtype=torch.uint8))
        self.register_buffer("scale", 0.1 * torch.rand(outer) + 0.01)
        self.width = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.spelled.packed_linear(x, self.packed, self.scale, self.width)


class ByMode(nn.Linear):
    mode = "itself"

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.spelled.linear_by_mode(x, self.weight, self.mode)


class Observed(nn.Linear):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__(inner, outer)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.spelled.observed_linear(x, self.weight, self.seen)


class Clamped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.spelled.clamped_linear(x, self.weight)


class Coarse(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.spelled.coarse_linear(x, self.weight)


STRANGE_LINEARS = {"coarse": Coarse, "by mode": ByMode, "observed": Observed, "clamped": Clamped}
LINEARS = {
    "linear": nn.Linear,
    "lora": LoRA,
    "dora": DoRA,
    "addmm": Flat,
    "dynamic int8": DynamicInt8,
    "packed": Packed,
}
MIXERS = {
    "mean of tokens": lambda x: x - x.mean(1, keepdim=True),
    "mean of frames": lambda x: x - x.mean(0, keepdim=True),
    "softmax over tokens": lambda x: x + x.softmax(1),
    "running sum": lambda x: x + x.cumsum(1),
    "next frame": lambda x: x + x.roll(1, 0),
    "frames in another order": lambda x: x + x.flip(-1, 0),
    "previous token": lambda x: x + F.pad(x, (0, 0, 1, 0))[:, :-1],
    "scale of everything": lambda x: x / x.abs().amax(),
    "norm over tokens": lambda x: F.layer_norm(x, x.shape[1:]),
    "norm of groups": lambda x: F.group_norm(x.mT, 2).mT,
    "order of tokens": lambda x: x + x.sort(1).values,
    "conv over tokens": lambda x: x + F.avg_pool1d(x.mT, 3, 1, 1).mT,
}


class Layer(nn.Module):
    """One block; ``qkv`` and ``mlp`` are what the oracle looks at."""

    def __init__(self, width: int, heads: int, how: Spelling) -> None:
        super().__init__()
        linear = STRANGE_LINEARS.get(how.mixing) or LINEARS[how.linear]
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (linear(width, width) for _ in range(4))
        self.fused = linear(width, 3 * width)
        self.up, self.down = linear(width, 2 * width), linear(2 * width, width)
        self.of_query, self.of_key = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)
        self.gammas = nn.Parameter(0.5 + torch.rand(2, width))
        self.heads, self.how = heads, how

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value [T, H, S, d] of [T, S, D]."""
        frames, tokens, width = x.shape
        shape, how = (frames, tokens, self.heads, width // self.heads), self.how.qkv
        if how == "separate":
            return tuple(linear(x).view(shape).transpose(1, 2) for linear in (self.q, self.k, self.v))
        y = self.fused(x)
        if how == "fused, chunk":
            parts = y.chunk(3, dim=-1)
        elif how == "fused, split":
            parts = torch.split(y, width, dim=2)
        elif how == "fused, slices":
            parts = y[..., :width], y[..., width : 2 * width], y[..., 2 * width :]
        elif how == "fused, unbind":
            return y.reshape(frames, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            return y.view(frames, tokens, self.heads, 3, -1).transpose(1, 2).unbind(3)
        return tuple(part.view(shape).transpose(1, 2) for part in parts)

    def qkv(self, h: Tensor) -> tuple[Tensor, ...]:
        x = self.first(h)
        if self.how.mixing in MIXERS:
            x = MIXERS[self.how.mixing](x)
        q, k, v = self.split(x)
        if self.how.qk_norm:
            q, k = self.of_query(q), self.of_key(k)
        if self.how.rope:
            q, k = rotated(q), rotated(k)
        return q, k, v

    def forward(self, h: Tensor) -> Tensor:
        mixed = attend(self.how.attention, *self.qkv(h))
        h = h + self.scaled(self.out(mixed.transpose(1, 2).reshape(h.shape)), 0)
        return h + self.scaled(self.down(F.gelu(self.up(self.second(h)))), 1)

    def scaled(self, x: Tensor, which: int) -> Tensor:
        return x * self.gammas[which] if self.how.scales else x


def rotated(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[2])[:, None] * 0.3 ** torch.arange(half)
    cos, sin = (torch.cat((f(angle), f(angle)), -1) for f in (torch.cos, torch.sin))
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def attend(how, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scale = q.shape[-1] ** -0.5
    if callable(how):
        return how(q, k, v, scale)
    if how == "windows":
        return torch.ops.earlytom.window_attention(q, k, v, WINDOWS, scale)
    if how == "matmul":
        return (torch.matmul(q, k.transpose(2, 3)) * scale).softmax(-1) @ v
    if how == "bmm":
        rows = tuple(x.reshape(-1, *x.shape[2:]) for x in (q * scale, k, v))
        weights = torch.bmm(rows[0], rows[1].transpose(1, 2)).softmax(-1)
        return torch.bmm(weights, rows[2]).view(q.shape)
    return F.scaled_dot_product_attention(q, k, v)


class Tower(nn.Module):
    """Frames [V, F, 3, 12, 12] to rows of the language model."""

    def __init__(self, layers: int = 4, width: int = 16, heads: int = 2, **how) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = Spelling(**how)
        self.conv2d = nn.Conv2d(3, width, PATCH, PATCH)
        self.places = nn.Parameter(0.2 * torch.randn(16 + self.how.specials, width))
        self.special = nn.Parameter(torch.randn(1, self.how.specials, width))
        self.layers = nn.ModuleList(Layer(width, heads, self.how) for _ in range(layers))
        inner = 4 * width if self.how.tokens in ("merger", "pixel shuffle") else width
        self.project = nn.Sequential(nn.Linear(inner, 12), nn.GELU(), nn.Linear(12, 12))
        self.queries = nn.Parameter(torch.randn(1, 4, width))
        self.row_end = nn.Parameter(torch.randn(12))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        self.eval()

    def embed(self, frames: Tensor) -> Tensor:
        """[T, 3, 12, 12] -> [T, S, D]."""
        return self._with_specials(self._patches(frames))

    def _patches(self, frames: Tensor) -> Tensor:
        how, weight, bias = self.how.patches, self.conv2d.weight, self.conv2d.bias
        if how == "conv2d":
            return self.conv2d(frames).flatten(2).transpose(1, 2)
        if how == "conv3d":
            h = F.conv3d(frames.unsqueeze(0).transpose(1, 2), weight.unsqueeze(2), bias, (1, PATCH, PATCH))
            return h.squeeze(0).permute(1, 2, 3, 0).flatten(1, 2)
        if how == "F.unfold":
            return F.linear(F.unfold(frames, PATCH, stride=PATCH).transpose(1, 2), weight.flatten(1), bias)
        if how == "unfold":
            windows = frames.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # [T, 3, 4, 4, p, p]
            return F.linear(windows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2), weight.flatten(1), bias)
        side = SIDE // PATCH
        cut = frames.view(-1, 3, side, PATCH, side, PATCH).permute(0, 2, 4, 1, 3, 5)
        return F.linear(cut.reshape(cut.shape[0], side * side, -1), weight.flatten(1), bias)

    def _with_specials(self, h: Tensor) -> Tensor:
        if self.how.specials:
            h = torch.cat((self.special.expand(h.shape[0], -1, -1), h), dim=1)
        return h + self.places

    def finish(self, h: Tensor) -> Tensor:
        """[N, S, D] -> [N, P, C]."""
        h, how = h[:, self.how.specials :], self.how.tokens
        if how == "merger":  # a 2 x 2 merger
            h = h.view(-1, 2, 2, 2, 2, h.shape[-1]).transpose(2, 3).reshape(h.shape[0], 4, -1)
        elif how == "pixel shuffle":
            h = h.reshape(h.shape[0], 4, 2, 2 * h.shape[-1]).transpose(1, 2)
            h = h.reshape(h.shape[0], 2, 2, 2 * h.shape[-1]).transpose(1, 2).flatten(1, 2)
        elif how == "mean":
            h = h.unflatten(1, (2, 2, 2, 2)).mean((2, 4)).flatten(1, 2)
        elif how == "resampler":
            h = F.scaled_dot_product_attention(self.queries.expand(h.shape[0], -1, -1), h, h)
        h = self.project(h)
        if how == "avg":
            h = F.avg_pool2d(h.mT.unflatten(2, (4, 4)), 2).flatten(2).mT
        if how == "newline rows":
            grid = h.unflatten(1, (4, 4))
            h = torch.cat((grid, self.row_end.expand(*grid.shape[:2], 1, -1)), 2).flatten(1, 2)
        return h

    def rows(self, outputs: list[Tensor]) -> Tensor:
        """What the layers made, [N, S, D] each -> [N, P, C]; channels of several layers side by side."""
        tokens = [self.finish(outputs[layer]) for layer in (-1, *self.how.beside)]
        if self.how.order:
            tokens = [each[:, torch.arange(each.shape[1]).flip(0)] for each in tokens]
        return torch.cat(tokens, dim=-1) if len(tokens) > 1 else tokens[0]

    def forward(self, pixels: Tensor) -> Tensor:
        h, outputs = self.embed(pixels.flatten(0, 1)), []
        for layer in self.layers:
            h = layer(h)
            outputs.append(h)
        h, videos = self.rows(outputs), pixels.shape[0]
        if self.how.joined == "rows":
            return h.reshape(-1, h.shape[-1])
        if self.how.joined == "flatten":
            return h.flatten(0, 1).unsqueeze(0).contiguous()
        if self.how.joined == "split into videos":
            return torch.cat([video.flatten(0, 1) for video in torch.split(h, pixels.shape[1], dim=0)])
        return h.view(videos, -1, h.shape[1], h.shape[2]).flatten(1, 2)


def video(frames: int, videos: int = 1, seed: int = 0) -> Tensor:
    """[V, F, 3, 12, 12] in which neighbours are alike."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(videos, 1, 3, SIDE, SIDE, generator=generator)
    return base + 0.3 * torch.randn(videos, frames, 3, SIDE, SIDE, generator=generator)


@torch.no_grad()
def expected_rows(tower: Tower, pixels: Tensor, *, retain_ratio: float, variant: str = "paper", merge_layers=(0, 2)):
    """([K, C], frames left) of each video."""
    plus, rules = variant == "plus", "released" if variant == "released" else "paper"
    found = []
    for frames in pixels:
        h, outputs = tower.embed(frames), []
        floor = math.ceil(retain_ratio * len(frames)) if rules == "paper" else 1
        for index, layer in enumerate(tower.layers):
            if index == merge_layers[-1]:
                q, k, _ = layer.qkv(h)
                scores = q.float() @ k.float().mT / math.sqrt(q.shape[-1])
                if tower.how.attention == "windows":
                    window = torch.tensor([0] * 8 + [1] * 4 + [2] * 4)
                    scores = scores.masked_fill(window[:, None] != window, -math.inf)
                importance = scores.softmax(-1).mean((1, 2))
            h = layer(h)
            if index in merge_layers:
                plan = plan_frame_merge(h, variant=rules, tau_seg=0.0, min_frames=floor)
                h, outputs = plan.apply(h), [plan.apply(before) for before in outputs]
                if index == merge_layers[-1]:
                    importance = plan.apply(importance)
                    segments = segment_frames(h, variant=rules, tau_seg=0.0)
            outputs.append(h)
        features = tower.rows(outputs)
        if plus:
            kept = select_representatives(features[..., :12], frames_in=len(frames), retain_ratio=retain_ratio)
        else:
            scores = importance[:, tower.how.specials :]
            if tower.how.tokens != "all":
                scores = F.avg_pool2d(scores.view(-1, 1, 4, 4), 2).flatten(1)
            scores = scores.flip(1) if tower.how.order else scores
            kept = select_tokens(scores, segments, frames_in=len(frames), retain_ratio=retain_ratio, variant=variant)
        found.append((features[kept[:, 0], kept[:, 1]], len(h)))
    return found
