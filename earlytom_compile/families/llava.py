"""LLaVA's own models, of the repository LLaVA-NeXT: LLaVA-OneVision and LLaVA-Video with Qwen2 and SigLIP.

    images=[video [F, 3, H, W], image [n, 3, H, W], ...], modalities=["video", "image", ...]
 -> get_2dPool(encode_images(video))    # [F, P, C], compressed: [K, C]
 -> newlines between the rows that stay # by config.mm_newline_position
 -> prepare_inputs_labels_for_multimodal(ids, ..., images)   # the model's own, which finds the rows ready

One placeholder (-200) in the ids for each entry of ``images``; ``generate()`` returns the new tokens alone.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EarlyTomConfigError
from .base import Call, Family, Prompt, Reason, Video

ARCHITECTURE = "LlavaQwenForCausalLM"
"""As config.json of a checkpoint says."""
PLACEHOLDER = -200
"""The id that stands for each of ``images``."""
_SPLICE = "prepare_inputs_labels_for_multimodal"
_NONE = torch.empty(1)  # to the model's own code, pictures that are to be encoded, which they are
_POOLS = ("average", "bilinear", "max")
_POSITIONS = ("one_token", "no_token", "frame", "grid")


class Llava(Family):
    """``LlavaQwenForCausalLM``."""

    name = "LLaVA"
    classes = (f"llava.model.language_model.llava_qwen.{ARCHITECTURE}",)
    requires: Mapping[str, str] = {"transformers": ">=4.46,<4.56"}  # what its own code runs on
    names = {"pixel_values_videos": "images"}
    generation = "transformers"
    prompt_method = _SPLICE

    # --- The model ------------------------------------------------------------------------------------

    def vision_tower(self, model: Any) -> nn.Module:
        """A SigLIP without its last layer."""
        return model.get_vision_tower()

    def language_model(self, model: Any) -> nn.Module:
        """A Qwen2, which has the vision tower among its modules."""
        return model.get_model()

    def vision_within(self, model: Any) -> Sequence[nn.Module]:
        """The tower and the projector, which are the Qwen2's."""
        return model.get_vision_tower(), model.get_model().mm_projector

    def encoder_layers(self, config: Any) -> int | None:
        """The configuration does not say; the tower is loaded from elsewhere."""
        return None

    # --- The videos of a call -------------------------------------------------------------------------

    def by_our_names(self, arguments: Call) -> dict[str, Any]:
        """The videos among ``images``; ``images`` stay, with what else they have."""
        call = dict(arguments)
        if videos := _videos_among(call):
            given = [call["images"][place] for place in videos]
            # One frame may come without an axis of frames.
            call["pixel_values_videos"] = [x[None] if isinstance(x, Tensor) and x.dim() == 3 else x for x in given]
        elif _is_flat_video(call):
            call["pixel_values_videos"] = [call["images"]]
        return call

    def by_its_own_names(self, call: Call) -> dict[str, Any]:
        """The way back."""
        return {name: value for name, value in call.items() if name != "pixel_values_videos"}

    def frame_shape(self, model: Any) -> tuple[int, int, int]:
        """The size of the tower."""
        side = model.get_vision_tower().image_size
        return 3, side, side

    def videos(self, model: Any, call: Call) -> list[Video]:
        """On the device of the tower, which brings them there itself. Raises for another dtype than the model's, which
        it does not change."""
        videos, tower = super().videos(model, call), model.get_vision_tower()
        for video in videos:
            if video.pixels.dtype != model.dtype and not torch.is_autocast_enabled(tower.device.type):
                raise EarlyTomConfigError(
                    f"a video is {video.pixels.dtype} and the model {model.dtype}: give it video.to(model.dtype)."
                )
        if tower.device.type == "meta":  # offloaded: it is brought to the inputs
            return videos
        return [Video(video.pixels.to(tower.device)) for video in videos]

    def rows(self, model: Any, pixels: Tensor, **arguments: Any) -> Tensor:
        """[1, F*P, C], without newlines."""
        features = model.get_2dPool(model.encode_images(pixels.flatten(0, 1)))
        return features.reshape(1, -1, features.shape[-1])

    def separators(self, model: Any, kept: Tensor) -> Tensor | None:
        """Newlines where the model has them, behind each frame and image row that still has a token."""
        merge, position = _layout(model.config)
        if not merge.startswith("spatial") or position == "no_token":
            return None
        if position == "one_token":
            return kept.new_full((1,), len(kept) - 1) if "unpad" in merge else None
        lines = kept[:, 0]
        if position == "grid":
            side = tokens_a_row(model)
            lines = lines * side + kept[:, 1] // side
        return torch.cat((lines[1:] != lines[:-1], lines.new_ones(1, dtype=torch.bool))).nonzero()[:, 0]

    def separator(self, model: Any) -> Tensor:
        """``image_newline``."""
        return model.get_model().image_newline

    def other_rows(self, model: Any, ids: Tensor, call: Call) -> Iterable[tuple[int, Tensor]]:
        """(place among ``images``, rows) of each that is no video, by the model's own code."""
        images, sizes, videos = call["images"], call.get("image_sizes") or (), _videos_among(call)
        # One picture a call, which is all that the prompt has; a prompt of one token would be a step of decoding.
        alone = ids.new_tensor([[PLACEHOLDER, 0]])
        endless = copy.copy(model.config)
        endless.tokenizer_model_max_length = None
        known = next(kind for kind in type(model).__mro__ if f"{kind.__module__}.{kind.__qualname__}" in self.classes)
        for place in range(len(images)):
            if place not in videos:
                size = [sizes[place]] if place < len(sizes) else None
                picture = {"images": [images[place]], "image_sizes": size}
                # What a subclass does to its prompts is done to the whole of them, later.
                yield place, _splice(known, like(model, config=endless), alone, picture)[4][0, :-1]

    # --- The prompt -----------------------------------------------------------------------------------

    def video_token(self, model: Any) -> int:
        """That of all ``images``."""
        return PLACEHOLDER

    def prompt(
        self, model: Any, ids: Tensor, call: Call, rows: Sequence[Tensor], others: Sequence[tuple[int, Tensor]]
    ) -> Prompt:
        """By the model's own code, padding, labels and the longest prompt it takes included."""
        features = _in_order(call, rows, dict(others))
        ready = like(model, encode_images=lambda images: features)
        spliced = _splice(type(model), ready, ids, {**call, "images": _NONE})
        mask, embeds = spliced[2], spliced[4]
        return Prompt(spliced, embeds.shape[1], mask if len(ids) > 1 else None)

    def prompt_length(
        self, model: Any, ids: Tensor, call: Call, sizes: Sequence[int], others: Sequence[tuple[int, Tensor]]
    ) -> int:
        """By the model's own code, with zeros for videos."""
        row = torch.zeros(1, model.config.hidden_size, dtype=model.dtype, device=ids.device)
        videos = [row.expand(size, -1) for size in sizes]
        return self.prompt(model, ids, {**call, "labels": None}, videos, others).length

    def prompt_videos(
        self, model: Any, ids: Tensor, call: Call, sizes: Sequence[int], others: Sequence[tuple[int, Tensor]]
    ) -> Tensor:
        """By the model's own code, with rows that say whose they are: the number of their video in bits, a channel for
        each, of which NaN is a 1; no word has it."""
        pictures, numbers = dict(others), iter(range(1, len(sizes) + 1))
        lengths = _in_order(call, sizes, {place: len(rows) for place, rows in pictures.items()})
        said = [0 if place in pictures else next(numbers) for place in range(len(lengths))]
        # Of one placeholder too many the model's own code makes the last of them once more.
        lengths, said = [*lengths, lengths[-1]], [*said, said[-1] and said[-1] + 1]
        bits = torch.arange(max(said).bit_length())
        marks = torch.zeros(len(said), model.config.hidden_size, dtype=model.dtype)
        marks[:, : len(bits)].masked_fill_((torch.tensor(said)[:, None] >> bits & 1).bool(), torch.nan)
        rows = [mark.to(ids.device).expand(length, -1) for mark, length in zip(marks, lengths, strict=True)]
        ready = like(model, encode_images=lambda images: rows)
        embeds = _splice(type(model), ready, ids, {**call, "images": _NONE, "labels": None})[4]
        number = (embeds[..., : len(bits)].isnan().cpu() << bits).sum(-1)
        first = number.masked_fill(number == 0, len(said)).amin(1, keepdim=True)  # of each row
        return torch.where(number > 0, number - first, -1)

    # --- What does not work ---------------------------------------------------------------------------

    def reason_against(self, model: Any, call: Call) -> Reason | None:
        """What the model's own code refuses, or does not do as its name says."""
        tower, config = model.get_vision_tower(), model.config
        if tower is None or not getattr(tower, "is_loaded", True):
            return "the vision tower is not loaded", "Call model.get_vision_tower().load_model() first"
        if getattr(config, "add_faster_video", False):
            return (
                "add_faster_video is a layout of slow and fast frames that the model's own generate() does not have",
                "Set model.config.add_faster_video = False, for what it does have",
            )
        if _is_flat_video(call):
            return (
                "images is one tensor [frames, 3, H, W], each of which is a picture to the model's own code",
                "Give a list: images=[video]",
            )
        merge, position = _layout(config)
        if merge != "flat" and not merge.startswith("spatial"):
            return f"mm_patch_merge_type={merge!r} is neither 'flat' nor 'spatial...'", "Set it in model.config"
        if position not in _POSITIONS:
            return f"mm_newline_position={position!r} is none of {', '.join(_POSITIONS)}", "Set it in model.config"
        needs_newline = merge.startswith("spatial") and position in ("frame", "grid")
        if needs_newline and not hasattr(model.get_model(), "image_newline"):
            return (
                f"mm_newline_position={position!r} needs a newline, which mm_patch_merge_type={merge!r} has not",
                "Take a checkpoint of 'spatial_unpad'",
            )
        mode = getattr(config, "mm_spatial_pool_mode", None)
        if mode not in _POOLS:
            return f"mm_spatial_pool_mode={mode!r} is none of {', '.join(_POOLS)}", "Set it in model.config"
        return None

    def refused_by_model(self, call: Call, *, forward: bool) -> bool:
        """A prompt of one token is a step of decoding to it, and its images are left out."""
        ids = call.get("input_ids", call.get("inputs"))
        return isinstance(ids, Tensor) and ids.dim() == 2 and ids.shape[1] == 1


