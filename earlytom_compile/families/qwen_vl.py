"""Qwen-VL of transformers: videos of any size, packed towers, positions of three axes, time stamps in the prompt.

Qwen2.5-VL       [start, <video> x T*P, end]                       one run of placeholders a video
Qwen3-VL, 3.5    [time, start, <video> x P, end] x T               one a frame, a temporal patch of two pictures

P = h*w/4 tokens a frame of h x w patches. What is kept stands where it stood: each token at the place, and with the
position (t, h, w), that it had in the whole prompt, those of merged frames at the first one's. Text behind the video
keeps the positions it would have had, and so does what is generated.
"""

import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import variant_of
from ..errors import EarlyTomConfigError
from ..integrations.placement import hooks_on
from ..integrations.tracing import prepare_deepstack, prepare_transformers
from ..prompt import Places, PromptCut, locate_pieces, without_waiting
from . import qwen_tower
from .base import Call, Family, Reason, Video, features_of

_IMAGES = ("pixel_values", "image_grid_thw")
_VIDEOS = ("video_grid_thw", "second_per_grid_ts", "mm_token_type_ids", "mm_encoder_outputs")


class QwenVL(Family):
    """What all of them share; rows are [T*P, C]."""

    consumed = frozenset((*_IMAGES, *_VIDEOS))
    keeps_places = True

    def vision_tower(self, model: Any) -> nn.Module:
        """The packed tower."""
        return model.model.visual

    def language_model(self, model: Any) -> nn.Module:
        """Takes ``inputs_embeds``, and positions [3 or 4, R, S]."""
        return model.model.language_model

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Frames merge under ``"plus"``, too: pixels are no pictures of which unchanged patches could be told."""
        merges = variant_of(given) == "plus" and given.get("reuse") is None
        return {**given, "reuse": False} if merges else dict(given)

    def encoder_layers(self, config: Any) -> int | None:
        """All of them count."""
        return config.vision_config.depth

    # --- Videos ---------------------------------------------------------------------------------------

    def videos(self, model: Any, call: Call) -> list[Video]:
        """Cut out of ``pixel_values_videos`` [T*h*w of all, C*2*p*p], by ``video_grid_thw`` [V, 3]."""
        pixels, grids = call["pixel_values_videos"], call.get("video_grid_thw")
        config = model.config.vision_config
        sizes = checked_grids(pixels, grids, config)
        patch = (config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
        parts = pixels.split([frames * height * width for frames, height, width in sizes])
        return [
            Video(
                part.view(frames, height * width, *patch),
                {"height": height, "width": width},
                self.tables(model, height, width, pixels.device),
                f"{height}x{width} patches",
            )
            for part, (frames, height, width) in zip(parts, sizes, strict=True)
        ]

    def blank_call(self, model: Any, frames: int, frame_size: tuple[int, int] | None = None) -> Call:
        """Patches [T*h*w, C*2*p*p] of pictures of any size that is whole blocks of patches."""
        config = model.config.vision_config
        block = config.patch_size * config.spatial_merge_size
        if frame_size is None or any(side < 1 or side % block for side in frame_size):
            raise EarlyTomConfigError(
                f"frame_size={frame_size}: {self.name} takes pictures of many sizes, so that height and width in "
                f"pixels must be given, multiples of {block}, such as {(6 * block, 10 * block)}."
            )
        grid = (-(-frames // config.temporal_patch_size), *(side // config.patch_size for side in frame_size))
        width = config.in_channels * config.temporal_patch_size * config.patch_size**2
        weights = next(self.vision_tower(model).parameters())
        pixels = weights.new_zeros((grid[0] * grid[1] * grid[2], width))
        return {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([grid], device=pixels.device)}

    def tables(self, model: Any, height: int, width: int, device: torch.device) -> dict[str, Tensor]:
        """What is the same for all frames of so many patches: float32 [S, d] ``cos`` and ``sin`` of their places."""
        visual = model.model.visual
        positions = without_waiting(qwen_tower.patch_positions(height, width, visual.spatial_merge_size), device)
        cos, sin = visual.rotary_pos_emb(torch.empty(0, device=device), positions)
        return {"cos": cos, "sin": sin}

    def token_grid(self, model: Any, video: Video) -> tuple[int, int] | None:
        """Blocks of patches."""
        block = model.config.vision_config.spatial_merge_size
        return video.arguments["height"] // block, video.arguments["width"] // block

    def rows(self, model: Any, pixels: Tensor, **arguments: Any) -> Tensor:
        """[T*P, C], of pixels [1, T, S, C, 2, p, p]; behind DeepStack [T*P, C * (1 + its layers)]."""
        return self.features(model.model.visual, pixels, **arguments).flatten(0, 1)

    def features(self, visual: Any, pixels: Tensor, **arguments: Any) -> Tensor:
        """The same as [T, P, C]."""
        raise NotImplementedError

    # --- The prompt -----------------------------------------------------------------------------------

    def other_rows(self, model: Any, ids: Tensor, call: Call) -> Iterable[tuple[int, Tensor]]:
        """Images, by the model's own code."""
        encoded = features_of(call).get("image")
        if encoded is None and call.get("pixel_values") is not None:
            encoded = model.model.get_image_features(call["pixel_values"], call.get("image_grid_thw"), return_dict=True)
        if encoded is not None:
            rows = torch.cat([torch.cat(list(part)) for part in _parts(encoded)], dim=-1)
            width = Family.row_width(self, model)
            like_embeddings, main = rows.new_empty(*ids.shape, width), rows[:, :width]
            model.model.get_placeholder_mask(ids, inputs_embeds=like_embeddings, image_features=main)  # checks them
            yield model.config.image_token_id, rows

    def position_ids(self, model: Any, call: Call, cut: PromptCut) -> Tensor | None:
        """[4, R, S']: the count of all positions, then those of three axes, of what stays of the prompt. Also tells the
        model where the text that is to come goes on."""
        ids, mask, given = call["input_ids"], call.get("attention_mask"), call.get("position_ids")
        if given is None:
            names = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
            told = {name: call[name] for name in names if call.get(name) is not None}
            given, _ = model.model.get_rope_index(ids, attention_mask=mask, **told)
        spatial = (given if given.dim() == 2 else given[-3:]).expand(3, *ids.shape)  # or of one row for all
        whole = torch.ones_like(ids) if mask is None else mask.ne(0).to(ids.dtype)
        last = spatial.masked_fill(whole == 0, 0).amax((0, 2))  # of what is gone, too
        spatial = torch.stack([cut.take(axis, 0) for axis in spatial])
        attended = cut.take(whole, 0)
        counted = (attended.cumsum(1) - 1).masked_fill(attended == 0, 0)
        model.model.rope_deltas = (last + 1 - attended.sum(1)).unsqueeze(1)
        return torch.cat((counted.unsqueeze(0), spatial))

    # --- What does not work ---------------------------------------------------------------------------

    def reason_against(self, model: Any, call: Call) -> Reason | None:
        """No kinds of a prompt's tokens, by which the model counts positions; hooks on modules that are only opened."""
        has_prompt = any(call.get(name) is not None for name in ("input_ids", "inputs"))
        if has_prompt and call.get("mm_token_type_ids") is None and call.get("position_ids") is None:
            return (
                "mm_token_type_ids are missing, without which the positions of the video's tokens are not known",
                "Pass those of the processor",
            )
        is_encoded = not isinstance(call.get("pixel_values_videos"), Tensor)  # else it is an error that names it
        if has_prompt and is_encoded and call.get("video_grid_thw") is None and call.get("position_ids") is None:
            return "video_grid_thw is missing, the frames, rows and columns of each video", "Pass that of the processor"
        for module in qwen_tower.bypassed(model.model.visual):
            if _is_changed(module):
                name = next(name for name, each in model.named_modules() if each is module)
                return (
                    f"{name} has a hook or a forward() of its own, and the compressed path calls what is inside it",
                    "Take it off, or put it on the layers inside",
                )
        return None


