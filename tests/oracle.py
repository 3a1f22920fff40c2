"""What a compressed LLaVA-OneVision, LLaVA-NeXT-Video or Video-LLaVA must compute, in eager PyTorch, by a road of its
own.

Module hooks on the model's own vision layers and the functions of ``reference.py``; one video at a time; no
kernels, no passes, no backend, no cache, nothing fast.

    result = compressed_forward(model, inputs, retain_ratio=0.1, variant="paper")
    result.logits            # what torch.compile(model, backend="earlytom", ...)(**inputs).logits must be
    tokens = compressed_generate(model, inputs, 8, retain_ratio=0.1, variant="paper")
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from oracle_inner import reduced_logits
from oracle_reuse import ReusingEncoder, attention_of, tensor_of
from oracle_tower import features_and_importance, layers_in_use, pool_importance, seen_by_method, tower_of
from torch import Tensor, nn

from earlytom_compile.config import EarlyTomConfig
from earlytom_compile.reference import plan_frame_merge, segment_frames, select_representatives, select_tokens


@dataclass(frozen=True)
class Options:
    """The options of ``EarlyTomConfig`` that change what is computed, by the same names."""

    retain_ratio: float
    variant: str = "plus"
    merge_layers: Sequence[int] | None = None
    tau_seg: float = 0.6
    alpha: float = 0.9
    max_window: int | None = None
    tau_merge: float | str = "segment"
    reuse: bool | None = None
    tau_reuse: float = EarlyTomConfig.tau_reuse
    full_layers: Sequence[int] | None = None
    encode_ratio: float | None = None
    keep: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]] | None = None
    """(features [F, P, C], attention received [F, P], keys [F, P, d], K) -> (tokens [K, C], int64 [K, 2]): another
    method, in the place of ``variant``."""
    scored_layer: int = -1
    steps: Sequence[Any] = ()
    """Steps inside the language model, as ``earlytom_compile.methods.base.Step`` has them."""

    def segmentation(self) -> dict:
        return {
            "variant": "paper" if self.variant == "plus" else self.variant,
            "tau_seg": self.tau_seg,
            "alpha": self.alpha,
            "max_window": self.max_window,
        }


@dataclass(frozen=True)
class CompressedVideo:
    """features: ``[kept (+ 1), D]``, with the separator of a model that has one. kept: int64 ``[kept, 2]`` of (merged
    frame, token)."""

    features: Tensor
    kept: Tensor
    frames_after: list[int]
    placeholders: int


@dataclass(frozen=True)
class OracleResult:
    """logits: ``[R, L', vocab]`` over the cut prompt; shorter rows are padded on the left.

    Compare logits where ``cut_attention_mask`` is 1. frames_after: for every video the number of frames after
    each merge layer; kept: for every video the (merged frame, token) it keeps.
    """

    logits: Tensor
    cut_input_ids: Tensor
    cut_attention_mask: Tensor
    frames_after: list[list[int]] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)


# --- One video through the vision encoder ---------------------------------------------------------


class MergingEncoder:
    """Forward hooks that merge frames between vision encoder layers and note what selection needs."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        merge_layers: Sequence[int],
        frames: int,
        options: Options,
        received: Callable[[nn.Module, Tensor], Tensor] | None = None,
    ):
        """``received(layer, its input [T, S, D])`` -> float32 [T, S], the attention that tokens receive, mean over
        heads and queries; left out where the layer's ``self_attn`` or ``attention`` has ``q_proj``, ``k_proj`` and
        ``head_dim``."""
        self.received = received
        self.layers, self.merge_layers, self.options = layers, tuple(sorted(merge_layers)), options
        self.min_frames = math.ceil(options.retain_ratio * frames)
        self.frames_after: list[int] = []
        self.outputs: dict[int, Tensor] = {}  # of each layer, merged
        self.query = self.key = self.input = self.importance = self.segments = None

    @property
    def output(self) -> Tensor:
        return self.outputs[len(self.layers) - 1]

    def hooked(self) -> ExitStack:
        stack = ExitStack()

        def on(module: nn.Module, hook) -> None:
            stack.callback(module.register_forward_hook(hook).remove)

        last = self.layers[self.merge_layers[-1]]
        if self.received is None:
            attention = attention_of(last)
            on(attention.q_proj, lambda module, args, output: setattr(self, "query", output.detach()))
            on(attention.k_proj, lambda module, args, output: setattr(self, "key", output.detach()))
        on(last, lambda module, args, output: setattr(self, "input", args[0] if args else None))
        for index in self.merge_layers:
            on(self.layers[index], lambda module, args, output, index=index: self._merge(index, output))
        for index, layer in enumerate(self.layers):
            on(layer, lambda module, args, output, index=index: self.outputs.update({index: tensor_of(output)}))
        return stack

    def _merge(self, index: int, output):
        hidden = tensor_of(output)
        options = self.options
        plan = plan_frame_merge(
            hidden, **options.segmentation(), tau_merge=options.tau_merge, min_frames=self.min_frames
        )
        merged = plan.apply(hidden)
        # What left earlier layers, and goes on beside the encoder, is of the same frames.
        self.outputs = {layer: plan.apply(before) for layer, before in self.outputs.items() if layer < index}
        self.frames_after.append(len(merged))
        if index == self.merge_layers[-1]:
            layer = self.layers[index]
            if self.received is not None:
                received = self.received(layer, self.input)
            else:
                received = _attention_received(self.query, self.key, attention_of(layer))
            self.importance = plan.apply(received)
            self.segments = segment_frames(merged, **options.segmentation())
        return (merged, *output[1:]) if isinstance(output, tuple) else merged


