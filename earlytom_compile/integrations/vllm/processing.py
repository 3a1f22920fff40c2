"""Placeholders for K tokens a video, planned from its shape alone, and the options that travel with it to the workers.

    class Info(PlansCompressed, LlavaOnevisionProcessingInfo): ...                # how many tokens a video has
    class Processor(ProcessesCompressed, LlavaOnevisionMultiModalProcessor): ...  # where they go in the prompt

Both serve all calls of their model, and do as vLLM's own where videos are left uncompressed.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import VideoProcessorItems
from vllm.multimodal.processing import InputProcessingContext, PromptReplacement

from ...config import EarlyTomConfig
from ...errors import EarlyTomConfigError
from ...families.base import Family
from .options import FIELD, KEY, Options, config_of, of_request, of_server, packed
from .scheduling import charge_in_full

_LARGEST_PIXEL = 1e4  # far beyond what is normalised, or left at 0 to 255; norms stay far from overflow


class PlansCompressed:
    """For a ``ProcessingInfo`` of vLLM's: the options of the server, and the tokens of a video under them."""

    family: Family

    def __init__(self, ctx: InputProcessingContext) -> None:
        # transformers' processors are made and called with mm_processor_kwargs, and know nothing of ours.
        multimodal = copy.copy(ctx.get_mm_config())
        self.server_options = of_server(multimodal.mm_processor_kwargs)
        multimodal.mm_processor_kwargs = _without_ours(multimodal.mm_processor_kwargs or {})
        model_config = copy.copy(ctx.model_config)
        model_config.multimodal_config = multimodal
        if self.server_options is not None:
            charge_in_full()
        super().__init__(replace(ctx, model_config=model_config))  # type: ignore[call-arg]

    @cached_property
    def server_config(self) -> EarlyTomConfig | None:
        """The same as a whole; None where the server leaves videos uncompressed."""
        return None if self.server_options is None else self.config_of(self.server_options)

    def config_of(self, options: Options) -> EarlyTomConfig:
        """Options of a request as a whole, checked against the layers of this model's vision tower."""
        config = config_of(options, self.family, eager=False)
        if (layers := self.family.encoder_layers(self.get_hf_config())) is not None:  # type: ignore[attr-defined]
            config.require_layers(layers)
        return config


class ProcessesCompressed:
    """For a multimodal processor of vLLM's."""

    info: Any

    def video_placeholders(self, config: EarlyTomConfig | None, item: Mapping[str, Any]) -> Any:
        """What stands in the prompt for one video, of which ``item`` has the processed tensors: token ids, or vLLM's
        ``PromptUpdateDetails``; with no ``config`` for all of its tokens."""
        raise NotImplementedError

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Process the inputs of a request. Its options become part of the hash of its videos, by which vLLM caches
        their tensors, tokens and prefixes: those of the server, too, since caches may be shared between servers."""
        asked = inputs.hf_processor_mm_kwargs or {}
        options = of_request(self.info.server_options, asked)
        if options is not None:
            self.info.config_of(options)
            _require_frames(inputs.mm_data_items)
        kwargs = _without_ours(asked)
        if self.info.server_options is not None:
            kwargs[KEY] = options
        return super().apply(replace(inputs, hf_processor_mm_kwargs=kwargs), timing_ctx)  # type: ignore[misc]

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        processed = super()._apply_hf_processor_main(mm_items, _without_ours(hf_kwargs))  # type: ignore[misc]
        if KEY in hf_kwargs and "pixel_values_videos" in processed:
            if hf_kwargs[KEY] is not None:
                _require_usual_pixels(processed["pixel_values_videos"])
            processed[FIELD] = [packed(hf_kwargs[KEY])] * mm_items.get_count("video")
        return processed

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]) -> Any:
        fields = super()._get_mm_fields_config(hf_inputs, _without_ours(hf_processor_mm_kwargs))  # type: ignore[misc]
        return {**fields, FIELD: MultiModalFieldConfig.batched("video", keep_on_cpu=True)}

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any) -> Any:
        updates = super()._get_prompt_updates(  # type: ignore[misc]
            mm_items, _without_ours(hf_processor_mm_kwargs), out_mm_kwargs
        )
        if KEY not in hf_processor_mm_kwargs:
            return updates
        options = hf_processor_mm_kwargs[KEY]
        config = None if options is None else self.info.config_of(options)

        def placeholders(index: int) -> Any:
            item = {name: field.data for name, field in out_mm_kwargs["video"][index].items()}
            return self.video_placeholders(config if FIELD in item else None, item)  # rows given need no encoder

        return [
            PromptReplacement("video", update.target, placeholders) if update.modality == "video" else update
            for update in updates
        ]


def _require_frames(items: Mapping[str, Any]) -> None:
    """Raise :class:`EarlyTomConfigError` for a video without any: in the workers it would be the end of the server.

    Decoders of vLLM's give none of a damaged file, and OpenCV's none of a file that has one."""
    videos = items.get("video")
    if not isinstance(videos, VideoProcessorItems):
        return
    for index in range(len(videos)):
        if videos.get(index) is not None and videos.get_num_frames(index) == 0:  # None: known by its hash
            raise EarlyTomConfigError(
                f"video {index} of the request: vLLM's decoder read no frame of it. The file is damaged or has a "
                "single frame: send at least two, or one as an image."
            )


def _require_usual_pixels(videos: Any) -> None:
    """Raise :class:`EarlyTomConfigError` for pixels, one tensor or a list of them, that no image processor's own
    settings make: frames without a similarity to others would be the end of the server."""
    for pixels in [videos] if isinstance(videos, Tensor) else videos:
        least, most = map(float, pixels.aminmax())  # NaN if any is
        if not -_LARGEST_PIXEL <= least <= most <= _LARGEST_PIXEL:
            raise EarlyTomConfigError(
                f"the pixels of a video go from {least:g} to {most:g}, and a video that is compressed may have those "
                f"between {-_LARGEST_PIXEL:g} and {_LARGEST_PIXEL:g}. Look at the video, and at rescale_factor, "
                "image_std and the like in mm_processor_kwargs."
            )


def _without_ours(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != KEY}
