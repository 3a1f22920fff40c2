"""Qwen3-VL in vLLM: time stamps and placeholders of all frames of a video are one range of placeholders."""

from collections.abc import Mapping
from typing import Any

from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeProcessingInfo
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import PromptUpdateDetails

from ...config import EarlyTomConfig
from ...families.qwen_vl import Qwen3_VL
from .processing import PlansCompressed, ProcessesCompressed
from .qwen_vl import ServesPlaces, planned, require_patches, require_positions

_FAMILY = Qwen3_VL()


class PlansStamps(PlansCompressed):
    """vLLM's numbers of tokens stay, the most that a video can have: a request may ask for all of them."""

    def get_max_video_tokens(self, seq_len: int, mm_counts: Mapping[str, int]) -> int:
        """Also the rows of time stamps, which those of vLLM's own videos do not count."""
        most = super().get_max_video_tokens(seq_len, mm_counts)  # type: ignore[misc]
        if self.server_options is None:
            return most
        processor = self.get_video_processor()  # type: ignore[attr-defined]
        stamp = self.get_tokenizer().encode("<99999.9 seconds>", add_special_tokens=False)  # type: ignore[attr-defined]
        return most + -(-processor.max_frames // processor.temporal_patch_size) * (len(stamp) + 2)


class Info(PlansStamps, Qwen3VLProcessingInfo):
    """Of Qwen3-VL."""

    family = _FAMILY


class InfoMoe(PlansStamps, Qwen3VLMoeProcessingInfo):
    """Of its twin with experts."""

    family = _FAMILY


class Processor(ProcessesCompressed, Qwen3VLMultiModalProcessor):
    """Where they go in the prompt."""

    def video_placeholders(self, config: EarlyTomConfig | None, item: Mapping[str, Any]) -> PromptUpdateDetails:
        """All of one that is compressed gets rows, its text too."""
        hf_config, grid = self.info.get_hf_config(), item["video_grid_thw"]
        whole = _whole(hf_config, self.info.get_tokenizer(), grid, item["timestamps"])
        token, block = hf_config.video_token_id, hf_config.vision_config.spatial_merge_size
        if config is None:
            return PromptUpdateDetails.select_token_id(whole, token)
        require_patches(item, hf_config)
        text = sum(each != token for each in whole)
        require_positions(text + int(grid[0] * grid[1:].max()) // block, hf_config)
        return PromptUpdateDetails.from_seq(planned(whole, token, config, grid, block))


class ServesStamps(ServesPlaces):
    """For a model of vLLM's with time stamps."""

    _tokenizer: Any

    def whole_ids(self, item: Mapping[str, Any]) -> list[int]:
        """A run for each frame, behind its time stamp."""
        return _whole(self.config, self._tokenizer, item["video_grid_thw"].data, item["timestamps"].data)


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=Qwen3VLDummyInputsBuilder)
class EarlyTomQwen3_VL(ServesStamps, Qwen3VLForConditionalGeneration):
    """vLLM's Qwen3-VL, whose videos go the compressed path and whose images go their own."""

    family = _FAMILY


@MULTIMODAL_REGISTRY.register_processor(Processor, info=InfoMoe, dummy_inputs=Qwen3VLDummyInputsBuilder)
class EarlyTomQwen3_VLMoe(ServesStamps, Qwen3VLMoeForConditionalGeneration):
    """The same of the twin with experts."""

    family = _FAMILY


def _whole(hf_config: Any, tokenizer: Any, grid: Any, timestamps: Any) -> list[int]:
    frames, height, width = grid.tolist()
    tokens = height * width // hf_config.vision_config.spatial_merge_size**2
    return Qwen3VLMultiModalProcessor.get_video_repl(
        tokens_per_frame=[tokens] * frames,
        timestamps=timestamps,
        tokenizer=tokenizer,
        vision_start_token_id=hf_config.vision_start_token_id,
        vision_end_token_id=hf_config.vision_end_token_id,
        video_token_id=hf_config.video_token_id,
    ).full