def encoder_of(
    layers: Sequence[nn.Module], merge_layers: Sequence[int], pixels: Tensor, patch: int, options: Options
) -> MergingEncoder | ReusingEncoder:
    """For one video ``[F, C, H, W]``: what merges its frames, or computes no patch again that did not change."""
    reuse = options.variant == "plus" if options.reuse is None else options.reuse
    if not reuse:
        return MergingEncoder(layers, merge_layers, len(pixels), options)
    return ReusingEncoder(
        layers,
        pixels,
        patch,
        tau_reuse=options.tau_reuse,
        full_layers=options.full_layers,
        encode_ratio=options.encode_ratio,
        importance_layer=max(merge_layers),
        segmentation=options.segmentation(),
    )


def _attention_received(query: Tensor, key: Tensor, attention: nn.Module) -> Tensor:
    """``[T, S, D], [T, S, D] -> float32 [T, S]``: attention a token receives, mean over heads and queries."""
    heads, width, scale = len(query[0, 0]) // attention.head_dim, attention.head_dim, attention.head_dim**-0.5
    query, key = (x.float().unflatten(-1, (heads, width)).transpose(1, 2) for x in (query, key))
    frames = [(q @ k.transpose(-1, -2) * scale).softmax(-1).mean((0, 1)) for q, k in zip(query, key, strict=True)]
    return torch.stack(frames)


def _compress_video(model, pixels: Tensor, options: Options) -> CompressedVideo:
    """``pixels [F, C, H, W]``: encode with merging, project, pool, select, append the separator."""
    if options.keep is not None:
        return _keep_by_method(model, pixels, options)
    layers = layers_in_use(model)
    merge_layers = options.merge_layers
    if merge_layers is None:
        merge_layers = EarlyTomConfig(variant="paper").resolve_merge_layers(len(layers))
    if not merge_layers or not all(0 <= index < len(layers) for index in merge_layers):
        raise ValueError(f"merge_layers={merge_layers}: the encoder uses layers 0 to {len(layers) - 1}")
    encoder = encoder_of(layers, merge_layers, pixels, model.config.vision_config.patch_size, options)
    with encoder.hooked():
        tower_of(model)(pixels)
    features, importance = features_and_importance(model, encoder)
    if options.variant == "plus":
        kept = select_representatives(features, frames_in=len(pixels), retain_ratio=options.retain_ratio)
    else:
        kept = select_tokens(
            pool_importance(model, importance),
            encoder.segments,
            frames_in=len(pixels),
            retain_ratio=options.retain_ratio,
            variant=options.variant,
        )
    return _with_separator(model, features[kept[:, 0], kept[:, 1]], kept, encoder, len(pixels) * features.shape[1])