class Qwen2_5_VL(QwenVL):
    """``Qwen2_5_VLForConditionalGeneration``: attention in windows but for a few layers."""

    name = "Qwen2.5-VL"
    classes = ("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLForConditionalGeneration",)
    requires = {"transformers": ">=5.17"}
    model_type = "qwen2_5_vl"
    checkpoint = "Qwen/Qwen2.5-VL-7B-Instruct"

    def prepare(self) -> None:
        """Its hooks would break the graph of a prompt."""
        prepare_transformers("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl", "Qwen2_5_VLTextModel")

    def features(self, visual: Any, pixels: Tensor, **arguments: Any) -> Tensor:
        """Blocks of patches go through the layers sorted by window, and back behind the merger."""
        height, width = (arguments[name] // visual.spatial_merge_size for name in ("height", "width"))
        unit = visual.spatial_merge_unit
        side = visual.window_size // visual.spatial_merge_size // visual.patch_size
        windows = [n * unit if i % 2 else n for i, n in enumerate(qwen_tower.window_sizes(height, width, side))]
        order = qwen_tower.window_order(height, width, side, pixels.device)
        places = (order[:, None] * unit + torch.arange(unit, device=pixels.device)).flatten()
        hidden = qwen_tower.embedded(visual, pixels)[:, places]
        cos, sin = arguments["cos"][places], arguments["sin"][places]
        full = tuple(visual.fullatt_block_indexes)
        last = qwen_tower.through_blocks(visual, hidden, cos, sin, windows, full)[-1]
        return qwen_tower.gated_merger(visual.merger, last)[:, order.argsort()]


class Qwen3_VL(QwenVL):
    """``Qwen3VLForConditionalGeneration``: what leaves some earlier layers reaches the language model too."""

    name = "Qwen3-VL"
    classes: tuple[str, ...] = (
        "transformers.models.qwen3_vl.modeling_qwen3_vl.Qwen3VLForConditionalGeneration",
        "transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration",
    )
    requires: Mapping[str, str] = {"transformers": ">=5.18"}  # before, features cannot be handed to generate()
    model_type = "qwen3_vl"
    checkpoint = "Qwen/Qwen3-VL-8B-Instruct"

    def prepare(self) -> None:
        """Its hooks, and the sums of DeepStack, would break the graph of a prompt."""
        for modeling, text in (("qwen3_vl", "Qwen3VLTextModel"), ("qwen3_vl_moe", "Qwen3VLMoeTextModel")):
            name = f"transformers.models.{modeling}.modeling_{modeling}"
            prepare_transformers(name, text)
            prepare_deepstack(name, text)

    def row_width(self, model: Any) -> int:
        """Those of the last layer and of each that DeepStack takes."""
        visual = model.model.visual
        return int(visual.config.out_hidden_size) * (1 + len(getattr(visual, "deepstack_visual_indexes", ())))

    def tables(self, model: Any, height: int, width: int, device: torch.device) -> dict[str, Tensor]:
        """Also which learned positions each place lies between, int64 [S, 4], and how near, float32 [S, 4]."""
        visual = model.model.visual
        utils = importlib.import_module("transformers.vision_utils")
        indices, weights = utils.get_vision_interpolation_indices_and_weights(
            torch.tensor([[1, height, width]]),
            num_grid_per_side=visual.num_grid_per_side,
            mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners,
            spatial_merge_size=visual.spatial_merge_size,
        )
        tables = super().tables(model, height, width, device)
        between, nearness = (without_waiting(table, device) for table in (indices, weights))
        return {**tables, "between": between, "nearness": nearness}

    def features(self, visual: Any, pixels: Tensor, **arguments: Any) -> Tensor:
        """The last layer's tokens, and beside them those that DeepStack takes of earlier ones."""
        between, nearness = arguments["between"], arguments["nearness"]
        hidden = qwen_tower.embedded(visual, pixels)
        hidden = hidden + (visual.pos_embed(between) * nearness[:, :, None]).sum(1).to(hidden.dtype)
        outputs = qwen_tower.through_blocks(visual, hidden, arguments["cos"], arguments["sin"], [], ())
        last = qwen_tower.merger(visual.merger, outputs[-1])
        layers = getattr(visual, "deepstack_visual_indexes", ())
        earlier = [qwen_tower.merger(visual.deepstack_merger_list[i], outputs[n]) for i, n in enumerate(layers)]
        return torch.cat((last, *earlier), dim=-1) if earlier else last

    def places(self, model: Any, ids: Tensor, sizes: Sequence[int]) -> Places:
        """A run for each frame."""
        return locate_pieces(ids, self.video_token(model), sizes)

    def inputs(self, model: Any, ids: Tensor, rows: Sequence[tuple[int, Tensor]]) -> dict[str, Any]:
        """Features of images and videos, since DeepStack adds to layers of the language model."""
        width = model.config.vision_config.out_hidden_size
        kinds = {model.config.image_token_id: "image", self.video_token(model): "video"}
        output = getattr(importlib.import_module(type(model).__module__), "BaseModelOutputWithDeepstackFeatures", None)
        assert output is not None
        outputs = {}
        for token, each in rows:
            # One entry for each row of the prompt, by which generate() repeats them for beams.
            counts = [count for count in (ids == token).sum(1).tolist() if count]
            first, *deep = (part.split(counts) for part in each.split(width, dim=-1))
            outputs[kinds[token]] = output(pooler_output=first, deepstack_features=deep)
        return {"input_ids": ids, "mm_encoder_outputs": outputs}


class Qwen3_5(Qwen3_VL):
    """``Qwen3_5ForConditionalGeneration``: Qwen3-VL's tower without DeepStack, linear attention in the language
    model."""

    name = "Qwen3.5"
    classes = (
        "transformers.models.qwen3_5.modeling_qwen3_5.Qwen3_5ForConditionalGeneration",
        "transformers.models.qwen3_5_moe.modeling_qwen3_5_moe.Qwen3_5MoeForConditionalGeneration",
    )
    requires = {"transformers": ">=5.17"}
    model_type = "qwen3_5"
    checkpoint = "Qwen/Qwen3.5-9B"

    def prepare(self) -> None:
        """Its hooks would break the graph of a prompt."""
        for modeling, text in (("qwen3_5", "Qwen3_5TextModel"), ("qwen3_5_moe", "Qwen3_5MoeTextModel")):
            prepare_transformers(f"transformers.models.{modeling}.modeling_{modeling}", text)

    def inputs(self, model: Any, ids: Tensor, rows: Sequence[tuple[int, Tensor]]) -> dict[str, Any]:
        """Embeddings."""
        return Family.inputs(self, model, ids, rows)


def _parts(encoded: Any) -> list[Any]:
    """What the tower gave of each image: the last layer's, then those of DeepStack."""
    return [encoded.pooler_output, *(getattr(encoded, "deepstack_features", None) or ())]


def _is_changed(module: nn.Module) -> bool:
    """Whether something hangs on a module that its own ``forward`` would run, transformers' and accelerate's aside."""
    of_accelerate = "_hf_hook" in module.__dict__  # which replaces forward()
    return any(place is not None and (on.is_hook or not of_accelerate) for place, on in hooks_on([module]))


def checked_grids(pixels: Tensor, grids: Any, config: Any) -> list[tuple[int, int, int]]:
    """(T, h, w) of each video; :class:`EarlyTomConfigError` where pixels and grids do not fit."""
    block = config.spatial_merge_size
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    rows: Any = grids.tolist() if isinstance(grids, Tensor) and grids.dim() == 2 and grids.shape[1] == 3 else None
    total = sum(frames * height * across for frames, height, across in rows) if rows else None
    odd = any(min(row) < 1 or row[1] % block or row[2] % block for row in rows or ())
    if pixels.dim() != 2 or pixels.shape[1] != width or total != len(pixels) or odd:
        raise EarlyTomConfigError(
            f"pixel_values_videos have shape {tuple(pixels.shape)} and video_grid_thw is {rows}; they must be "
            f"[patches of all videos, {width}] and, for each video, (temporal patches, rows, columns) that multiply "
            f"to its patches, rows and columns multiples of {block}. Pass both as the model's processor made them."
        )
    return [(frames, height, across) for frames, height, across in rows]
