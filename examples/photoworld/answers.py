"""From video tokens and questions to answers: one pass of the language model over rows of questions.

    rows_of([[question, question], [question]])       # a row for each video
    answer_logits(model, [tokens, tokens], rows)      # tokens of a video: [K, C], without the newline

A row is one sequence, ``user <video> | question answer | question answer | ...``, in which each question sees the video
and itself and has the positions it would have if it were asked alone, so that the answers are those of ``generate``.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from earlytom_compile.photoworld.language import AFTER, BEFORE, END, IDS
from earlytom_compile.photoworld.model import VIDEO_TOKENS, Model
from earlytom_compile.photoworld.questions import CATEGORIES
from earlytom_compile.toyworld.answers import kept_positions, mask_of_questions
from earlytom_compile.toyworld.batches import IGNORED, Rows
from earlytom_compile.toyworld.questions import Question

_FILLS = (0, 0, -1, IGNORED, 0)  # behind the end of a row, in the order of Rows


def normalized(frames: torch.Tensor) -> torch.Tensor:
    """RGB from 0 to 255, [F, 224, 224, 3], as the processor gives it to the model: float32 [F, 3, 224, 224]."""
    return frames.permute(0, 3, 1, 2) / 127.5 - 1


def rows_of(asked: Sequence[Sequence[Question]]) -> Rows:
    """A row for each of these lists of questions; categories by their place in :data:`CATEGORIES`."""
    columns = zip(*(_row(questions) for questions in asked), strict=True)
    filled = zip(columns, _FILLS, strict=True)
    return Rows(*(pad_sequence(list(column), batch_first=True, padding_value=fill) for column, fill in filled))


def _row(questions: Sequence[Question]) -> list[torch.Tensor]:
    """ids, position, question, labels and category of a row."""
    columns: list[list[int]] = [[] for _ in range(5)]
    for number, question in enumerate(questions):
        ids = [IDS[word] for word in (*question.text.split(), *AFTER, question.answer)]
        labels = [IGNORED] * (len(ids) - 2) + [ids[-1], END]
        category = [CATEGORIES.index(question.category)] * len(ids)
        for column, values in zip(columns, (ids, range(len(ids)), [number] * len(ids), labels, category), strict=True):
            column.extend(values)
    return [torch.from_numpy(np.array(column, np.int64)) for column in columns]


def answer_logits(
    model: Model, videos: Sequence[torch.Tensor], rows: Rows, places: Sequence[torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits [A, words], labels [A]) of all labelled positions, row by row.

    ``videos``: the tokens of each row's video, [K, C]; K may differ. ``places``: for each of them the place, int64 [K],
    that it has among all tokens of the video, if it is to keep the position of that place; None: positions are numbered
    anew.
    """
    inner, device = model.model, rows.ids.device
    embed = model.get_input_embeddings()
    before = embed(torch.tensor([IDS[word] for word in BEFORE], device=device))
    newline: torch.Tensor = inner.image_newline[None]
    prefixes = [torch.cat([before, tokens.to(before), newline]) for tokens in videos]
    lengths = torch.tensor([len(prefix) for prefix in prefixes], device=device)
    prefix = pad_sequence(prefixes, batch_first=True)
    positions, ends = torch.arange(prefix.shape[1], device=device).expand(len(videos), -1), lengths
    if places is not None:
        positions = pad_sequence([kept_positions(len(before), at, VIDEO_TOKENS) for at in places], batch_first=True)
        ends = torch.full_like(lengths, len(before) + VIDEO_TOKENS + 1)
    # That of the scores, or softmax would run in float32 on a copy of them.
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else prefix.dtype
    hidden = inner.language_model(
        inputs_embeds=torch.cat([prefix, embed(rows.ids)], 1),
        attention_mask=mask_of_questions(lengths, rows.question, dtype)[:, None],
        position_ids=torch.cat([positions, ends[:, None] + rows.position], 1),
        use_cache=False,
    ).last_hidden_state[:, prefix.shape[1] :]
    labelled = rows.labels != IGNORED
    return model.lm_head(hidden[labelled]), rows.labels[labelled]