def _with_separator(model, tokens: Tensor, kept: Tensor, encoder, placeholders: int) -> CompressedVideo:
    newline = None if hasattr(model.model, "vision_resampler") else getattr(model.model, "image_newline", None)
    separators = 0 if newline is None else 1
    features = tokens if newline is None else torch.cat([tokens, newline.to(tokens)[None]])
    return CompressedVideo(features, kept, encoder.frames_after, placeholders + separators)


def _keep_by_method(model, pixels: Tensor, options: Options) -> CompressedVideo:
    """The same where no frames merge and another method selects."""
    encoder, features, importance, keys = seen_by_method(model, pixels, options)
    every = features[..., 0].numel()
    tokens, kept = options.keep(features, importance, keys, max(1, round(options.retain_ratio * every)))
    return _with_separator(model, tokens, kept, encoder, every)


# --- The prompt -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """One cut prompt row. positions: where its tokens were. embeddings: ``[L, D]``, features in place. video_of: the
    number of the video in the row that each belongs to, -1 for none."""

    positions: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    embeddings: Tensor
    video_of: Tensor


def _image_features(model, inputs: dict) -> Tensor | None:
    """``[image placeholders of the batch, D]`` by the model's own code, untouched."""
    names = ("pixel_values", "pixel_values_images")  # the second in Video-LLaVA of transformers before 5.23
    pixels = next((inputs[name] for name in names if inputs.get(name) is not None), None)
    if pixels is None:
        return None
    given = {name: inputs[name] for name in ("image_sizes", "batch_num_images") if name in inputs}
    images = model.model.get_image_features(pixels, return_dict=True, **given)
    return torch.cat(list(images.pooler_output))


def _kept_positions(ids: Tensor, video_token: int, videos: list[CompressedVideo]) -> Tensor:
    """Text stays; of each video's placeholders the first ones stay, as many as it kept features."""
    placeholders = (ids == video_token).nonzero().flatten()
    if len(placeholders) != sum(v.placeholders for v in videos):
        raise ValueError(f"{len(placeholders)} video placeholders in a row, {len(videos)} videos for it")
    drop, start = [], 0
    for video in videos:
        run = placeholders[start : start + video.placeholders]
        drop += run[len(video.features) :].tolist()
        start += video.placeholders
    stay = torch.ones(len(ids), dtype=torch.bool)
    stay[drop] = False
    return stay.nonzero().flatten().to(ids.device)


def _cut_rows(model, inputs: dict, videos: list[CompressedVideo]) -> list[_Row]:
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    video_token, image_token = model.config.video_token_id, model.config.image_token_id
    images, images_used = _image_features(model, inputs), 0
    rows, waiting = [], list(videos)
    for row_ids, row_mask in zip(ids, mask, strict=True):
        mine, left = [], int((row_ids == video_token).sum())
        while left > 0 and waiting:
            mine.append(waiting.pop(0))
            left -= mine[-1].placeholders
        positions = _kept_positions(row_ids, video_token, mine)
        cut_ids = row_ids[positions]
        embeddings = model.get_input_embeddings()(cut_ids).clone()
        if mine:
            features = torch.cat([video.features for video in mine])
            embeddings[cut_ids == video_token] = features.to(embeddings.dtype)
        if images is not None:
            count = int((cut_ids == image_token).sum())
            span = images[images_used : images_used + count]
            embeddings[cut_ids == image_token] = span.to(embeddings.dtype)
            images_used += count
        video_of = torch.full_like(cut_ids, -1)
        numbers = [number for number, video in enumerate(mine) for _ in range(len(video.features))]
        video_of[cut_ids == video_token] = cut_ids.new_tensor(numbers)
        rows.append(_Row(positions, cut_ids, row_mask[positions], embeddings, video_of))
    if waiting:
        raise ValueError(f"{len(waiting)} of {len(videos)} videos have no placeholders")
    return rows


def _compress(model, inputs: dict, options: Options) -> tuple[list[CompressedVideo], list[_Row]]:
    pixels = inputs.get("pixel_values_videos")
    videos = [] if pixels is None else [_compress_video(model, video, options) for video in pixels]
    return videos, _cut_rows(model, inputs, videos)


