"""What a compressed Qwen2.5-VL, Qwen3-VL or Qwen3.5 must compute, in eager PyTorch, by a road of its own.

The model's own vision tower, packed as ever, with hooks on its blocks that merge frames by the functions of
``reference.py``; one video at a time, one row of a prompt at a time, everything computed again for each new token; no
kernels, no passes, no backend, no cache, nothing fast.

    video = compressed_videos(model, inputs, merge_layers=(1, 4), retain_ratio=0.2, variant="paper")[0]
    video.features, video.columns          # [K, C], and which of the video's placeholders they stand at
    logits = compressed_rows(model, inputs, ...)                  # [L', vocab] of each row, without its padding
    tokens = compressed_generate(model, inputs, 8, ...)           # int64 [R, 8]

A frame is one temporal patch. Token p of merged frame m stands where token p of the first frame in m stood, and keeps
its three positions; all other places of the video are gone, and text keeps the positions it had.
"""

import math
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from oracle import Options
from tiny_qwen import VIDEO, row_alone
from torch import Tensor, nn

from earlytom_compile.reference import (
    FrameMergePlan,
    plan_frame_merge,
    segment_frames,
    select_representatives,
    select_tokens,
)

LONGEST_SEGMENT = 128  # frames, where max_window does not say


@dataclass(frozen=True)
class CompressedVideo:
    """features: ``[K, C]``. deepstack: of each earlier layer that reaches the language model, ``[K, C]``. kept: int64
    ``[K, 2]`` of (merged frame, token). columns: int64 ``[K]``, which of the video's T * P placeholders each stands
    at. frames_after: how many are left behind each merge layer."""

    features: Tensor
    deepstack: list[Tensor]
    kept: Tensor
    columns: Tensor
    placeholders: int
    frames_after: list[int]


# --- One video through the tower ------------------------------------------------------------------


