"""What speakers have in common whose checkpoint's own processor and chat template make the prompt.

[Turn("user", (Film("a.mp4"), "What happens?"))]
-> chat template -> "<|im_start|>user <video>\\nWhat happens?<|im_end|>..."
-> processor -> ids [S] with a placeholder for each token, and what the model takes for what is shown

Each says how a video is read (:meth:`ProcessorSpeaker._decoded`, :meth:`ProcessorSpeaker._drawn`), and what the
processor makes of it all (:meth:`ProcessorSpeaker._sample`).
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from PIL import Image

from ...cli.loading import Loaded
from ...errors import EarlyTomConfigError
from ..preprocess import VideoTextProcessor
from .arguments import Arguments
from .prompts import Film, Picture, Turn
from .speaker import Sample, padded_left

_KINDS = {Picture: "image", Film: "video"}


class ProcessorSpeaker:
    """See :class:`~earlytom_compile.integrations.lmms_eval.speaker.Speaker`."""

    longest_prompt: int | None = None
    videos_kept: ClassVar[int]
    """That were read last, since questions about one video follow each other."""

    def __init__(self, arguments: Arguments, loaded: Loaded) -> None:
        self.model = loaded.model
        self._processor = cast(Any, loaded.processor)  # more is asked of it than by the command line
        self.tokenizer: Any = self._processor.tokenizer
        self._frames = arguments.max_frames or loaded.frames
        self._read = functools.lru_cache(maxsize=self.videos_kept)(self._decoded)
        self._ours = isinstance(self._processor, VideoTextProcessor)  # without torchvision
        self._tokens: dict[type, str] = {
            Picture: self._processor.images.token if self._ours else self._processor.image_token,
            Film: self._processor.video_token,
        }

    def prepare(self, turns: Sequence[Turn]) -> Sample:
        """Read the videos and make ids and pixels of a conversation."""
        media = [part for turn in turns for part in turn.media()]
        text = self._processor.apply_chat_template(
            [{"role": turn.role, "content": self._content(turn)} for turn in turns], add_generation_prompt=True
        )
        for kind, token in self._tokens.items():
            shown, named = sum(isinstance(part, kind) for part in media), text.count(token)
            if shown != named:
                raise EarlyTomConfigError(
                    f"the prompt has {named} {token} for {shown} of them: {token} in a question stands for what is "
                    "shown, and the checkpoint's chat template must write one for each."
                )
        return self._sample(
            text,
            pictures=[part.image for part in media if isinstance(part, Picture)],
            videos=[self._video(part) for part in media if isinstance(part, Film)],
        )

    def positions(self, sample: Sample) -> int:
        """There is a placeholder for each token."""
        return len(sample.ids)

    def new_tokens(self, output: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The prompt comes back in front of them."""
        return output[:, inputs["input_ids"].shape[1] :]

    def _prompts(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Ids padded on the left, on the model's device."""
        padding = self.tokenizer.pad_token_id
        ids, mask = padded_left([sample.ids for sample in samples], 0 if padding is None else padding)
        return {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}

    def _content(self, turn: Turn) -> list[dict[str, str]]:
        """For the chat template, which says pictures and videos where they are said."""
        return [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": _KINDS[type(part)]}
            for part in turn.parts
        ]

    def _begun(self, text: str) -> dict[str, bool]:
        """For the tokenizer, which would write the first token once more."""
        begin = self.tokenizer.bos_token
        return {"add_special_tokens": False} if begin is not None and text.startswith(begin) else {}

    def _video(self, film: Film) -> Any:
        return self._read(film.source) if isinstance(film.source, str) else self._drawn(film.source)

    def _decoded(self, path: str) -> Any:
        """A video of a file, as large as the model wants it."""
        raise NotImplementedError

    def _drawn(self, pictures: Sequence[Image.Image]) -> Any:
        """The same of pictures."""
        raise NotImplementedError

    def _sample(self, text: str, pictures: list[Any], videos: list[Any]) -> Sample:
        """What the processor makes of a prompt and what is shown."""
        raise NotImplementedError
