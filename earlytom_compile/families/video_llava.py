"""Video-LLaVA of transformers: a CLIP tower for videos beside another for images, and nothing between its projector and
the prompt.

[<video> x F*P]      one run of placeholders a video: F frames of P = 1 + side^2 tokens, the class token first
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..integrations.tracing import prepare_transformers
from .base import Call, Family, Video, features_of
from .llava_onevision import LlavaOnevision

_IMAGE_PIXELS = ("pixel_values", "pixel_values_images")
_IMAGE_CHOICES = ("vision_feature_layer", "vision_feature_select_strategy")


class VideoLlava(LlavaOnevision):
    """``VideoLlavaForConditionalGeneration``, whose configuration is like LLaVA-OneVision's."""

    name = "Video-LLaVA"
    classes = ("transformers.models.video_llava.modeling_video_llava.VideoLlavaForConditionalGeneration",)
    requires = {"transformers": ">=5.17"}
    consumed = frozenset((*_IMAGE_PIXELS, *_IMAGE_CHOICES, "mm_encoder_outputs"))
    model_type = None

    def prepare(self) -> None:
        """As for LLaVA-OneVision."""
        prepare_transformers("transformers.models.video_llava.modeling_video_llava", "VideoLlavaModel")

    def vision_tower(self, model: Any) -> nn.Module:
        """The tower of videos; images have another, which is left alone."""
        return model.model.video_tower

    def videos(self, model: Any, call: Call) -> list[Video]:
        """Each with the layer that the caller chose; which tokens go on is a choice for images alone."""
        layer = call.get("vision_feature_layer")
        choices = {} if layer is None else {"vision_feature_layer": layer}
        return [Video(video.pixels, choices) for video in Family.videos(self, model, call)]

    def rows(self, model: Any, pixels: Tensor, **choices: Any) -> Tensor:
        """[F*P, C], each frame with its class token."""
        return model.model.get_video_features(pixels, return_dict=True, **choices).pooler_output.flatten(0, 1)

    def other_rows(self, model: Any, ids: Tensor, call: Call) -> Iterable[tuple[int, Tensor]]:
        """Images: encoded by the model's own code, or by the caller before."""
        encoded = features_of(call).get("image")
        pixels = next((call[name] for name in _IMAGE_PIXELS if call.get(name) is not None), None)
        if encoded is None and pixels is not None:
            given = {name: call[name] for name in _IMAGE_CHOICES if call.get(name) is not None}
            encoded = model.model.get_image_features(pixels, return_dict=True, **given)
        if encoded is not None:
            rows = encoded.pooler_output  # [images, tokens, C]
            like_embeddings = rows.new_empty(*ids.shape, rows.shape[-1])
            model.model.get_placeholder_mask(ids, inputs_embeds=like_embeddings, image_features=rows)  # checks them
            yield model.config.image_token_id, rows.flatten(0, 1)
