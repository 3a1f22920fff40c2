"""Decoding behind a prompt whose video tokens are fewer in later layers of the language model (inner_steps.py).

    keep_in_mind(cache, plan, steps, kept)      # what the cache of such a prompt holds, on the cache itself
    ShorterLayer(layer, index)                  # in each step, gives the layer the mask that fits its own keys
    refuse_other_cache(cache, steps)            # where a cache cannot be gone on with

Layers before the first step hold the whole prompt, later ones what is left of it. New tokens have the positions behind
the whole prompt, which the first layer counts.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EarlyTomConfigError
from ..methods.base import Step
from .inner_steps import InnerPrompt

_STATE = "_earlytom_inner"


@dataclass
class _Shorter:
    """What a cache holds of a prompt [R, S] whose video tokens are fewer in later layers."""

    length: int
    """S."""
    layers: tuple[int, ...]
    """Before which layers tokens went."""
    kept: tuple[Tensor, ...]
    """int64 [R, S'], positions of the prompt that are left from each on; -1: padding."""
    padded: bool

    def of_layer(self, index: int) -> Tensor:
        """Those that layer ``index`` has."""
        steps = zip(reversed(self.layers), reversed(self.kept), strict=True)
        return next(kept for layer, kept in steps if index >= layer)

    def mask(self, index: int, mask: Tensor | None, keys: int) -> Tensor | None:
        """That of a decoding step for layer ``index``, whose attention sees ``keys``; ``mask`` [..., S + t] is what the
        first layers get."""
        kept = self.of_layer(index)
        left = kept.shape[1]
        if mask is None:
            seen = torch.nn.functional.pad(kept >= 0, (0, keys - left), value=True)
            return seen[:, None, None, :] if self.padded else None
        mask = mask.expand(len(kept), *mask.shape[1:])
        hidden: Any = torch.finfo(mask.dtype).min if mask.is_floating_point() else False
        along = (len(kept), *(1,) * (mask.dim() - 2), left)
        index_of = kept.clamp_min(0).view(along).expand(*mask.shape[:-1], left)
        prompt = mask.gather(-1, index_of).masked_fill(kept.view(along) < 0, hidden)
        return torch.cat((prompt, mask[..., self.length :]), -1)


def keep_in_mind(cache: Any, plan: InnerPrompt, steps: Sequence[Step], kept: Sequence[Tensor]) -> None:
    """Let decoding know that the prompt in ``cache`` is shorter in later layers."""
    if cache is not None:
        layers = tuple(step.layer for step in steps)
        setattr(cache, _STATE, _Shorter(plan.length, layers, tuple(kept), plan.padded))
        _let_rows_follow(type(cache))


def _let_rows_follow(kind: type) -> None:
    """Whoever selects or repeats rows of a cache, does so with what is kept in mind of them; once for a class."""
    for name in ("reorder_cache", "batch_select_indices", "batch_repeat_interleave"):
        owner = next((each for each in kind.__mro__ if name in vars(each)), None)
        if owner is not None and not hasattr(vars(owner)[name], "earlytom_original"):
            setattr(owner, name, _with_rows_of_kept(vars(owner)[name], name == "batch_repeat_interleave"))


def _with_rows_of_kept(original: Callable[..., Any], repeats: bool) -> Callable[..., Any]:
    @functools.wraps(original)
    def change_rows(self: Any, *args: Any, **kwargs: Any) -> Any:
        returned, state = original(self, *args, **kwargs), getattr(self, _STATE, None)
        if state is not None:
            (rows,) = (*args, *kwargs.values())
            rows = rows.to(state.kept[0].device) if isinstance(rows, Tensor) else rows
            kept = [each.repeat_interleave(rows, 0) if repeats else each[rows] for each in state.kept]
            setattr(self, _STATE, replace(state, kept=tuple(kept)))
        return returned

    change_rows.earlytom_original = original  # type: ignore[attr-defined]
    return change_rows


def refuse_other_cache(cache: Any, steps: Sequence[Step]) -> None:
    """Raise where a cache holds a prompt in which tokens went elsewhere, or no longer the whole of it."""
    forget_if_empty(cache)
    state: _Shorter | None = getattr(cache, _STATE, None)
    if state is None:
        return
    held, layers = int(cache.get_seq_length()), tuple(step.layer for step in steps)
    if layers != state.layers:
        now = f"they go before layer {', '.join(map(str, layers))}" if layers else "none go there"
        raise EarlyTomConfigError(
            f"the cache holds a prompt whose video tokens went before layer {', '.join(map(str, state.layers))} of the "
            f"language model, and now {now}. Go on with the options that it was made with, or start without a cache."
        )
    if held < state.length:
        raise EarlyTomConfigError(
            f"the cache was cropped to {held} of the {state.length} positions of its prompt, of which later layers of "
            "the language model hold others. Crop what comes behind the prompt only, or start without a cache."
        )


def grows(cache: Any) -> bool:
    """Whether every layer of a cache holds as many keys as were written to it; a static one has room for more."""
    parts = getattr(cache, "layers", None) or (cache,)
    return all(getattr(part, "max_cache_len", None) is None for part in parts)


def forget_if_empty(cache: Any) -> None:
    """A cache that begins anew knows of no prompt."""
    if _STATE in getattr(cache, "__dict__", {}) and int(cache.get_seq_length()) == 0:
        delattr(cache, _STATE)


class ShorterLayer:
    """Stands in for the ``forward`` of a decoder layer before which tokens may have gone."""

    def __init__(self, layer: nn.Module, index: int) -> None:
        self.layer = layer
        self._index = index
        self._before = layer.__dict__.get("forward")
        self._own = layer.forward
        layer.__dict__["forward"] = self

    def remove(self) -> None:
        """Put the layer's own ``forward`` back, unless somebody has replaced ours since."""
        if self.layer.__dict__.get("forward") is self:
            del self.layer.__dict__["forward"]
            if self._before is not None:
                self.layer.__dict__["forward"] = self._before

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache: Any = next((kwargs[name] for name in _CACHES if kwargs.get(name) is not None), None)
        state: _Shorter | None = getattr(cache, _STATE, None)
        if state is not None:
            keys = cache.get_seq_length(self._index) + hidden_states.shape[1]
            kwargs["attention_mask"] = state.mask(self._index, kwargs.get("attention_mask"), keys)
        return self._own(hidden_states, *args, **kwargs)


_CACHES = ("cache", "past_key_values", "past_key_value")
"""What versions of transformers call it."""
