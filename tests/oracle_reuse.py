"""What a vision encoder that reuses unchanged patches must compute, with the tower's own layers, in eager PyTorch.

Hooks let each layer see what its places' sources are and give its updates to those that did not change, by the
functions of ``reference.py``; one video at a time, nothing packed, nothing saved.

    encoder = ReusingEncoder(layers, pixels, patch=14, tau_reuse=0.06, full_layers=(20,), importance_layer=23)
    with encoder.hooked():
        hidden = tower(pixels).last_hidden_state
    encoder.plan.computed, encoder.outputs[3], encoder.importance
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from earlytom_compile.config import EarlyTomConfig
from earlytom_compile.reference import (
    ReusePlan,
    importance_with_reuse,
    plan_reuse,
    read_sources,
    reuse_budget,
    segment_frames,
    share_updates,
)


class ReusingEncoder:
    """Forward hooks that make the layers of a vision encoder reuse, and note what selection needs.

    plan: of the video, once its frames have come to the first layer. outputs: of each layer, ``[F, S, D]``. importance:
    float32 ``[F, S]``, the attention that tokens receive in ``importance_layer``; keys: float32 ``[F, S, d]``, of that
    layer, mean over heads; segments: int64 ``[n, 2]`` of the features behind it.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        pixels: Tensor,
        patch: int | tuple[int, int],
        *,
        tau_reuse: float,
        full_layers: Collection[int] | None = None,
        encode_ratio: float | None = None,
        importance_layer: int | None = None,
        received: Callable[[nn.Module, Tensor], Tensor] | None = None,
        segmentation: dict | None = None,
    ):
        """``pixels [F, C, H, W]`` as the tower gets them; places in front of those of the grid are taken for prefixes.
        ``full_layers``: left out, those of the options.

        ``received(layer, its input [F, S, D])`` -> float32 [F, S], the attention that tokens receive, mean over heads
        and queries; left out where the layer's ``self_attn`` or ``attention`` has ``q_proj``, ``k_proj`` and
        ``head_dim``. ``segmentation``: options of ``segment_frames``, where segments are wanted."""
        if full_layers is None:
            full_layers = EarlyTomConfig(reuse=True).resolve_full_layers(len(layers))
        self.layers, self.pixels, self.full_layers = layers, pixels, frozenset(full_layers)
        assert self.full_layers <= set(range(len(layers))), f"{sorted(self.full_layers)} of {len(layers)} layers"
        self.patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
        self.tau_reuse, self.encode_ratio = tau_reuse, encode_ratio
        self.importance_layer, self.received, self.segmentation = importance_layer, received, segmentation
        self.frames_after: list[int] = []  # no frames merge
        self.plan: ReusePlan | None = None
        self.outputs: dict[int, Tensor] = {}
        self.importance: Tensor | None = None
        self.segments: Tensor | None = None
        self._inputs: dict[int, Tensor] = {}
        self._projected: dict[str, Tensor] = {}

    @property
    def output(self) -> Tensor:
        return self.outputs[len(self.layers) - 1]

    @property
    def keys(self) -> Tensor:
        width = attention_of(self.layers[self.importance_layer]).head_dim
        heads = self._projected["k_proj"].float().unflatten(-1, (-1, width))  # each place has its source's already
        return sum(heads.unbind(-2)) / heads.shape[-2]

    def hooked(self) -> ExitStack:
        stack = ExitStack()

        def on(register: Callable, hook: Callable, **how) -> None:
            stack.callback(register(hook, **how).remove)

        def sees(index: int) -> Callable:
            return lambda module, args, kwargs: self._sees(index, args, kwargs)

        def leaves(index: int) -> Callable:
            return lambda module, args, output: self._leaves(index, output)

        def notes(name: str) -> Callable:
            return lambda module, args, output: self._projected.update({name: output.detach()})

        for index, layer in enumerate(self.layers):
            on(layer.register_forward_pre_hook, sees(index), with_kwargs=True)
            on(layer.register_forward_hook, leaves(index))
        if self.importance_layer is not None and self.received is None:
            attention = attention_of(self.layers[self.importance_layer])
            for name in ("q_proj", "k_proj"):
                on(getattr(attention, name).register_forward_hook, notes(name))
        return stack

    def _sees(self, index: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden = args[0] if args else kwargs["hidden_states"]
        if index == 0:
            self._make_plan(hidden)
        self._inputs[index] = hidden
        seen = self._seen(index)
        return ((seen, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": seen})

    def _make_plan(self, hidden: Tensor) -> None:
        grid = [side // patch for side, patch in zip(self.pixels.shape[-2:], self.patch, strict=True)]
        frames, places = hidden.shape[:2]
        prefix = places - grid[0] * grid[1]
        assert frames == len(self.pixels), f"{frames} frames in the encoder, {len(self.pixels)} of pixels"
        ratio = self.encode_ratio
        self.plan = plan_reuse(
            self.pixels,
            grid,
            self.patch,
            prefix=prefix,
            tau_reuse=self.tau_reuse,
            budget=None if ratio is None else reuse_budget(frames, places, ratio, prefix),
        )

    def _seen(self, index: int) -> Tensor:
        hidden = self._inputs[index]
        return hidden if index in self.full_layers else read_sources(hidden, self.plan.source)

    def _leaves(self, index: int, output):
        hidden = tensor_of(output)
        if index not in self.full_layers:
            hidden = share_updates(self._inputs[index], hidden, self.plan.source)
        if index == self.importance_layer:
            self.importance = self._received(index)
            if self.segmentation is not None:
                self.segments = segment_frames(hidden, **self.segmentation)
        self.outputs[index] = hidden
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _received(self, index: int) -> Tensor:
        layer, seen = self.layers[index], self._seen(index)
        if self.received is not None:
            return self.received(layer, seen)
        attention = attention_of(layer)
        width = attention.head_dim
        query, key = (self._projected[name].unflatten(-1, (-1, width)) for name in ("q_proj", "k_proj"))
        # Projected was what the layer sees, in which every place has its source's state already.
        own = torch.arange(len(seen))[:, None].expand(seen.shape[:2])
        return importance_with_reuse(query, key, own, scale=width**-0.5)


def attention_of(layer: nn.Module) -> nn.Module:
    return layer.attention if hasattr(layer, "attention") else layer.self_attn  # DINOv2 and ViT; SigLIP and CLIP


def tensor_of(output) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
