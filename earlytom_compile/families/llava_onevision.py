"""LLaVA-OneVision of transformers: a SigLIP tower, bilinear pooling, and one newline behind each video.

[<video> x (F*P + 1)]      one run of placeholders a video: F frames of P = ceil(side / 2)^2 tokens, the newline
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.tracing import prepare_transformers
from .base import Call, Family, Video, features_of

_FEATURE_CHOICES = ("vision_feature_layer", "vision_feature_select_strategy")
_IMAGES = ("pixel_values", "image_sizes", "vision_aspect_ratio", "batch_num_images", *_FEATURE_CHOICES)


class LlavaOnevision(Family):
    """``LlavaOnevisionForConditionalGeneration``."""

    name = "LLaVA-OneVision"
    classes = ("transformers.models.llava_onevision.modeling_llava_onevision.LlavaOnevisionForConditionalGeneration",)
    requires = {"transformers": ">=5.17"}
    consumed = frozenset((*_IMAGES, "image_sizes_videos", "mm_encoder_outputs"))
    model_type: str | None = "llava_onevision"
    checkpoint = "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"

    def prepare(self) -> None:
        """Its checks of placeholders and its hooks would break the graph."""
        prepare_transformers("transformers.models.llava_onevision.modeling_llava_onevision", "LlavaOnevisionModel")

    def language_model(self, model: Any) -> nn.Module:
        """A Qwen2, which takes ``inputs_embeds``."""
        return model.model.language_model

    def encoder_layers(self, config: Any) -> int | None:
        """Up to the one whose output the projector takes; None if it takes several."""
        total, taken = config.vision_config.num_hidden_layers, config.vision_feature_layer
        if not isinstance(taken, int):
            return None
        return taken if taken >= 0 else total + 1 + taken

    def frame_shape(self, model: Any) -> tuple[int, int, int]:
        """One size for all videos."""
        tower = model.config.vision_config
        return tower.num_channels, tower.image_size, tower.image_size

    def videos(self, model: Any, call: Call) -> list[Video]:
        """Each with the layer and tokens that the caller chose."""
        choices = {name: call[name] for name in _FEATURE_CHOICES if call.get(name) is not None}
        return [Video(video.pixels, choices) for video in super().videos(model, call)]

    def rows(self, model: Any, pixels: Tensor, **choices: Any) -> Tensor:
        """[1, F*P + 1, C], newline included."""
        inner = model.model
        rows = inner.get_video_features(pixels, return_dict=True, **choices).pooler_output
        side = model.config.vision_config.image_size // model.config.vision_config.patch_size
        if rows.shape[1] == pixels.shape[1] * ((side + 1) // 2) ** 2:
            # transformers 5.17 adds the newline in forward(), 5.23 in get_video_features().
            rows = torch.cat((rows, inner.image_newline[None, None, :].to(rows.device)), dim=1)
        return rows

    def other_rows(self, model: Any, ids: Tensor, call: Call) -> Iterable[tuple[int, Tensor]]:
        """Images: encoded by the model's own code, or by the caller before."""
        encoded = features_of(call).get("image")
        if encoded is None and call.get("pixel_values") is not None:
            given = {name: call[name] for name in _IMAGES if call.get(name) is not None}
            encoded = model.model.get_image_features(**given, return_dict=True)
        if encoded is not None:
            rows = torch.cat(list(encoded.pooler_output), dim=0)
            like_embeddings = rows.new_empty(*ids.shape, rows.shape[1])
            model.model.get_placeholder_mask(ids, inputs_embeds=like_embeddings, image_features=rows)  # checks them
            yield model.config.image_token_id, rows

    def processor(self, checkpoint: str) -> Any:
        """Text, videos and images."""
        from ..integrations.preprocess import VideoTextProcessor

        return VideoTextProcessor.from_pretrained(checkpoint)
