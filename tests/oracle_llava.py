"""What a compressed model of LLaVA's own code must compute, in eager PyTorch, by a road of its own.

Hooks on the model's own vision layers and the functions of ``reference.py``, one video at a time; newlines, prompt and
padding by the code here, which is written from LLaVA's conventions and shares nothing with the family. Images go
through the model's own code.

    prompt = compressed_prompt(model, ids, [pixels, image], ["video", "image"], retain_ratio=0.1, variant="paper")
    compressed_logits(model, prompt)                   # what model(ids, images=..., modalities=...).logits must be
    compressed_generate(model, prompt, 8)              # new tokens, each row alone and unpadded
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from unittest import mock

import torch
from oracle import Options, encoder_of
from oracle_inner import reduced_logits
from oracle_reuse import ReusingEncoder
from torch import Tensor, nn
from torch.nn import functional as F

from earlytom_compile.config import EarlyTomConfig
from earlytom_compile.reference import select_representatives, select_tokens

PLACEHOLDER = -200
IGNORED = -100


@dataclass(frozen=True)
class LlavaVideo:
    """rows: ``[kept + newlines, C]``. kept: int64 ``[kept, 2]`` of (merged frame, token)."""

    rows: Tensor
    kept: Tensor
    frames_after: list[int]


@dataclass(frozen=True)
class LlavaPrompt:
    """A batch with everything in its place: embeddings ``[R, S', C]``; mask, labels and positions ``[R, S']`` where the
    caller gave any; rows without their padding, and for each of their positions the number of the video in the row that
    it belongs to, -1 for none; the videos of all rows."""

    embeddings: Tensor
    mask: Tensor | None
    labels: Tensor | None
    positions: Tensor | None
    rows: list[Tensor]
    video_of: list[list[int]]
    videos: list[LlavaVideo] = field(default_factory=list)


# --- One video ------------------------------------------------------------------------------------


@torch.no_grad()
def compressed_video(model, pixels: Tensor, **options) -> LlavaVideo:
    """``pixels [F, 3, H, W]``: encode with merging, project, pool, select, put newlines between. ``options``: the
    fields of Options, by name."""
    chosen = Options(**options)
    if chosen.keep is not None:
        return _kept_by_method(model, pixels, chosen)
    layers = _layers(model)
    merge_layers = chosen.merge_layers
    if merge_layers is None:
        merge_layers = EarlyTomConfig(variant="paper").resolve_merge_layers(len(layers))
    patch = model.get_vision_tower().config.patch_size
    encoder = encoder_of(layers, merge_layers, pixels, patch, chosen)
    with encoder.hooked():
        encoded = model.encode_images(pixels)
    features = model.get_2dPool(encoded)
    if chosen.variant == "plus":
        kept = select_representatives(features, frames_in=len(pixels), retain_ratio=chosen.retain_ratio)
    else:
        kept = select_tokens(
            _pool_importance(model, encoder.importance),
            encoder.segments,
            frames_in=len(pixels),
            retain_ratio=chosen.retain_ratio,
            variant=chosen.variant,
        )
    return LlavaVideo(
        rows=_with_newlines(model, features[kept[:, 0], kept[:, 1]], kept.tolist()),
        kept=kept,
        frames_after=encoder.frames_after,
    )


def _kept_by_method(model, pixels: Tensor, chosen: Options) -> LlavaVideo:
    """The same where no frames merge, no patch is reused, and another method selects."""
    layers = _layers(model)
    encoder = ReusingEncoder(
        layers,
        pixels,
        model.get_vision_tower().config.patch_size,
        tau_reuse=chosen.tau_reuse,
        full_layers=range(len(layers)),
        importance_layer=range(len(layers))[chosen.scored_layer],
    )
    with encoder.hooked():
        features = model.get_2dPool(model.encode_images(pixels))
    importance = _pool_importance(model, encoder.importance)
    keys = torch.stack([_pool_importance(model, channel.contiguous()) for channel in encoder.keys.unbind(-1)], dim=-1)
    budget = max(1, round(chosen.retain_ratio * features[..., 0].numel()))
    tokens, kept = chosen.keep(features, importance, keys, budget)
    return LlavaVideo(_with_newlines(model, tokens, kept.tolist()), kept, frames_after=[])


def _layers(model) -> nn.ModuleList:
    lists = (getattr(module, "layers", None) for module in model.get_vision_tower().modules())
    return next(layers for layers in lists if isinstance(layers, nn.ModuleList))


def grid_side(model) -> int:
    """Tokens of a frame to a side, after pooling with stride 2: bilinear rounds up, a window rounds down."""
    side = model.get_vision_tower().num_patches_per_side
    return math.ceil(side / 2) if model.config.mm_spatial_pool_mode == "bilinear" else side // 2


def _pool_importance(model, importance: Tensor) -> Tensor:
    """``[N, S] -> [N, P]``, as the model pools its features."""
    side = model.get_vision_tower().num_patches_per_side
    grid, mode = importance.view(len(importance), 1, side, side), model.config.mm_spatial_pool_mode
    if mode == "bilinear":
        return F.interpolate(grid, size=(math.ceil(side / 2),) * 2, mode="bilinear").flatten(1)
    return {"average": F.avg_pool2d, "max": F.max_pool2d}[mode](grid, 2).flatten(1)


def _newline_places(model) -> str:
    """``"none"``, ``"end"`` of the video, of each ``"frame"``, or of each ``"row"`` of a frame."""
    merge = getattr(model.config, "mm_patch_merge_type", "flat")
    if merge == "flat":
        return "none"
    position = getattr(model.config, "mm_newline_position", "one_token")
    if position == "one_token" and "unpad" not in merge:
        return "none"
    return {"no_token": "none", "one_token": "end", "frame": "frame", "grid": "row"}[position]


def _with_newlines(model, tokens: Tensor, kept: list[list[int]]) -> Tensor:
    """A newline behind the last token of each unit that still has one."""
    assert kept == sorted(kept), "kept tokens go by frame, then by place"
    places, side = _newline_places(model), grid_side(model)
    units = {
        "none": [None] * len(kept),
        "end": [0] * len(kept),
        "frame": [frame for frame, _ in kept],
        "row": [(frame, place // side) for frame, place in kept],
    }[places]
    rows = []
    for token, unit, following in zip(tokens, units, [*units[1:], None], strict=True):
        rows.append(token)
        if unit != following:
            rows.append(model.model.image_newline.to(token))
    return torch.stack(rows)


# --- The prompt -----------------------------------------------------------------------------------


@torch.no_grad()
def compressed_prompt(
    model,
    ids: Tensor,
    images: Sequence[Tensor],
    modalities: Sequence[str] | str,
    *,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    position_ids: Tensor | None = None,
    image_sizes: Sequence | None = None,
    **options,
) -> LlavaPrompt:
    """``ids [R, S]`` with one -200 for each of ``images``, in order; a row without any passes over one of them."""
    kinds = [modalities] if isinstance(modalities, str) else list(modalities)
    kinds += ["image"] * (len(images) - len(kinds))
    videos, entries = [], []
    for number, (each, kind) in enumerate(zip(images, kinds, strict=True)):
        if kind == "video":
            videos.append(compressed_video(model, each if each.dim() == 4 else each[None], **options))
            entries.append((True, videos[-1].rows))
        else:
            entries.append((False, _own_rows(model, each, None if image_sizes is None else image_sizes[number])))
    masks = torch.ones_like(ids) if attention_mask is None else attention_mask
    given_labels = torch.full_like(ids, IGNORED) if labels is None else labels
    limit = getattr(model.config, "tokenizer_model_max_length", None)
    waiting, rows, row_labels, video_of = iter(entries), [], [], []
    for row_ids, row_mask, row_label in zip(ids, masks, given_labels, strict=True):
        seen = row_mask.bool()
        row, label, numbers = _row(model, row_ids[seen].tolist(), row_label[seen].tolist(), waiting)
        rows.append(row[:limit])
        row_labels.append(label[:limit])
        video_of.append(numbers[:limit])
    left = getattr(model.config, "tokenizer_padding_side", "right") == "left"
    counted = [torch.arange(len(row)) for row in rows]
    return LlavaPrompt(
        embeddings=_padded(rows, 0.0, left),
        mask=None if attention_mask is None else _padded([torch.ones(len(row)) for row in rows], 0, left).to(masks),
        labels=None if labels is None else _padded(row_labels, IGNORED, left),
        positions=None if position_ids is None else _padded(counted, 0, left),
        rows=rows,
        video_of=video_of,
        videos=videos,
    )


def _own_rows(model, image: Tensor, size) -> Tensor:
    """``[N, C]`` of an image or its crops, by the model's own code: what it puts behind a word."""
    ids = torch.tensor([[1, PLACEHOLDER]])
    with mock.patch.object(model.config, "tokenizer_model_max_length", None, create=True):
        prepared = model.prepare_inputs_labels_for_multimodal(
            ids, None, None, None, None, [image], ["image"], image_sizes=None if size is None else [size]
        )
    return prepared[4][0, 1:]


