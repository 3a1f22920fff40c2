"""A model of vLLM's with a compressed video path in the place of its own.

    class EarlyTomLlavaOnevision(ServesCompressed, LlavaOnevisionForConditionalGeneration): ...

Where the server was not asked to compress, calling the class gives an instance of vLLM's own.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_pp_group, get_tp_group
from vllm.logger import init_logger

from ...config import EarlyTomConfig
from ...errors import EarlyTomCompileError, EarlyTomConfigError
from ...families.base import Family, Video
from ..video_encoder import EncodedVideo
from .options import FIELD, Options, of_server, unpacked
from .tower import VideoPath

logger = init_logger("vllm.earlytom")


class ServesCompressed:
    """For a model of vLLM's, named before it among the bases."""

    family: Family
    one_size: bool = True
    """Whether frames of all videos have one size. Else code compiled before the first of them comes is of no use."""

    def __new__(cls, *, vllm_config: Any, prefix: str = "") -> Any:
        multimodal = vllm_config.model_config.get_multimodal_config()
        if of_server(multimodal.mm_processor_kwargs) is None or not multimodal.get_limit_per_prompt("video"):
            own = cls.__mro__[cls.__mro__.index(ServesCompressed) + 1]
            return own(vllm_config=vllm_config, prefix=prefix)
        return super().__new__(cls)

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        for flag, (given, why) in self.not_done(vllm_config).items():
            if given:
                raise EarlyTomConfigError(
                    f"{flag} together with --mm-processor-kwargs 'earlytom': {why}. Start the server with one of them."
                )
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._video_path: VideoPath | None = None
        if get_pp_group().is_first_rank:  # the others get no embeddings
            eager = vllm_config.model_config.enforce_eager
            self._video_path = VideoPath(vllm_config.model_config.hf_config, self.family, eager=eager)
        self._options = of_server(vllm_config.model_config.get_multimodal_config().mm_processor_kwargs)
        self._has_random_weights = vllm_config.load_config.load_format == "dummy"
        self.forward = self._first_forward
        logger.info("Videos are compressed inside the %s vision encoder: %s", self.family.name, self._options)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """vLLM's own, and those of the video path."""
        path = self._video_path
        loaded = super().load_weights(weights if path is None else path.taking(weights))  # type: ignore[misc]
        if path is not None:
            path.require_all()
            if path.eager:  # then vLLM warms nothing up on a CPU
                self._compress_one(path)
        return loaded

    def _first_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compile before the first request comes. vLLM warms its models up by a forward() in the very state that
        requests meet: threads, modes and default dtype, for each of which Dynamo would trace anew."""
        del self.forward
        if (path := self._video_path) is not None:
            if not self._has_random_weights:
                path.require_all()  # once more: not all of vLLM's loaders call load_weights()
            if not path.eager:
                self._compress_one(path)
        return self.forward(*args, **kwargs)

    def _compress_one(self, path: VideoPath) -> None:
        """Raise now, before the server starts, where videos cannot be compressed."""
        assert self._options is not None
        start = time.perf_counter()
        options = self._options if self.one_size else {**self._options, "lowering": "eager"}
        path.encode(path.blank_video(self.some_frame_size()), options)
        logger.info("A video was compressed, compiling included, in %.1f s", time.perf_counter() - start)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Rows [K, C] of each video or image of a call, which are all of one kind."""
        options = kwargs.pop(FIELD, None)
        if options is None or kwargs.get("pixel_values_videos") is None:
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        return self._embed_videos(kwargs, [unpacked(each) for each in options])

    def _embed_videos(self, kwargs: dict[str, Any], options: Sequence[Options | None]) -> list[Tensor]:
        """One at a time: a video's rows do not depend on its batch, and as many would take as much memory at once."""
        rows: list[Tensor] = []
        for index, chosen in enumerate(options):
            call = self.call_of(kwargs, index)
            if chosen is None:
                rows += super().embed_multimodal(**call)  # type: ignore[misc]
                continue
            rows.append(self.in_prompt(self._from_one_rank(index, self.video_of(call), chosen), call))
        return rows

    def _from_one_rank(self, index: int, video: Video, options: Options) -> Tensor:
        """The rows of a video, encoded by one tensor-parallel rank and handed to the others: they take turns, and all
        have the same bits, whatever kernels each of them has measured to be the fastest."""
        path, group = self._video_path, get_tp_group()
        assert path is not None
        source, shape = index % group.world_size, self.planned_shape(video, path.config_of(options))
        if group.rank_in_group == source:
            rows = self.prompt_rows(path.encode(video, options), video)
            if rows.shape != shape:
                raise EarlyTomCompileError(
                    f"the video ({video.size or list(video.pixels.shape)}) has rows {list(rows.shape)} under "
                    f"{options}, where {list(shape)} were planned. Please report this with the video's shape."
                )
        else:
            rows = torch.empty(shape, dtype=path.dtype, device=path.device)
        return group.broadcast(rows.contiguous(), src=source)

    # --- What is special about a model ----------------------------------------------------------------

    def some_frame_size(self) -> tuple[int, int] | None:
        """Height and width of a small picture, where there are several."""
        return None

    def call_of(self, kwargs: dict[str, Any], index: int) -> dict[str, Any]:
        """The arguments of one video of a batch, as a batch of one."""
        raise NotImplementedError

    def video_of(self, call: Mapping[str, Any]) -> Video:
        """What :meth:`call_of` gives, as the video path takes it."""
        assert self._video_path is not None
        (video,) = self._video_path.videos(call)
        return video

    def planned_shape(self, video: Video, config: EarlyTomConfig) -> tuple[int, int]:
        """Of :meth:`prompt_rows`: as many as its placeholders were planned for."""
        raise NotImplementedError

    def prompt_rows(self, encoded: EncodedVideo, video: Video) -> Tensor:
        """What one rank hands to the others of a video: its rows, and what else only that rank knows."""
        return encoded.rows

    def in_prompt(self, rows: Tensor, call: Mapping[str, Any]) -> Tensor:
        """:meth:`prompt_rows` of the video of a ``call`` -> rows as vLLM takes them, made by all ranks."""
        return rows

    @staticmethod
    def not_done(vllm_config: Any) -> dict[str, tuple[bool, str]]:
        """Flag -> whether it is given, and why videos cannot be compressed with it."""
        multimodal, lora = vllm_config.model_config.get_multimodal_config(), vllm_config.lora_config
        return {
            f"--video-pruning-rate {multimodal.video_pruning_rate}": (
                multimodal.is_multimodal_pruning_enabled(),
                "both leave tokens of videos out",
            ),
            "--ec-transfer-config": (
                vllm_config.ec_transfer_config is not None,
                "an encoder in a server of its own is not supported",
            ),
            "--enable-tower-connector-lora": (
                lora is not None and lora.enable_tower_connector_lora,
                "adapters of the vision tower would be left out of videos",
            ),
        }
