"""transformers' video path of a checkpoint, without its language model; needs no vLLM.

    path = VideoPath(hf_config, family, eager=False)
    for weight in path.taking(weights):      # on their way to vLLM's model
        ...
    path.require_all()
    encoded = path.encode(video, {"retain_ratio": 0.1})      # .rows [K, C]

vLLM's own towers split their heads over tensor-parallel ranks, call attention through wrappers of each platform and
linears through those of each quantisation. This one is whole on each rank: which tokens stay is decided from the
attention of all heads, and is the same everywhere. So is its answer: it is the tower that transformers runs.
"""

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...config import EarlyTomConfig
from ...errors import EarlyTomCompileError, EarlyTomError
from ...families.base import Family, Video
from ...reporting import GraphRecord
from ..placement import prepare_libraries
from ..video_encoder import EncodedVideo, VideoEncoder
from .options import Options, config_of

MOST_SETS_OF_OPTIONS = 8
"""Sets of options whose compiled code is kept, those that were used last."""
_NEVER_READ = ("post_layernorm", "head")
"""Parts of SigLIP towers behind the layer that is read, which published checkpoints leave out."""


class VideoPath:
    """Holds its modules without being one: what vLLM does to all modules of a model (quantise linears, add LoRA, split
    weights) is not meant for these."""

    def __init__(self, hf_config: Any, family: Family, *, eager: bool) -> None:
        self.family = family
        family.require_versions()
        family.prepare()
        prepare_libraries()
        self.model: Any = _without_language_model(hf_config, family)
        self.eager = eager
        self._expected = {
            _common(name): weight for name, weight in self.model.named_parameters() if not _is_language(name)
        }
        self._missing = {name for name in self._expected if not any(part in _NEVER_READ for part in name.split("."))}
        self._encoders: dict[str, VideoEncoder] = {}  # by their options; the one used last is the last

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.model.parameters()).device

    # --- Weights --------------------------------------------------------------------------------------

    def taking(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """``weights`` of a checkpoint by name, handed through; those of the video path are copied on the way.

        Raises :class:`EarlyTomError` for one of another shape, as those of a quantised tower are."""
        for name, weight in weights:
            own = None if _is_language(name) else self._expected.get(_common(name))
            if own is not None:
                if own.shape != weight.shape or not weight.is_floating_point():
                    raise EarlyTomError(
                        f"{name} of the checkpoint is {weight.dtype} {list(weight.shape)}, and the {self.family.name} "
                        f"vision path takes floating point {list(own.shape)}: its tower is quantised. Serve a "
                        "checkpoint whose vision tower is not, as most quantised ones are, or leave 'earlytom' out."
                    )
                with torch.no_grad():
                    own.copy_(weight)
                self._missing.discard(_common(name))
            yield name, weight

    def require_all(self) -> None:
        """Raise :class:`EarlyTomError` where the checkpoint lacked a weight."""
        if self._missing:
            some = ", ".join(sorted(self._missing)[:3])
            raise EarlyTomError(
                f"{len(self._missing)} weights of the {self.family.name} vision path are not in the checkpoint: {some} "
                "... Serve a complete checkpoint by a --load-format that reads it as it was published (auto, "
                "safetensors), or leave 'earlytom' out of --mm-processor-kwargs."
            )

    # --- Videos ---------------------------------------------------------------------------------------

    def videos(self, call: Mapping[str, Any]) -> list[Video]:
        """Those of a call, pixels by the name that transformers' processor gives them."""
        return self.family.videos(self.model, call)

    def blank_video(self, frame_size: tuple[int, int] | None) -> Video:
        """One of 8 pictures, whose code is that for all numbers of frames."""
        (video,) = self.videos(self.family.blank_call(self.model, 8, frame_size))
        return video

    def encode(self, video: Video, options: Options) -> EncodedVideo:
        """Compressed rows [K, C] of one video, separators included, and where they stand.

        Raises :class:`EarlyTomCompileError` with the reason where it cannot be compressed: never uncompressed rows."""
        encoder = self._encoder(self.config_of(options, frames=len(video.pixels)))
        # Compiled code is the same inside vLLM's inference mode and outside: one that is traced in both is two.
        with torch.inference_mode(False), torch.no_grad():
            if reason := encoder.reason_against_placement():
                raise EarlyTomCompileError(f"the video cannot be compressed: {reason[0]}. {reason[1]}.")
            encoded = encoder.encode(_of_no_mode(video))
        if encoded.counts is None:
            raise EarlyTomCompileError(
                f"the video ({video.size or list(video.pixels.shape)}) cannot be compressed: Dynamo did not trace its "
                "path. Unset TORCHDYNAMO_DISABLE, or leave 'earlytom' out of the request."
            )
        return encoded

    def records(self) -> list[GraphRecord]:
        """Those of all graphs that compress videos."""
        return [record for encoder in self._encoders.values() for record in encoder.records()]

    def config_of(self, options: Options, frames: int = 2) -> EarlyTomConfig:
        """Options as one object. A video of one frame needs code of its own, which is not worth it that all requests
        wait for a compiler: its graph is run as it is."""
        config = config_of(options, self.family, eager=self.eager)
        return config if frames > 1 else config.not_compiled()

    def _encoder(self, config: EarlyTomConfig) -> VideoEncoder:
        key = repr(config)
        encoder = self._encoders.pop(key, None)
        if encoder is None:
            encoder = VideoEncoder(self.model, config, self.family, GraphRecord("", False))
            if self._encoders:
                encoder.take_over(next(reversed(self._encoders.values())))
        self._encoders[key] = encoder
        while len(self._encoders) > MOST_SETS_OF_OPTIONS:
            del self._encoders[next(iter(self._encoders))]
        return encoder


def _without_language_model(hf_config: Any, family: Family) -> Any:
    """The model with a decoder of no layers and next to no words, in the default dtype and on the default device."""
    config = copy.deepcopy(hf_config)
    text = config.get_text_config()
    for name, value in (("num_hidden_layers", 0), ("vocab_size", 1), ("pad_token_id", None), ("layer_types", [])):
        if hasattr(text, name):
            setattr(text, name, value)
    config._attn_implementation = "sdpa"
    with torch.inference_mode(False):
        return family.model_class()(config).eval().requires_grad_(False)


def _of_no_mode(video: Video) -> Video:
    """Tensors made in inference mode are of another kind to Dynamo, and vLLM hands out both kinds: a video that comes
    alone is as it was read, several are put together in that mode."""

    def plain(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) and value.is_inference() else value

    arguments = {name: plain(value) for name, value in video.arguments.items()}
    return dataclasses.replace(video, pixels=plain(video.pixels), arguments=arguments)


def _is_language(name: str) -> bool:
    parts = name.split(".")
    return "language_model" in parts[:2] or parts[0] == "lm_head"


def _common(name: str) -> str:
    """A weight's name without what differs between versions of transformers: ``model.vision_tower.vision_model.x`` and
    ``vision_tower.x`` are one."""
    parts = name.removeprefix("model.").split(".")
    return ".".join(part for part in parts if part != "vision_model")
