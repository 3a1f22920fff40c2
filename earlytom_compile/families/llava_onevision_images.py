"""Images of LLaVA-OneVision, for its processor's stand-in."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import EarlyTomConfigError


@dataclass(frozen=True)
class ImageProcessing:
    """Images to pixels and placeholders: transformers' own code, which needs Pillow and no torchvision."""

    checkpoint: str
    patches: int
    """Of the encoder's grid, as in ``num_image_tokens``."""
    token: str = "<image>"
    feature_strategy: str = "full"
    aspect_ratio: str = "anyres_max_9"

    def __call__(self, images: Any, **options: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
        """``images``: one, a list, or a list for each prompt; pictures of Pillow, arrays, paths or addresses.

        Returns the model's inputs, and for each image in reading order its placeholders."""
        try:
            from transformers.models.llava_onevision import image_processing_pil_llava_onevision as pillow
            from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

            processor: Any = pillow.LlavaOnevisionImageProcessorPil.from_pretrained(self.checkpoint)
        except ImportError as error:
            raise EarlyTomConfigError(f"images need Pillow: pip install pillow ({error}).") from error
        inputs = processor(processor.fetch_images(_without_paths(images)), return_tensors="pt", **options)
        # Its own constructor wants a video processor, which is what needs torchvision.
        counter: Any = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
        counter.image_processor, counter.image_token, counter.num_image_tokens = processor, self.token, self.patches
        counter.vision_feature_select_strategy, counter.vision_aspect_ratio = self.feature_strategy, self.aspect_ratio
        return inputs, [counter.replace_image_token(inputs, i) for i in range(len(inputs["image_sizes"]))]


def _without_paths(images: Any) -> Any:
    """The same with strings, which is all that transformers takes."""
    if isinstance(images, list | tuple):
        return [_without_paths(image) for image in images]
    return str(images) if isinstance(images, Path) else images