def _row(model, ids: list[int], labels: list[int], waiting) -> tuple[Tensor, Tensor, list[int]]:
    """One row without padding: ``[S', C]``, its labels ``[S']``, and which video each position belongs to."""
    words = model.get_input_embeddings()
    parts, new_labels, video_of = [words.weight[:0]], [], []
    for token, label in zip(ids, labels, strict=True):
        if token == PLACEHOLDER:
            is_video, rows = next(waiting)
            parts.append(rows)
            new_labels += [IGNORED] * len(rows)
            video_of += [max(video_of, default=-1) + 1 if is_video else -1] * len(rows)
        else:
            parts.append(words(torch.tensor([token])))
            new_labels.append(label)
            video_of.append(-1)
    if PLACEHOLDER not in ids:
        next(waiting)
    return torch.cat(parts), torch.tensor(new_labels, dtype=torch.int64), video_of


def _padded(rows: Sequence[Tensor], value: float, left: bool) -> Tensor:
    length = max(len(row) for row in rows)
    fill = [row.new_full((length - len(row), *row.shape[1:]), value) for row in rows]
    return torch.stack([torch.cat((gap, row) if left else (row, gap)) for gap, row in zip(fill, rows, strict=True)])


# --- The language model ---------------------------------------------------------------------------


@torch.no_grad()
def compressed_logits(model, prompt: LlavaPrompt) -> Tensor:
    """``[R, S', vocabulary]``; compare where the mask is 1."""
    return _logits(model, prompt.embeddings, attention_mask=prompt.mask, position_ids=prompt.positions)


