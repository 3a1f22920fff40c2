"""Qwen2.5-VL in vLLM: one run of placeholders a video."""

from collections.abc import Mapping
from typing import Any

from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from ...config import EarlyTomConfig
from ...families.qwen_vl import Qwen2_5_VL
from .processing import PlansCompressed, ProcessesCompressed
from .qwen_vl import ServesPlaces, planned, require_patches, require_positions

_FAMILY = Qwen2_5_VL()


class Info(PlansCompressed, Qwen2_5_VLProcessingInfo):
    """vLLM's numbers of tokens stay, the most that a video can have: a request may ask for all of them."""

    family = _FAMILY


class Processor(ProcessesCompressed, Qwen2_5_VLMultiModalProcessor):
    """Where they go in the prompt."""

    def video_placeholders(self, config: EarlyTomConfig | None, item: Mapping[str, Any]) -> list[int]:
        """One after the other."""
        hf_config, grid = self.info.get_hf_config(), item["video_grid_thw"]
        whole, vision = _whole(hf_config, grid), hf_config.vision_config
        if config is None:
            return whole
        require_patches(item, hf_config)
        seconds = float(item.get("second_per_grid_ts", 1.0))
        require_positions(int(grid[0] * seconds * vision.tokens_per_second), hf_config)
        return planned(whole, hf_config.video_token_id, config, grid, vision.spatial_merge_size)


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=Qwen2_5_VLDummyInputsBuilder)
class EarlyTomQwen2_5_VL(ServesPlaces, Qwen2_5_VLForConditionalGeneration):
    """vLLM's Qwen2.5-VL, whose videos go the compressed path and whose images go their own."""

    family = _FAMILY

    def whole_ids(self, item: Mapping[str, Any]) -> list[int]:
        """One run."""
        return _whole(self.config, item["video_grid_thw"].data)


def _whole(hf_config: Any, grid: Any) -> list[int]:
    return [hf_config.video_token_id] * (int(grid.prod()) // hf_config.vision_config.spatial_merge_size**2)
