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
from ...errors import EarlyTomCompileError
from ...families.base import Family, Video
from ..video_encoder import EncodedVideo
from .options import Options, of_server
from .processing import FIELD, options_of_videos
from .tower import VideoPath

logger = init_logger("vllm.earlytom")


class ServesCompressed:
    """For a model of vLLM's, named before it among the bases."""

    family: Family
    one_size: bool = True
    """Whether frames of all videos have one size. Else code compiled before the first of them comes is of no use."""

    def __new__(cls, *, vllm_config: Any, prefix: str = "") -> Any:
        if of_server(vllm_config.model_config.get_multimodal_config().mm_processor_kwargs) is None:
            own = cls.__mro__[cls.__mro__.index(ServesCompressed) + 1]
            return own(vllm_config=vllm_config, prefix=prefix)
        return super().__new__(cls)

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        multimodal = vllm_config.model_config.get_multimodal_config()
        if multimodal.is_multimodal_pruning_enabled():
            raise ValueError(
                f"--video-pruning-rate {multimodal.video_pruning_rate} and --mm-processor-kwargs 'earlytom' both leave "
                "tokens of videos out. Choose one."
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        options = of_server(multimodal.mm_processor_kwargs)
        self._video_path: VideoPath | None = None
        if get_pp_group().is_first_rank:  # the others get no embeddings
            eager = vllm_config.model_config.enforce_eager
            self._video_path = VideoPath(vllm_config.model_config.hf_config, self.family, eager=eager)
        logger.info("Videos are compressed inside the %s vision encoder: %s", self.family.name, options)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """vLLM's own, and those of the video path."""
        path = self._video_path
        loaded = super().load_weights(weights if path is None else path.taking(weights))  # type: ignore[misc]
        if path is not None:
            path.require_all()
            self._try_one(path)
        return loaded

    def _try_one(self, path: VideoPath) -> None:
        """Compile before the first request comes, and tell a server that cannot compress before it starts."""
        options = of_server(self.multimodal_config.mm_processor_kwargs)  # type: ignore[attr-defined]
        assert options is not None
        if not self.one_size:
            options = {**options, "lowering": "eager"}
        start = time.perf_counter()
        path.encode(path.videos(self.some_video(path))[0], options)
        logger.info("Compiling the vision encoder for compressed videos took %.1f s", time.perf_counter() - start)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Rows [K, C] of each video or image of a call, which are all of one kind."""
        options = kwargs.pop(FIELD, None)
        if options is None or kwargs.get("pixel_values_videos") is None:
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        return self._embed_videos(kwargs, options_of_videos(options))

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

    def some_video(self, path: VideoPath) -> dict[str, Any]:
        """Arguments of a call with one video of a usual size, of whatever content."""
        raise NotImplementedError

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