@torch.no_grad()
def compressed_loss(model, prompt: LlavaPrompt) -> Tensor:
    """Mean cross-entropy of each labelled token, given what comes before it."""
    predicted, wanted = compressed_logits(model, prompt)[:, :-1], prompt.labels[:, 1:]
    counted = wanted != IGNORED
    return F.cross_entropy(predicted[counted], wanted[counted])


@torch.no_grad()
def compressed_steps(model, prompt: LlavaPrompt, new: int, steps: Sequence = ()) -> tuple[Tensor, Tensor]:
    """Greedy tokens int64 ``[R, new]`` and their logits ``[R, new, vocabulary]``: each row alone and unpadded, computed
    anew for every token. ``steps`` inside the language model, as ``earlytom_compile.methods.base.Step`` has them."""
    generated, decided = [], []
    for row, video_of in zip(prompt.rows, prompt.video_of, strict=True):
        sequence, tokens, logits = row[None], [], []
        for _ in range(new):
            whole = reduced_logits(model, sequence[0], video_of, steps) if steps else _logits(model, sequence)[0]
            logits.append(whole[-1])
            tokens.append(int(logits[-1].argmax()))
            following = model.get_input_embeddings()(torch.tensor([[tokens[-1]]]))
            sequence = torch.cat([sequence, following], dim=1)
        generated.append(tokens)
        decided.append(torch.stack(logits))
    return torch.tensor(generated), torch.stack(decided)


def compressed_generate(model, prompt: LlavaPrompt, new: int) -> Tensor:
    """The tokens of :func:`compressed_steps`."""
    return compressed_steps(model, prompt, new)[0]


def _logits(model, embeddings: Tensor, **given) -> Tensor:
    given = {name: value for name, value in given.items() if value is not None}
    return model.lm_head(model.model(inputs_embeds=embeddings, use_cache=False, **given)[0])
