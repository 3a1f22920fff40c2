"""LLaVA-NeXT-Video of transformers: a CLIP tower, pooling before the projector, and nothing between the tokens.

[<video> x F*P]      one run of placeholders a video: F frames of P = (side / stride)^2 tokens
"""

from typing import Any

from torch import Tensor

from ..integrations.tracing import prepare_transformers
from .llava_onevision import LlavaOnevision


class LlavaNextVideo(LlavaOnevision):
    """``LlavaNextVideoForConditionalGeneration``, which is called as LLaVA-OneVision is."""

    name = "LLaVA-NeXT-Video"
    classes = ("transformers.models.llava_next_video.modeling_llava_next_video.LlavaNextVideoForConditionalGeneration",)
    requires = {"transformers": ">=5.21"}  # before, it splits a batch by a number of frames, which ties the graph to it
    model_type = None

    def prepare(self) -> None:
        """As for LLaVA-OneVision."""
        prepare_transformers("transformers.models.llava_next_video.modeling_llava_next_video", "LlavaNextVideoModel")

    def rows(self, model: Any, pixels: Tensor, **choices: Any) -> Tensor:
        """[1, F*P, C]."""
        return model.model.get_video_features(pixels, return_dict=True, **choices).pooler_output
