"""Fewer video tokens in the later layers of a language model that is compiled in place.

    plan = InnerPrompt.plan(video_of, mask, steps)      # on the host: how many tokens each video keeps, and where
    torch.ops.earlytom.mark_videos(embeds, ...)         # in the trace of the prompt's pass, whose graph is rewritten:
    shorten(graph_module, find_mark(graph_module), steps, plan.padded)       # passes/insert_inner_steps.py

Which tokens stay depends on the attention they receive, how many does not: sizes are known before anything runs. What
comes behind the prompt is decoded with a cache that is shorter in later layers (shorter_caches.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..kernels import all_ops  # noqa: F401  (registers torch.ops.earlytom)
from ..kernels.inner_prompt import FIRST_VIDEO
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

_PADDING = -1  # of slots


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
            videos = torch.ops.earlytom.videos_of_slots(slots[-1])
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
    rows = [_slots_of_row(row, torch.tensor(keeps, dtype=torch.int64)) for row, keeps in zip(videos, left, strict=True)]
    width = max(map(len, rows))
    return torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=_PADDING) for row in rows])


def _slots_of_row(videos: Tensor, keeps: Tensor) -> Tensor:
    """int64 [S'], unpadded; ``videos`` int64 [S] ascend, and ``keeps`` has a number for each."""
    slots = torch.arange(len(videos))
    inside = videos >= 0
    numbers = videos[inside]
    counts = torch.bincount(numbers, minlength=len(keeps))
    within = torch.arange(len(numbers)) - (counts.cumsum(0) - counts)[numbers]
    slots[inside] = FIRST_VIDEO - numbers
    stays = ~inside
    stays[inside] = within < keeps[numbers]
    return slots[stays]


# --- The graph of the prompt's pass -----------------------------------------------------------------


def find_mark(graph_module: GraphModule) -> Node | None:
    """Where :func:`torch.ops.earlytom.mark_videos` was traced; None where it was not."""
    op = torch.ops.earlytom.mark_videos
    return next((node for node in graph_module.graph.nodes if node.target in (op, op.default)), None)


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
