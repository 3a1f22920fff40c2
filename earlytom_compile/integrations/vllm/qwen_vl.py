"""What the models of Qwen share in vLLM: places and positions of what is kept, known when a video has been encoded.

    whole prompt     5 6 [time start v v v v end] [time start v v v v end] 7        position of each: (t, h, w)
    as planned       5 6 [v v v] [time start end] [time start end] 7                K = 3, one range of placeholders
    as it reaches    5 6 [time start v end] [time start v v end] 7                  each with the position it had above
    the layers

The text of a video belongs to its rows, since how many of them stand behind each time stamp depends on what is in the
video. Positions of all else depend on sizes alone, and are right from the start, as is where the answer goes on. Rows
of a video get that of its start, and bring the rest of it in channels of their own; those of a step are added to the
positions before the language model reads them, as DeepStack's features of a step wait in a buffer until then. Nothing
is kept of a request, so it may be cut into chunks, preempted, and its prompt be cached.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.multimodal.inputs import (
    MultiModalFeatureSpec,
    MultiModalFieldConfig,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)

from ...config import EarlyTomConfig
from ...errors import EarlyTomConfigError
from ...families.base import Video
from ...families.qwen_vl import checked_grids
from ..video_encoder import EncodedVideo
from .models import ServesCompressed
from .options import FIELD, unpacked

DIGITS = 3
"""Channels of a number, to the base of 256: bfloat16 is exact up to there."""
CHANNELS = 3 * DIGITS
"""Behind a row: its position (t, h, w) from the start of its video on."""
_WITHOUT_A_MODEL = ("ngram", "ngram_gpu", "suffix")
_OF_A_VIDEO = ("video_grid_thw", "second_per_grid_ts", "timestamps")


def planned(whole: Sequence[int], token: int, config: EarlyTomConfig, grid: Tensor, block: int) -> list[int]:
    """Token ids of a video [K + its text] as planned: of the ``whole`` one's, K of ``token`` and then the text."""
    frames, height, width = grid.tolist()
    rows = config.token_budget(frames, height * width // block**2)
    return [token] * rows + [each for each in whole if each != token]


def require_patches(item: Mapping[str, Any], hf_config: Any) -> None:
    """Raise :class:`EarlyTomConfigError` for patches of another size than the tower's, as ``patch_size`` and the like
    in a request make them: they would be the end of a worker."""
    checked_grids(item["pixel_values_videos"], item["video_grid_thw"][None], hf_config.vision_config)


def require_positions(last: int, hf_config: Any) -> None:
    """Raise :class:`EarlyTomConfigError` where a video ends at position ``last`` of a prompt without others, and the
    model knows fewer: its tokens may be few, but they keep the positions they had."""
    most = hf_config.get_text_config().max_position_embeddings
    if last >= most:
        raise EarlyTomConfigError(
            f"the video has positions up to {last}, and the model knows {most}: what is kept of a video has the "
            "position that it had in the whole prompt. Ask about a shorter video, or about fewer frames of it."
        )


class ServesPlaces(ServesCompressed):
    """For a model of vLLM's with positions of three axes, named before it among the bases."""

    one_size = False
    config: Any
    visual: Any

    def whole_ids(self, item: Mapping[str, MultiModalFieldElem]) -> list[int]:
        """Token ids that stand in the prompt for a video of which nothing is left out."""
        raise NotImplementedError

    @staticmethod
    def not_done(vllm_config: Any) -> dict[str, tuple[bool, str]]:
        """Also where rows would reach something else than :meth:`forward`, or that not as a whole."""
        speculative, parallel = vllm_config.speculative_config, vllm_config.parallel_config
        given = {
            f"--pipeline-parallel-size {parallel.pipeline_parallel_size}": parallel.pipeline_parallel_size > 1,
            "--enable-dbo or --ubatch-size": parallel.use_ubatching,
            "--speculative-config with a model": speculative is not None and speculative.method not in _WITHOUT_A_MODEL,
        }
        why = "the positions of what is kept of a video come with its rows, and reach the first part of the model alone"
        return {**ServesCompressed.not_done(vllm_config), **{flag: (value, why) for flag, value in given.items()}}

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._ahead = torch.zeros(3, vllm_config.scheduler_config.max_num_batched_tokens, dtype=torch.int64)

    def get_encoder_cudagraph_config(self) -> Any:
        """vLLM's own encoder may run as CUDA graphs for images, whose videos would be uncompressed."""
        config = super().get_encoder_cudagraph_config()  # type: ignore[misc]
        return replace(config, modalities=[kind for kind in config.modalities if kind != "video"])

    def some_frame_size(self) -> tuple[int, int]:
        """4 x 4 tokens."""
        vision = self.config.vision_config
        side = 4 * vision.patch_size * vision.spatial_merge_size
        return side, side

    # --- Rows -----------------------------------------------------------------------------------------

    @property
    def _width(self) -> int:
        assert self._video_path is not None
        return self.family.row_width(self._video_path.model)

    def call_of(self, kwargs: dict[str, Any], index: int) -> dict[str, Any]:
        """Patches are in one tensor, one video behind the other."""
        sizes = kwargs["video_grid_thw"].prod(-1).tolist()
        call = {name: kwargs[name][index : index + 1] for name in _OF_A_VIDEO if kwargs.get(name) is not None}
        return {**call, "pixel_values_videos": kwargs["pixel_values_videos"].split(sizes)[index]}

    def video_of(self, call: Mapping[str, Any]) -> Video:
        """Normalised, where vLLM leaves that to the device."""
        path, pixels, norm = self._video_path, call["pixel_values_videos"], getattr(self.visual, "input_norm", None)
        assert path is not None
        pixels = pixels.to(path.device)
        return super().video_of({**call, "pixel_values_videos": norm(pixels, path.dtype) if norm else pixels})

    def planned_shape(self, video: Video, config: EarlyTomConfig) -> tuple[int, int]:
        """[K, C + DIGITS]."""
        tokens = video.pixels.shape[1] // self.config.vision_config.spatial_merge_size**2
        return config.token_budget(len(video.pixels), tokens), self._width + DIGITS

    def prompt_rows(self, encoded: EncodedVideo, video: Video) -> Tensor:
        """Rows and their places in the whole video."""
        return torch.cat((encoded.rows, _written(encoded.places()[:, None]).to(encoded.rows)), dim=1)

    def in_prompt(self, rows: Tensor, call: Mapping[str, Any]) -> Tensor:
        """[K + its text, C + CHANNELS]."""
        ids, positions = self._alone(call)
        is_row = ids == self.config.video_token_id
        stays = ~is_row
        stays[is_row.nonzero().flatten()[_read(rows[:, -DIGITS:]).flatten().cpu()]] = True
        ids, positions, is_row = ids[stays], positions[:, stays], is_row[stays]
        text = ids[~is_row].to(rows.device)
        own = rows.new_zeros(len(ids), self._width)
        own[is_row.to(rows.device)] = rows[:, :-DIGITS]
        if len(text):
            embedded = self.get_language_model().embed_input_ids(text)  # type: ignore[attr-defined]
            own[~is_row.to(rows.device), : embedded.shape[1]] = embedded
        return torch.cat((own, _written(positions.T).to(own)), dim=1)

    def _alone(self, call: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Token ids [S] and positions [3, S] of the whole video of a ``call``, as if nothing stood before it."""
        field = MultiModalFieldConfig.batched("video").field
        given = {name: call[name][0] for name in _OF_A_VIDEO if name in call}
        item = MultiModalKwargsItem({name: MultiModalFieldElem(data, field) for name, data in given.items()})
        ids = self.whole_ids(item)
        feature = MultiModalFeatureSpec(item, "video", "", PlaceholderRange(0, len(ids)))
        positions, _ = super().get_mrope_input_positions(ids, [feature])  # type: ignore[misc]
        return torch.tensor(ids), positions

    # --- Positions ------------------------------------------------------------------------------------

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[Tensor, int]:
        """int64 [3, S'] of a prompt, and what is added to the number of each token that is generated. Videos that are
        compressed have the position of their start."""
        whole, features, taken, end = list[int](), [], list[int](), 0
        for feature in sorted(mm_features, key=lambda each: each.mm_position.offset):
            given = feature.mm_position
            taken += range(len(whole), len(whole) + given.offset - end)
            whole += input_tokens[end : given.offset]
            start, end = len(whole), given.offset + given.length
            if _is_compressed(feature.data):
                whole += self.whole_ids(feature.data)
                taken += [start] * given.length
                place = PlaceholderRange(start, len(whole) - start)
            else:
                whole += input_tokens[given.offset : end]
                taken += range(start, len(whole))
                place = replace(given, offset=start)
            features.append(replace(feature, mm_position=place))
        taken += range(len(whole), len(whole) + len(input_tokens) - end)
        whole += input_tokens[end:]
        positions, _ = super().get_mrope_input_positions(whole, features)  # type: ignore[misc]
        return positions[:, taken], int(positions.max()) + 1 - len(input_tokens)

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """Of a step [n, C]; positions that its rows bring wait for :meth:`forward`."""
        rows = multimodal_embeddings
        if rows is not None and len(rows):
            assert is_multimodal is not None
            ahead = torch.cat([self._positions_of(each) for each in rows], dim=1)
            waiting = self._ahead[:, : len(input_ids)]
            waiting.masked_scatter_(is_multimodal.to(waiting.device).expand_as(waiting), ahead)
            rows = [each[:, : self._width] for each in rows]
        return super().embed_input_ids(input_ids, rows, is_multimodal=is_multimodal, **others)  # type: ignore[misc]

    def _positions_of(self, rows: Tensor) -> Tensor:
        """int64 [3, n], what :meth:`in_prompt` wrote; 0 of rows that it has not made."""
        channels = rows[:, self._width :]
        return _read(channels).T if channels.shape[1] else channels.new_zeros(3, len(rows), dtype=torch.int64)

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **others: Any) -> Any:
        """``positions`` int64 [3, n] of a step are changed in place: CUDA graphs know them by their address."""
        waiting = self._ahead[:, : positions.shape[-1]]
        positions[:, : waiting.shape[1]] += waiting
        waiting.zero_()
        return super().forward(input_ids, positions, *args, **others)  # type: ignore[misc]


def _is_compressed(item: Any) -> bool:
    return FIELD in item and unpacked(item[FIELD].data) is not None


def _written(numbers: Tensor) -> Tensor:
    """int64 [n, m], not negative -> their digits, [n, m * DIGITS]."""
    return torch.stack([numbers // 256**place % 256 for place in range(DIGITS)], dim=-1).flatten(1)


def _read(digits: Tensor) -> Tensor:
    """The way back."""
    places = 256 ** torch.arange(DIGITS, device=digits.device)
    return (digits.to(torch.int64).unflatten(1, (-1, DIGITS)) * places).sum(-1)
