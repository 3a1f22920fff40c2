"""The seam between lmms-eval and one kind of checkpoint: its prompt, its inputs, its new tokens.

    speaker.prepare(turns)        -> Sample: one question, its videos read, on the host
    speaker.inputs([sample, ...]) -> arguments of generate(), on the device
    speaker.new_tokens(output, inputs)

``transformers_code.py`` speaks to models of transformers, ``patches_code.py`` to those among them that take patches
of videos, as Qwen's do, and ``llava_code.py`` to those of LLaVA's own code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ...errors import EarlyTomConfigError
from .prompts import Turn


@dataclass(frozen=True)
class Sample:
    """A question ready for a batch: ``ids`` int64 [S] with placeholders, ``videos`` of F frames each,
    [F, 3, H, W] or [F, S, C] of S patches, and ``others``,
    what else its kind of checkpoint takes for what is shown."""

    ids: torch.Tensor
    videos: tuple[torch.Tensor, ...] = ()
    others: Mapping[str, Any] = field(default_factory=dict)

    @property
    def frames(self) -> tuple[int, ...]:
        """Of each video."""
        return tuple(len(video) for video in self.videos)

    @property
    def kind(self) -> tuple[bool, bool]:
        """What is shown: calls are of one kind, since models mix up what they get for rows that show nothing."""
        return bool(self.videos), bool(self.others)


class Speaker(Protocol):
    """A model, and the way to talk to it."""

    model: Any
    tokenizer: Any
    mixes_lengths: bool
    """Whether the full model takes videos of different numbers of frames in one call; the compressed one does."""

    def prepare(self, turns: Sequence[Turn]) -> Sample:
        """Raises :class:`~earlytom_compile.EarlyTomConfigError` for what cannot be shown to this model."""
        ...

    @property
    def longest_prompt(self) -> int | None:
        """Positions behind which the model's own code cuts off a prompt without a word; None if it never does."""
        ...

    def video_tokens(self, sample: Sample) -> int:
        """Of its videos, before compression and without separators."""
        ...

    def positions(self, sample: Sample) -> int:
        """Of its prompt, with all tokens of what it shows."""
        ...

    def inputs(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Arguments of ``generate()`` for a batch, on the model's device."""
        ...

    def new_tokens(self, output: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
        """What ``generate()`` added, int64 [R, N], padded behind the end of each answer."""
        ...


def require_whole(positions: int, longest: int | None, *, compressed: bool) -> None:
    """Raise :class:`EarlyTomConfigError` for a prompt that the model's own code cuts: its answer would be one to no
    question.

    ``positions``: all that there are; of a ``compressed`` prompt those that the language model got, the cut included.
    """
    if longest is None or positions < longest or (positions == longest and not compressed):
        return
    size = f"at least {positions} positions when compressed" if compressed else f"{positions} positions with all tokens"
    raise EarlyTomConfigError(
        f"the prompt has {size}, and the model's own code takes {longest} (tokenizer_model_max_length in config.json) "
        "and cuts off the rest, the question first. Take fewer frames (max_frames_num in --model_args, --frames of "
        "earlytom eval), or fewer pictures."
    )


def padded_left(rows: Sequence[torch.Tensor], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int64 [S] each -> ids and attention mask, int64 [R, longest]."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), padding, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, words in enumerate(rows):
        ids[row, longest - len(words) :] = words
        mask[row, longest - len(words) :] = 1
    return ids, mask
