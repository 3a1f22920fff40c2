"""Frames that merge inside the vision encoder, by hooks on it and by operators that are as fast as the installed ones.

    Merging(model, by_paper(config), (1, 6))                   # stage 1 of ``paper``: "only stage 1"
    runs(model, 0.8)                                           # "frames in runs"
    runs(model, 0.8, 0.1)                                      # the same, and the selection of ``plus`` behind it

A run is a frame and those behind it that are like it in every place: a frame belongs to the run of the last *first*
frame if the lowest cosine of two tokens in the same place is at least the threshold. The paper's rule takes the mean of
all places, in which one small thing that is new does not count for much. A run becomes the mean of its frames::

    worst cosine with the run's first frame:  -    0.97  0.91 | 0.31  0.95        threshold 0.8
    frames                                    0    1     2    | 3     4      ->   mean(0, 1, 2), mean(3, 4)
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from earlytom_compile.benchmarks.arms import twin_of
from earlytom_compile.config import EarlyTomConfig
from earlytom_compile.kernels.frame_similarity import frame_similarity
from earlytom_compile.kernels.merge_frames import merge_frames
from earlytom_compile.kernels.plan_merge import plan_merge
from earlytom_compile.kernels.select_representatives import select_representatives
from earlytom_compile.toyworld import cost
from earlytom_compile.toyworld.baselines import Plain
from earlytom_compile.toyworld.installed import Compressed, Model, share

RUNS = "frames in runs"
OPTIONS = ("tau_run",)
EMBEDDING = cost.EMBEDDING

Rule = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Frames [T, S, D] and how many of the video's each stands for [T] -> those that are left, and the same of them."""


class Merging(Plain):
    """Frames merge by ``rule`` behind each of the ``places``, EMBEDDING or a layer's number. With ``retain_ratio`` the
    tokens that ``plus`` selects stay, else all of the frames that are left."""

    def __init__(self, model: Model, rule: Rule, places: tuple[int, ...], retain_ratio: float | None = None) -> None:
        super().__init__(model)
        self._rule, self._places = rule, places
        self._ratio = retain_ratio
        self._left: list[int] = []
        self._stands_for = torch.ones(0)
        self._hooked: Any = twin_of(model)
        self._layers = encoder_layers(self._hooked)
        for place in places:
            module = _embeddings(self._hooked) if place == EMBEDDING else self._layers[place]
            module.register_forward_hook(lambda _module, _given, output: self._behind(output))

    def _behind(self, output: Any) -> Any:
        hidden, *others = output if isinstance(output, tuple) else (output,)
        merged, self._stands_for = self._rule(hidden, self._stands_for)
        self._left.append(len(merged))
        return (merged, *others) if isinstance(output, tuple) else merged

    @torch.no_grad()
    def tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        self._left, self._stands_for = [], pixels.new_ones(len(pixels))
        inner = self._hooked.model
        hidden = inner.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
        if self.model.config.vision_feature_select_strategy == "default":
            hidden = hidden[:, 1:]  # without the class token
        rows: torch.Tensor = inner.apply_pooling(inner.multi_modal_projector(hidden))
        if self._ratio is None:
            return rows.flatten(0, 1)
        budget = EarlyTomConfig(retain_ratio=self._ratio).token_budget(len(pixels), rows.shape[1])
        budget = min(budget, rows.shape[0] * rows.shape[1])  # runs know nothing of a budget
        return select_representatives(rows, torch.tensor([len(rows)], device=rows.device), budget)[0][0]

    def __call__(self, pixels: torch.Tensor) -> Compressed:
        kept, schedule = self.tokens(pixels), [len(pixels), *self._left]
        behind = [sum(layer > place for place in self._places) for layer in range(len(self._layers))]
        work = share([schedule[merges] for merges in behind], len(pixels))
        flops = cost.of_frames(self.shape, schedule, self._places)
        if self._ratio is not None:
            flops += cost.representatives(self.shape, schedule[-1])
        return Compressed(kept, work, flops)


def runs(model: Model, tau_run: float, retain_ratio: float | None = None) -> Merging:
    """Runs merge behind the patch embedding, and where ``paper`` merges frames."""
    layers = EarlyTomConfig(variant="paper").resolve_merge_layers(len(encoder_layers(model)))
    return Merging(model, by_worst_token(tau_run), (EMBEDDING, *layers), retain_ratio)


def by_worst_token(tau_run: float) -> Rule:
    """Frames join the run before them while even the least like of their tokens is like that of the run's first."""

    def rule(hidden: torch.Tensor, stands_for: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        run_of = torch.tensor(_runs(worst_tokens(hidden).tolist(), tau_run), device=hidden.device)
        count = int(run_of[-1]) + 1
        if count == len(hidden):
            return hidden, stands_for
        frames = stands_for.new_zeros(count).index_add_(0, run_of, stands_for)
        sums = hidden.new_zeros(count, *hidden.shape[1:]).index_add_(0, run_of, hidden * stands_for[:, None, None])
        return sums / frames[:, None, None], frames

    return rule


def worst_tokens(hidden: torch.Tensor) -> torch.Tensor:
    """Lowest cosine over places of the tokens there, of every frame with every other: [T, S, D] -> [T, T]."""
    unit = F.normalize(hidden, dim=-1).transpose(0, 1)
    return (unit @ unit.transpose(1, 2)).amin(0)


def _runs(worst: list[list[float]], tau_run: float) -> list[int]:
    """The number of each frame's run."""
    first, run_of = 0, [0]
    for frame in range(1, len(worst)):
        begins = worst[first][frame] < tau_run
        first = frame if begins else first
        run_of.append(run_of[-1] + begins)
    return run_of


def by_paper(config: EarlyTomConfig) -> Rule:
    """Stage 1 of ``paper``, with the operators that are installed."""
    tau_merge = math.nan if config.tau_merge == "segment" else config.tau_merge

    def rule(hidden: torch.Tensor, stands_for: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        counts = torch.tensor([len(hidden)], device=hidden.device)
        source, weight, left = plan_merge(
            frame_similarity(hidden, config.similarity_band(len(hidden))),
            counts,
            variant=config.merge_variant(),
            tau_seg=config.tau_seg,
            alpha=config.alpha,
            max_window=config.window(),
            tau_merge=tau_merge,
            min_frames=config.min_frames(len(stands_for)),  # all of the video, since they stay as they are
        )
        (merged,) = merge_frames([hidden], source, weight, int(left))
        return merged, stands_for  # the paper's weights do not ask for them

    return rule


def encoder_layers(model: Model) -> Any:
    """The layers of the vision encoder; where they hang depends on the version of transformers, and DINOv2 has another
    name for them."""
    names = ("encoder.layers", "encoder.layer")
    (layers,) = (m for name, m in model.model.vision_tower.named_modules() if name.endswith(names))
    return layers


def _embeddings(model: Model) -> Any:
    """What makes patches of pixels, and adds their positions."""
    (module,) = (m for name, m in model.model.vision_tower.named_modules() if _last(name) == "embeddings")
    return module


def _last(name: str) -> str:
    """``vision_model.embeddings`` -> ``embeddings``, which ``embeddings.patch_embeddings`` is not."""
    return name.rpartition(".")[2]
