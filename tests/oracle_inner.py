"""What a language model computes that goes on with fewer video tokens from some layer on: layer by layer, without a
cache, one row alone, everything computed again for each new token, and nothing of it in a compiled graph.

    steps = [Step(18, 0.5, "mean")]
    logits = reduced_logits(model, embeddings [L, D], video_of, steps, prompt=L)       # [L', vocab]

``video_of`` has a number for each position of the prompt: which video it belongs to, -1 for none. Which tokens stay is
decided by the prompt alone, so that positions behind it see what a cache of it would hold.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from earlytom_compile.reference import merge_inner_tokens


@dataclass
class _Sequence:
    hidden: Tensor  # [L, D]
    positions: list[int]
    video_of: list[int]  # of the prompt's positions that are left
    last: int  # the prompt's last position

    @property
    def prompt(self) -> int:
        return len(self.video_of)


@torch.no_grad()
def reduced_logits(model, embeddings: Tensor, video_of: Sequence[int], steps, prompt: int | None = None) -> Tensor:
    """``[L', vocab]`` of one row ``[L, D]``, whose first ``prompt`` positions are the prompt."""
    assert prompt in (None, len(video_of))
    text = getattr(model.model, "language_model", model.model)  # LLaVA's own has no model around it
    state = _Sequence(embeddings, list(range(len(embeddings))), list(video_of), len(video_of) - 1)
    entered = {video: list(video_of).count(video) for video in set(video_of) - {-1}}
    paid = None
    for index, layer in enumerate(text.layers[: text.config.num_hidden_layers]):
        for step in steps:
            if step.layer == index:
                _reduce(state, step, paid, entered)
        table = text.rotary_emb(state.hidden[None], torch.tensor([state.positions]))
        paid = _paid(layer, state, table, [step.scores for step in steps if step.layer == index + 1])
        length = len(state.hidden)
        mask = torch.full((length, length), -math.inf).triu(1)[None, None].to(state.hidden)
        output = layer(state.hidden[None], attention_mask=mask, position_embeddings=table)
        state.hidden = (output[0] if isinstance(output, tuple) else output).view(length, -1)
    return model.lm_head(text.norm(state.hidden))


def _paid(layer, state: _Sequence, table, wanted: list[str]) -> Tensor | None:
    """[prompt]: attention that each position of the prompt is paid in ``layer``, before it runs."""
    if not wanted:
        return None
    attention, prompt = layer.self_attn, state.prompt
    normed = layer.input_layernorm(state.hidden[:prompt])
    size = attention.head_dim
    query = attention.q_proj(normed).view(prompt, -1, size).transpose(0, 1)
    key = attention.k_proj(normed).view(prompt, -1, size).transpose(0, 1)
    key = key.repeat_interleave(len(query) // len(key), 0)
    query, key = (_rotated(x, *(part[0, :prompt] for part in table)) for x in (query, key))
    columns = torch.zeros(prompt)
    seen = torch.zeros(prompt)
    for i in range(prompt) if wanted == ["all"] else [state.last]:
        scores = (query[:, i : i + 1] * key[:, : i + 1]).sum(-1) * size**-0.5
        columns[: i + 1] += scores.softmax(-1).mean(0)
        seen[: i + 1] += 1
    return columns / seen.clamp_min(1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _reduce(state: _Sequence, step, paid: Tensor, entered: dict[int, int]) -> None:
    """Backwards over the videos, so that positions before them stay where they are."""
    for video in sorted(entered, reverse=True):
        begin, count = state.video_of.index(video), state.video_of.count(video)
        keep = max(1, round(entered[video] * step.keep_ratio))
        stay = _kept(state, step, paid, begin, count, keep)
        state.positions = [state.positions[p] for p in stay] + state.positions[state.prompt :]
        state.last = stay.index(state.last) if state.last in stay else len(stay) - 1
        state.video_of = [state.video_of[p] for p in stay]
        paid = paid[stay]


def _kept(state: _Sequence, step, paid: Tensor, begin: int, count: int, keep: int) -> list[int]:
    """The positions of the prompt that stay of those there are; the others merge into them, or are gone."""
    prompt, behind = state.hidden[: state.prompt], state.hidden[state.prompt :]
    if step.merge == "drop":
        order = sorted(range(begin, begin + count), key=lambda p: (-float(paid[p]), p))
        gone = set(order[keep:])
        stay = [p for p in range(state.prompt) if p not in gone]
        merged = prompt[stay]
    else:
        # 1 - keep / count is a ratio that leaves exactly so many.
        left, kept = merge_inner_tokens(
            prompt[None],
            paid,
            image_start=begin,
            image_length=count,
            drop_ratio=1 - keep / count,
            variant="paper" if step.merge == "mean" else "released",
        )
        merged, stay = left[0], kept.tolist()
    state.hidden = torch.cat([merged, behind])
    return stay