@dataclass
class _Tower:
    """Hooks on a tower's blocks, for one video of T frames of S patches.

    What is packed stays packed: behind a merge the blocks are told of fewer frames. All frames of a video have the
    same rotary positions and the same windows, so that those of the first N frames are right for any N.
    """

    visual: Any
    frames: int
    patches: int
    options: Options
    origins: list[int] = field(default_factory=list)  # the first frame of the video in each that is left
    frames_after: list[int] = field(default_factory=list)
    behind: list[Tensor] = field(default_factory=list)  # DeepStack's layers so far, [N, S, D], merged along
    received: Tensor | None = None  # [N, S]
    segments: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.options.merge_layers is not None, "name the layers"
        self.origins = list(range(self.frames))
        self.scored = max(self.options.merge_layers, default=len(self.visual.blocks) - 1)

    def hooked(self) -> ExitStack:
        stack = ExitStack()
        for index, block in enumerate(self.visual.blocks):
            stack.callback(block.register_forward_pre_hook(_told_of_fewer_frames, with_kwargs=True).remove)
            if index == self.scored:
                stack.callback(block.attn.register_forward_pre_hook(self._look, with_kwargs=True).remove)
            if index in self.options.merge_layers or index == self.scored:
                hook = lambda _, args, output, index=index: self._behind(index, output)  # noqa: E731
                stack.callback(block.register_forward_hook(hook).remove)
        for merger in getattr(self.visual, "deepstack_merger_list", ()):
            stack.callback(merger.register_forward_pre_hook(self._note).remove)
        stack.callback(self.visual.merger.register_forward_hook(self._with_importance).remove)
        return stack

    def _by_frame(self, packed: Tensor) -> Tensor:
        return packed.view(-1, self.patches, packed.shape[-1])

    def _look(self, attention: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        received = attention_received(attention, hidden, kwargs["cu_seqlens"], kwargs["position_embeddings"])
        self.received = received.view(-1, self.patches) / self.patches

    def _behind(self, index: int, output: Tensor) -> Tensor:
        hidden = self._by_frame(output)
        if index in self.options.merge_layers:
            hidden = self._merge(hidden, index)
        if index == self.scored:
            self.segments = segment_frames(hidden, **self.options.segmentation())
        return hidden.flatten(0, 1)

    def _merge(self, hidden: Tensor, index: int) -> Tensor:
        plan = plan_frame_merge(
            hidden,
            **self.options.segmentation(),
            tau_merge=self.options.tau_merge,
            min_frames=math.ceil(self.options.retain_ratio * self.frames),
        )
        self.origins = [self.origins[frame] for frame in _first_frames(plan)]
        self.behind = [plan.apply(states) for states in self.behind]
        if index == self.scored:
            self.received = plan.apply(self.received)
        self.frames_after.append(len(self.origins))
        return plan.apply(hidden)

    def _note(self, merger: nn.Module, args: tuple) -> None:
        self.behind.append(self._by_frame(args[0]))

    def _with_importance(self, merger: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Importance rides along as one more channel while the tower puts tokens back into their order, and empty rows
        stand for frames that are gone."""
        importance = self.received.view(len(output), -1).mean(1, keepdim=True)
        seen = torch.cat([output, importance.to(output)], dim=1)
        frames_gone = self.frames - len(self.origins)
        return torch.cat([seen, seen.new_zeros(frames_gone * len(output) // len(self.origins), seen.shape[1])])


def _told_of_fewer_frames(block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    left, ends = len(args[0]), kwargs["cu_seqlens"]
    table = tuple(part[:left] for part in kwargs["position_embeddings"])
    return args, {**kwargs, "cu_seqlens": ends[ends <= left], "position_embeddings": table}


def _first_frames(plan: FrameMergePlan) -> list[int]:
    return [int(row.nonzero()[0]) for row in plan.weights]


def _query_and_key(attention: nn.Module, hidden: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """float32 ``[L, H, d]`` each, as they meet."""
    query, key, _ = attention.qkv(hidden).float().view(len(hidden), 3, attention.num_heads, -1).unbind(1)
    cos, sin = (part.float()[:, None] for part in table)
    return _rotated(query, cos, sin), _rotated(key, cos, sin)


def attention_received(attention: nn.Module, hidden: Tensor, ends: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """``[L, D] -> float32 [L]``: softmax(q k scale), mean over heads, sum over the queries that see a patch: those of
    its own stretch between two of ``ends``."""
    query, key = _query_and_key(attention, hidden, table)
    stretches = []
    for begin, end in pairwise(ends.tolist()):
        scores = torch.einsum("qhd,khd->hqk", query[begin:end], key[begin:end]) * query.shape[-1] ** -0.5
        stretches.append(scores.softmax(-1).mean(0).sum(0))
    return torch.cat(stretches)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _compress_video(model: Any, pixels: Tensor, grid: Tensor, options: Options) -> CompressedVideo:
    visual, (frames, height, width) = model.model.visual, grid.tolist()
    tower = _Tower(visual, frames, height * width, options)
    with tower.hooked():
        output = visual(pixels, grid_thw=grid[None], return_dict=True).pooler_output
    tokens = len(output) // frames
    output = output[: len(tower.origins) * tokens].view(len(tower.origins), tokens, -1)
    features, importance = output[..., :-1], output[..., -1]
    budget = {"frames_in": frames, "retain_ratio": options.retain_ratio}
    if options.variant == "plus":
        kept = select_representatives(features, **budget)
    else:
        kept = select_tokens(importance, tower.segments, **budget, variant=options.variant)
    frame, token = kept.unbind(1)
    earlier = zip(getattr(visual, "deepstack_merger_list", ()), tower.behind, strict=True)
    return CompressedVideo(
        features=features[frame, token],
        deepstack=[merger(states.flatten(0, 1)).view_as(features)[frame, token] for merger, states in earlier],
        kept=kept,
        columns=torch.tensor(tower.origins)[frame] * tokens + token,
        placeholders=frames * tokens,
        frames_after=tower.frames_after,
    )


# --- The prompt -----------------------------------------------------------------------------------


@dataclass
class _Sequence:
    """A cut row and what was generated behind it. positions: ``[3, L]``. following: ``[3]``, those of the
    next token. deepstack: of each earlier layer ``[L, C]``, zero where ``visual`` is False."""

    ids: Tensor
    embeddings: Tensor
    positions: Tensor
    visual: Tensor
    deepstack: list[Tensor]
    following: Tensor


def _split(pixels: Tensor, grids: Tensor) -> list[Tensor]:
    return list(pixels.split(grids.prod(1).tolist()))


def _videos_of(model: Any, inputs: dict, options: Options) -> list[CompressedVideo]:
    if inputs.get("pixel_values_videos") is None:
        return []
    grids = inputs["video_grid_thw"]
    videos = zip(_split(inputs["pixel_values_videos"], grids), grids, strict=True)
    return [_compress_video(model, pixels, grid, options) for pixels, grid in videos]


def _columns_that_stay(ids: Tensor, video_token: int, videos: list[CompressedVideo]) -> Tensor:
    holders = (ids == video_token).nonzero().flatten()
    if len(holders) != sum(video.placeholders for video in videos):
        raise ValueError(f"{len(holders)} video placeholders in a row, {len(videos)} videos for it")
    stay = ids != video_token
    for video, mine in zip(videos, holders.split([video.placeholders for video in videos]), strict=True):
        stay[mine[video.columns]] = True
    return stay.nonzero().flatten()


def _positions(model: Any, inputs: dict) -> Tensor:
    """``[3, S]`` of the uncut row."""
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    return model.model.get_rope_index(**{name: inputs[name] for name in names if name in inputs})[0][:, 0]


def _cut_row(model: Any, inputs: dict, videos: list[CompressedVideo]) -> _Sequence:
    """``inputs`` of one row, without padding."""
    config, (uncut,) = model.config, inputs["input_ids"]
    columns, positions = _columns_that_stay(uncut, config.video_token_id, videos), _positions(model, inputs)
    ids = uncut[columns]
    embeddings = model.get_input_embeddings()(ids).clone()
    of_videos, of_images = ids == config.video_token_id, ids == config.image_token_id
    count = len(getattr(model.model.visual, "deepstack_merger_list", ()))
    deepstack = [torch.zeros_like(embeddings) for _ in range(count)]
    if videos:
        embeddings[of_videos] = torch.cat([video.features for video in videos])
        for layer, states in enumerate(deepstack):
            states[of_videos] = torch.cat([video.deepstack[layer] for video in videos])
    if inputs.get("pixel_values") is not None:
        images = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"], return_dict=True)
        embeddings[of_images] = images.pooler_output
        for layer, states in enumerate(deepstack):
            states[of_images] = images.deepstack_features[layer]
    kept, visual = positions[:, columns], of_videos | of_images
    return _Sequence(ids, embeddings, kept, visual, deepstack, positions[:, -1] + 1)


def _logits(model: Any, row: _Sequence) -> Tensor:
    """``[L, vocab]``."""
    given: dict[str, Any] = {"inputs_embeds": row.embeddings[None], "position_ids": row.positions[:, None]}
    if row.deepstack and row.visual.any():
        given["visual_pos_masks"] = row.visual[None]
        given["deepstack_visual_embeds"] = [states[row.visual] for states in row.deepstack]
    return model.lm_head(model.model.language_model(**given, use_cache=False).last_hidden_state[0])


def extended(model: Any, row: _Sequence, token: int) -> _Sequence:
    """The sequence with one more token behind it."""
    embedding = model.get_input_embeddings()(torch.tensor([token]))
    return _Sequence(
        ids=torch.cat([row.ids, torch.tensor([token])]),
        embeddings=torch.cat([row.embeddings, embedding]),
        positions=torch.cat([row.positions, row.following[:, None]], dim=1),
        visual=torch.cat([row.visual, torch.tensor([False])]),
        deepstack=[torch.cat([states, torch.zeros_like(embedding)]) for states in row.deepstack],
        following=row.following + 1,
    )


# --- What the tests call --------------------------------------------------------------------------


def _options(options: dict[str, Any]) -> Options:
    given = Options(**options)
    limited = given.variant == "released" or given.max_window is not None
    return given if limited else replace(given, max_window=LONGEST_SEGMENT)


def _rows(model: Any, inputs: dict, options: dict[str, Any]) -> list[_Sequence]:
    return [row for row, _ in compressed_sequences(model, inputs, **options)]


@torch.no_grad()
def compressed_videos(model: Any, inputs: dict, **options: Any) -> list[CompressedVideo]:
    """What is left of each video of a batch. ``options``: the fields of ``oracle.Options``, by name."""
    return _videos_of(model, inputs, _options(options))


@torch.no_grad()
def encoded_whole(model: Any, pixels: Tensor, grid: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Of one video in which nothing merges: features ``[T, P, C]``; of ``layer`` (-1: the last) the attention received
    ``[T, P]`` and the keys ``[T, P, d]``, mean over heads and patches; and of each layer of DeepStack ``[T, P, C]``."""
    visual, (frames, height, width) = model.model.visual, grid.tolist()
    noted: dict[str, Tensor] = {}

    def look(attention: nn.Module, args: tuple, kwargs: dict) -> None:
        table = kwargs["position_embeddings"]
        received = attention_received(attention, args[0], kwargs["cu_seqlens"], table) / (height * width)
        keys = _query_and_key(attention, args[0], table)[1].mean(1)
        noted["seen"] = torch.cat([received[:, None], keys], dim=1)

    def ride_along(merger: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return torch.cat([output, noted["seen"].view(len(output), -1, noted["seen"].shape[1]).mean(1)], dim=1)

    hooks = [
        visual.blocks[layer].attn.register_forward_pre_hook(look, with_kwargs=True),
        visual.merger.register_forward_hook(ride_along),
    ]
    output = visual(pixels, grid_thw=grid[None], return_dict=True)
    for hook in hooks:
        hook.remove()
    both = output.pooler_output.view(frames, -1, output.pooler_output.shape[1])
    width = model.config.vision_config.out_hidden_size
    deepstack = [states.view(frames, -1, width) for states in getattr(output, "deepstack_features", None) or ()]
    return both[..., :width], both[..., width], both[..., width + 1 :], deepstack


@torch.no_grad()
def compressed_rows(model: Any, inputs: dict, **options: Any) -> list[tuple[Tensor, Tensor]]:
    """(cut ids ``[L']``, logits ``[L', vocab]``) of each row of a batch alone, without its padding."""
    return [(row.ids, _logits(model, row)) for row in _rows(model, inputs, options)]


@torch.no_grad()
def compressed_sequences(model: Any, inputs: dict, **options: Any) -> list[tuple[Any, list[int]]]:
    """What the language model gets of each row of a batch alone, and which video of it each position belongs to, -1
    for none."""
    rows = []
    for row in range(len(inputs["input_ids"])):
        alone = row_alone(inputs, row)
        videos = _videos_of(model, alone, _options(options))
        sequence = _cut_row(model, alone, videos)
        owners = iter([number for number, video in enumerate(videos) for _ in video.kept])
        rows.append((sequence, [next(owners) if token == VIDEO else -1 for token in sequence.ids.tolist()]))
    return rows


@torch.no_grad()
def compressed_generate(model: Any, inputs: dict, max_new_tokens: int, **options: Any) -> Tensor:
    """Greedy tokens int64 ``[R, new]``, prompt excluded. Their positions count on from the prompt's last one, as in
    ``generate()``."""
    generated = []
    for row in _rows(model, inputs, options):
        for _ in range(max_new_tokens):
            row = extended(model, row, int(_logits(model, row)[-1].argmax()))
        generated.append(row.ids[-max_new_tokens:])
    return torch.stack(generated)