def _pad_left(rows: Sequence[Tensor], value: float) -> Tensor:
    length = max(len(row) for row in rows)
    padded = [torch.cat([row.new_full((length - len(row), *row.shape[1:]), value), row]) for row in rows]
    return torch.stack(padded)


def _shifted_position_ids(position_ids: Tensor, rows: Sequence[_Row]) -> Tensor:
    """A kept position moves down by the number of positions dropped before it in its row, at most to 0."""
    shifted = []
    for given, row in zip(position_ids.expand(len(rows), -1), rows, strict=True):
        dropped_before = row.positions - torch.arange(len(row.positions), device=row.positions.device)
        shifted.append((given[row.positions] - dropped_before).clamp(min=0))
    return _pad_left(shifted, 0)


def _logits(model, embeddings: Tensor, **kwargs) -> Tensor:
    output = model.model.language_model(inputs_embeds=embeddings, use_cache=False, **kwargs)
    return model.lm_head(output.last_hidden_state)


# --- What the tests call --------------------------------------------------------------------------


@torch.no_grad()
def compressed_forward(model, inputs: dict, **options) -> OracleResult:
    """The logits of the compressed prompts of a batch. ``options``: the fields of Options, by name.

    Without ``position_ids`` in ``inputs``, positions count the cut and padded sequence, as the model does.
    """
    videos, rows = _compress(model, inputs, Options(**options))
    pad = model.config.text_config.pad_token_id or 0
    mask = _pad_left([row.attention_mask for row in rows], 0)
    given = {}
    if inputs.get("position_ids") is not None:
        given["position_ids"] = _shifted_position_ids(inputs["position_ids"], rows)
    embeddings = _pad_left([row.embeddings for row in rows], 0.0)
    return OracleResult(
        logits=_logits(model, embeddings, attention_mask=mask, **given),
        cut_input_ids=_pad_left([row.input_ids for row in rows], pad),
        cut_attention_mask=mask,
        frames_after=[video.frames_after for video in videos],
        kept=[video.kept for video in videos],
    )


@torch.no_grad()
def compressed_videos(model, inputs: dict, **options) -> list[CompressedVideo]:
    """What is left of each video. ``options``: the fields of Options, by name."""
    return _compress(model, inputs, Options(**options))[0]


@torch.no_grad()
def reduced_rows(model, inputs: dict, **options) -> list[Tensor]:
    """The logits ``[L', vocab]`` of each row of a batch alone, without its padding."""
    _, rows = _compress(model, inputs, Options(**options))
    masks = [row.attention_mask.bool() for row in rows]
    return [
        reduced_logits(model, row.embeddings[mask], row.video_of[mask].tolist(), options["steps"])
        for row, mask in zip(rows, masks, strict=True)
    ]


@torch.no_grad()
def compressed_generate(
    model,
    inputs: dict,
    max_new_tokens: int,
    *,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int = 0,
    **options,
) -> Tensor:
    """Greedy tokens int64 ``[R, new]``, prompt excluded: a row alone, unpadded, recomputed for every token.

    After one of ``eos_token_id`` a row goes on with ``pad_token_id``; it ends when all rows have ended.
    """
    stops = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
    steps = options.get("steps", ())
    _, rows = _compress(model, inputs, Options(**options))
    generated = [_continue_greedily(model, row, max_new_tokens, stops, steps) for row in rows]
    length = max(len(tokens) for tokens in generated)
    padded = [tokens + [pad_token_id] * (length - len(tokens)) for tokens in generated]
    return torch.tensor(padded, dtype=torch.int64, device=inputs["input_ids"].device)


def _continue_greedily(model, row: _Row, max_new_tokens: int, stops: set[int], steps: Sequence[Any]) -> list[int]:
    sequence = row.embeddings[row.attention_mask.bool()][None]
    video_of = row.video_of[row.attention_mask.bool()].tolist()
    tokens: list[int] = []
    while len(tokens) < max_new_tokens and not (tokens and tokens[-1] in stops):
        logits = reduced_logits(model, sequence[0], video_of, steps) if steps else _logits(model, sequence)[0]
        tokens.append(int(logits[-1].argmax()))
        following = torch.tensor([[tokens[-1]]], device=sequence.device)
        sequence = torch.cat([sequence, model.get_input_embeddings()(following)], dim=1)
    return tokens
