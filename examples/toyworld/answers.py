"""From video tokens and questions to answers: one pass of the language model over rows of questions.

Every question sees the video and itself and has the positions it would have if it were asked alone, so the
answers are those of ``generate`` (tests/toyworld/test_answers.py), for a fraction of its time.

Where tokens leave inside the language model, which of them depends on the question: then ``generate`` itself answers,
with a row of its batch for each question about a video.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlavaOnevisionForConditionalGeneration

from earlytom_compile.toyworld.batches import AFTER, BEFORE, IDS, IGNORED, Rows
from earlytom_compile.toyworld.model import VIDEO_TOKENS
from earlytom_compile.toyworld.questions import Question

_PREFIX, _NOT_THERE = -2, -3  # beside the numbers of the questions
_PAD, _VIDEO = IDS["<|endoftext|>"], IDS["<video>"]
FIRST_TOKEN = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": _PAD}
"""What ``generate`` is called with, beside the prompt."""


def normalized(frames: torch.Tensor) -> torch.Tensor:
    """RGB from 0 to 255, [F, 96, 96, 3], as the processor gives it to the model: float32 [F, 3, 96, 96]."""
    return frames.permute(0, 3, 1, 2) / 127.5 - 1


def answer_logits(
    model: LlavaOnevisionForConditionalGeneration,
    videos: Sequence[torch.Tensor],
    rows: Rows,
    places: Sequence[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits [A, words], labels [A]) of all labelled positions, row by row.

    ``videos``: the tokens of each row's video, [K, C], without the newline; K may differ. ``places``: for each of them
    the place, int64 [K], that it has among all tokens of the video, if it is to keep the position of that place; None:
    positions are numbered anew.
    """
    inner, device = model.model, rows.ids.device
    embed = model.get_input_embeddings()
    before = embed(torch.tensor([IDS[word] for word in BEFORE], device=device))
    prefixes = [torch.cat([before, tokens, inner.image_newline[None]]) for tokens in videos]
    lengths = torch.tensor([len(prefix) for prefix in prefixes], device=device)
    prefix = pad_sequence(prefixes, batch_first=True)
    positions = torch.arange(prefix.shape[1], device=device).expand(len(videos), -1)
    ends = lengths
    if places is not None:
        positions = pad_sequence([kept_positions(len(before), at, VIDEO_TOKENS) for at in places], batch_first=True)
        ends = torch.full_like(lengths, len(before) + VIDEO_TOKENS + 1)
    hidden = inner.language_model(
        inputs_embeds=torch.cat([prefix, embed(rows.ids)], 1),
        attention_mask=mask_of_questions(lengths, rows.question, prefix.dtype)[:, None],
        position_ids=torch.cat([positions, ends[:, None] + rows.position], 1),
        use_cache=False,
    ).last_hidden_state[:, prefix.shape[1] :]
    labelled = rows.labels != IGNORED
    return model.lm_head(hidden[labelled]), rows.labels[labelled]


def kept_positions(before: int, places: torch.Tensor, video_tokens: int) -> torch.Tensor:
    """Of the words in front, the tokens of a video, and the newline behind all its places."""
    first, last = places.new_tensor([*range(before)]), places.new_tensor([before + video_tokens])
    return torch.cat([first, before + places, last])


def mask_of_questions(lengths: torch.Tensor, question: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[V, S, S], to be added to the scores: 0 where a position (row) sees another (column), else the least number."""
    index = torch.arange(int(lengths.max()), device=question.device)
    prefix = torch.where(index < lengths[:, None], _PREFIX, _NOT_THERE)
    group = torch.cat([prefix, question], 1)
    causal = torch.ones(group.shape[1], group.shape[1], dtype=torch.bool, device=question.device).tril()
    sees = causal & ((group[:, :, None] == group[:, None, :]) | (group == _PREFIX)[:, None, :])
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, torch.finfo(dtype).min)


def prompt_ids(question: Question, placeholders: int, ids: Mapping[str, int] = IDS) -> list[int]:
    """The prompt of one question, with so many placeholders for the video; ``ids``: those of the world's words."""
    words = [ids[word] for word in question.text.split()]
    return [*(ids[word] for word in BEFORE), *[_VIDEO] * placeholders, *words, *(ids[word] for word in AFTER)]


def prompt_length(question: Question, video_tokens: int) -> int:
    """Positions of the prompt: the video's tokens, a newline behind them, and the words."""
    return len(BEFORE) + video_tokens + 1 + len(question.text.split()) + len(AFTER)


@torch.no_grad()
def generated(
    compiled: Any, tokens: torch.Tensor, asked: Sequence[Question], ids_of: Mapping[str, int] = IDS
) -> list[int]:
    """The word that greedy ``generate`` says first to each question, by its id.

    ``compiled``: the model after :func:`earlytom_compile.compile`; ``tokens``: those of the video, [K, C], without the
    newline.
    """
    rows = torch.cat([tokens, compiled.model.image_newline[None]])
    prompts = [prompt_ids(question, 1, ids_of) for question in asked]
    longest = max(map(len, prompts))
    ids = torch.tensor([[_PAD] * (longest - len(prompt)) + prompt for prompt in prompts], device=tokens.device)
    said = compiled.generate(
        input_ids=ids, attention_mask=(ids != _PAD).long(), pixel_values_videos=[rows] * len(asked), **FIRST_TOKEN
    )
    words: list[int] = said[:, -1].tolist()
    return words
