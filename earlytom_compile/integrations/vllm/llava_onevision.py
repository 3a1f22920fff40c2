"""LLaVA-OneVision in vLLM: K tokens and a newline a video."""

from collections.abc import Mapping
from typing import Any

from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from ...config import EarlyTomConfig
from ...errors import EarlyTomConfigError
from ...families.base import Video
from ...families.llava_onevision import LlavaOnevision
from .models import ServesCompressed
from .processing import PlansCompressed, ProcessesCompressed

_FAMILY = LlavaOnevision()


class Info(PlansCompressed, LlavaOnevisionProcessingInfo):
    """How many tokens a video has."""

    family = _FAMILY

    def tokens_of(self, config: EarlyTomConfig | None, frames: int) -> int:
        """K + 1, the newline; with no ``config`` all of them."""
        a_frame = self._get_num_frame_tokens(image_width=0, image_height=0)  # all are brought to one size
        return (frames * a_frame if config is None else config.token_budget(frames, a_frame)) + 1

    def get_num_video_tokens(self, *, image_width: int, image_height: int, num_frames: int) -> int:
        """Under the options of the server; vLLM sizes its encoder's budget and its profile by it."""
        return self.tokens_of(self.server_config, num_frames)


class Processor(ProcessesCompressed, LlavaOnevisionMultiModalProcessor):
    """Where they go in the prompt."""

    def video_placeholders(self, config: EarlyTomConfig | None, item: Mapping[str, Any]) -> list[int]:
        """One after the other.

        Raises :class:`EarlyTomConfigError` for frames of another size, which are the end of a worker."""
        hf_config, frames = self.info.get_hf_config(), item["pixel_values_videos"]
        side, size = hf_config.vision_config.image_size, tuple(frames.shape[-2:])
        if size != (side, side):
            raise EarlyTomConfigError(
                f"frames of {size[0]}x{size[1]} pixels: the vision tower of this model takes {side}x{side}. Leave "
                "size, do_resize and the like out of mm_processor_kwargs."
            )
        return [hf_config.video_token_index] * self.info.tokens_of(config, len(frames))


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=LlavaOnevisionDummyInputsBuilder)
class EarlyTomLlavaOnevision(ServesCompressed, LlavaOnevisionForConditionalGeneration):
    """vLLM's LLaVA-OneVision, whose videos go the compressed path and whose images go their own."""

    family = _FAMILY

    def call_of(self, kwargs: dict[str, Any], index: int) -> dict[str, Any]:
        """[1, F, 3, H, W]."""
        return {"pixel_values_videos": kwargs["pixel_values_videos"][index].unsqueeze(0)}

    def planned_shape(self, video: Video, config: EarlyTomConfig) -> tuple[int, int]:
        """[K + 1, C]."""
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        return config.token_budget(len(video.pixels), ((side + 1) // 2) ** 2) + 1, self.config.text_config.hidden_size
