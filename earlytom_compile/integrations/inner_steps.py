"""Fewer video tokens in the later layers of a language model that is compiled in place.

    plan = InnerPrompt.plan(video_of, mask, steps)      # on the host: how many tokens each video keeps, and where
    embeds = plan.mark(embeds)                          # in the trace of the prompt's pass, whose graph is rewritten
    shorten(graph_module, example_inputs, steps)        # passes/insert_inner_steps.py
    keep_in_mind(cache, ...)                            # later layers have fewer keys from here on, so that in
    ShorterLayer(layer, index)                          # each decoding step they need a mask of their own

Which tokens stay depends on the attention they receive, how many does not: sizes are known before anything runs.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..errors import EarlyTomConfigError
from ..kernels import all_ops  # noqa: F401  (registers torch.ops.earlytom)
from ..methods.base import Step
from ..passes.canonicalize_attention import canonicalize_attention
from ..passes.canonicalize_masks import canonicalize_masks
from ..passes.canonicalize_sizes import canonicalize_sizes
from ..passes.canonicalize_vmap import canonicalize_vmap
from ..passes.canonicalize_writes import canonicalize_writes
from ..passes.find_decoder_layers import find_decoder_layers
from ..passes.find_vision_encoder import GraphView
from ..passes.graph_order import eliminate_dead_code
from ..passes.insert_inner_steps import InnerPlan, insert_inner_steps, require_layers
from ..passes.patterns import insert, value_of
from ..passes.retarget_axes import retarget_axes
from ..passes.run_on_fakes import run_on_fake_tensors
from ..prompt import without_waiting

_PADDING, _FIRST_VIDEO = -1, -2  # of slots, as kernels/inner_prompt.py has them
_STATE = "_earlytom_inner"


@dataclass(frozen=True)
class InnerPrompt:
    """What is known of a prompt [R, S] before the language model runs, on the host."""

    video_of: Tensor
    """int64 [R, S], the video that each position belongs to, numbered from 0 in each row; -1: to none."""
    last: tuple[Tensor, ...]
    """int64 [R], the last position that is attended to, before each step."""
    slots: tuple[Tensor, ...]
    """int64 [R, S'], what is left after each step (kernels/inner_prompt.py)."""

    @classmethod
    def plan(cls, video_of: Tensor, mask: Tensor | None, steps: Sequence[Step]) -> "InnerPrompt":
        """``mask`` [R, S]: 0 where nothing is attended to; None: it is everywhere. Of n tokens a video keeps
        max(1, round(n * keep_ratio)) in each step, of those that it has left."""
        last = torch.full((len(video_of),), video_of.shape[1] - 1) if mask is None else _last_of(mask)
        entered = [torch.bincount(row[row >= 0]).tolist() for row in video_of]
        lasts, slots, videos = list[Tensor](), list[Tensor](), video_of
        for step in steps:
            lasts.append(last)
            left = [[max(1, round(n * step.keep_ratio)) for n in row] for row in entered]
            slots.append(_slots(videos, left))
            # A prompt may end in a video, whose last slot it is then.
            ends = slots[-1] == last[:, None]
            last = torch.where(ends.any(1), ends.int().argmax(1), slots[-1].shape[1] - 1)
            videos = torch.where(slots[-1] <= _FIRST_VIDEO, _FIRST_VIDEO - slots[-1], -1)
        return cls(video_of, tuple(lasts), tuple(slots))

    @property
    def padded(self) -> bool:
        """Whether a step pads some row, since others keep more."""
        return any(bool((slots == _PADDING).any()) for slots in self.slots)

    @property
    def length(self) -> int:
        """S."""
        return self.video_of.shape[1]

    def for_rows(self, rows: int) -> "InnerPrompt":
        """The same where ``generate`` has each row several times, for beams or samples."""
        copies = rows // len(self.video_of)
        return self if copies == 1 else self._each(lambda x: x.repeat_interleave(copies, 0))

    def on_device(self, device: torch.device) -> "InnerPrompt":
        """The same beside the model."""
        return self._each(lambda x: without_waiting(x.contiguous(), device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "InnerPrompt":
        return InnerPrompt(change(self.video_of), tuple(map(change, self.last)), tuple(map(change, self.slots)))


def _last_of(mask: Tensor) -> Tensor:
    """int64 [R]: the last position that is not 0; the very last where all are."""
    return mask.shape[1] - 1 - mask.ne(0).int().flip(1).argmax(1)


def _slots(videos: Tensor, left: Sequence[Sequence[int]]) -> Tensor:
    """int64 [R, S'], each video's first places being its slots; shorter rows are padded on the left."""
    rows = []
    for row, keeps in zip(videos.tolist(), left, strict=True):
        taken = [0] * len(keeps)
        slots = []
        for position, video in enumerate(row):
            if video < 0:
                slots.append(position)
            elif taken[video] < keeps[video]:
                taken[video] += 1
                slots.append(_FIRST_VIDEO - video)
        rows.append(slots)
    width = max(map(len, rows))
    return torch.tensor([[_PADDING] * (width - len(row)) + row for row in rows])


# --- The graph of the prompt's pass -----------------------------------------------------------------


def find_mark(graph_module: GraphModule) -> Node | None:
    """Where :func:`torch.ops.earlytom.mark_videos` was traced; None where it was not."""
    marks = (node for node in graph_module.graph.nodes if node.target is torch.ops.earlytom.mark_videos.default)
    packets = (node for node in graph_module.graph.nodes if node.target is torch.ops.earlytom.mark_videos)
    return next(marks, None) or next(packets, None)


def erase_mark(graph_module: GraphModule, mark: Node) -> None:
    """Take the mark out again."""
    mark.replace_all_uses_with(mark.args[0])  # type: ignore[arg-type]
    graph_module.graph.erase_node(mark)
    graph_module.recompile()


def shorten(graph_module: GraphModule, mark: Node, steps: Sequence[Step], padded: bool, counted: bool = False) -> int:
    """Rewrite the graph in place, so that it goes on with fewer tokens at each step and returns, beside its own
    outputs, the positions that are left behind each; returns how many outputs are its own. ``counted``: it returns the
    length of its first layer, too, which stays as it is. Raises NotApplicable."""
    graph = graph_module.graph
    prompt, video_of, last, slots = cast(tuple[Node, Node, Sequence[Node], Sequence[Node]], mark.args)
    erase_mark(graph_module, mark)
    canonicalize_sizes(graph)
    canonicalize_writes(graph)
    canonicalize_vmap(graph)
    canonicalize_attention(graph)
    canonicalize_masks(graph)
    eliminate_dead_code(graph, keep={video_of, *last, *slots})
    view = GraphView(graph_module)
    layers = find_decoder_layers(view, prompt)
    require_layers(layers, steps)
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        lengths = [insert(graph, torch.ops.aten.sym_size.int, each, 1, like=value_of(each).shape[1]) for each in slots]
    plan = InnerPlan(video_of, last, slots, lengths, padded)
    done = insert_inner_steps(graph, view, layers, steps, plan)
    (output,) = (node for node in graph.nodes if node.op == "output")
    retarget_axes(graph_module, done.axes, done.kept, as_before={output} if counted else ())
    own = tuple(output.args[0])  # type: ignore[arg-type]
    output.args = ((*own, *done.kept),)
    eliminate_dead_code(graph)
    graph.lint()
    graph_module.recompile()
    run_on_fake_tensors(graph_module)
    return len(own)


# --- Decoding behind such a prompt ------------------------------------------------------------------


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
    return all(
        getattr(each, "max_cache_len", None) is None for each in (cache, *(getattr(cache, "layers", None) or ()))
    )


def forget_if_empty(cache: Any) -> None:
    """A cache that begins anew knows of no prompt."""
    if _STATE in getattr(cache, "__dict__", {}) and int(cache.get_seq_length()) == 0:
        delattr(cache, _STATE)


class ShorterLayer:
    """Stands in for the ``forward`` of a decoder layer before which tokens may have gone."""

    def __init__(self, layer: nn.Module, index: int) -> None:
        self._layer = layer
        self._index = index
        self._before = layer.__dict__.get("forward")
        self._own = layer.forward
        layer.__dict__["forward"] = self

    def remove(self) -> None:
        """Put the layer's own ``forward`` back, unless somebody has replaced ours since."""
        if self._layer.__dict__.get("forward") is self:
            del self._layer.__dict__["forward"]
            if self._before is not None:
                self._layer.__dict__["forward"] = self._before

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache: Any = next((kwargs[name] for name in _CACHES if kwargs.get(name) is not None), None)
        state: _Shorter | None = getattr(cache, _STATE, None)
        if state is not None:
            keys = cache.get_seq_length(self._index) + hidden_states.shape[1]
            kwargs["attention_mask"] = state.mask(self._index, kwargs.get("attention_mask"), keys)
        return self._own(hidden_states, *args, **kwargs)


_CACHES = ("cache", "past_key_values", "past_key_value")
"""What versions of transformers call it."""