def like(model: Any, **others: Any) -> Any:
    """An object that is ``model`` but for some attributes. The model, which other threads use, stays as it is."""
    twin = object.__new__(type(model))
    twin.__dict__.update(model.__dict__, **others)
    return twin


def _splice(kind: Any, model: Any, ids: Tensor, call: Call) -> tuple[Any, ...]:
    """(None, position ids, mask, cache, embeddings [R, S', C], labels) by the code of the class ``kind``."""
    return getattr(kind, _SPLICE)(
        model,
        ids,
        call.get("position_ids"),
        call.get("attention_mask"),
        call.get("past_key_values"),
        call.get("labels"),
        call["images"],
        _modalities(call),
        call.get("image_sizes"),
    )


def _modalities(call: Call) -> list[str]:
    given = call.get("modalities", ["image"])
    return [given] if isinstance(given, str) else given


def _videos_among(call: Call) -> list[int]:
    """The places in ``images`` that are videos; rows that were encoded before can be nothing else."""
    images, modalities = call.get("images"), _modalities(call)
    if not (isinstance(images, list) or (isinstance(images, Tensor) and images.dim() == 5)):
        return []  # one picture for each row of the prompt, or what the model's own code refuses
    said = [isinstance(modalities, list | tuple) and modality == "video" for modality in modalities or ()]
    said += [False] * (len(images) - len(said))
    encoded = [isinstance(image, Tensor) and image.dim() == 2 for image in images]
    return [place for place in range(len(images)) if said[place] or encoded[place]]


def _is_flat_video(call: Call) -> bool:
    """Whether ``images`` is a video alone, which the model's own code takes for a batch of pictures."""
    images = call.get("images")
    return isinstance(images, Tensor) and images.dim() == 4 and "video" in _modalities(call)


def _in_order(call: Call, videos: Sequence[Any], others: Mapping[int, Any]) -> list[Any]:
    """Of all ``images``: ``others`` by their places, and the videos between them."""
    rest = iter(videos)
    return [others[place] if place in others else next(rest) for place in range(len(call["images"]))]


def _layout(config: Any) -> tuple[str, str]:
    """(how rows are merged, where newlines go), with the defaults of the model's own code."""
    return getattr(config, "mm_patch_merge_type", "flat"), getattr(config, "mm_newline_position", "one_token")


def tokens_a_row(model: Any) -> int:
    """Of the pooled grid: bilinear pooling rounds up, the others down."""
    side = model.get_vision_tower().num_patches_per_side
    return (side + 1) // 2 if model.config.mm_spatial_pool_mode == "bilinear" else side // 2
