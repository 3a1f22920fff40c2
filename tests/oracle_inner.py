"""What a language model computes that goes on with fewer video tokens from some layer on: layer by layer, without a
cache, one row alone, everything computed again for each new token, and nothing of it in a compiled graph.

    steps = [Step(18, 0.5, "mean")]
    logits = reduced_logits(model, embeddings [L, D], video_of, steps, prompt=L)       # [L', vocab]

``video_of`` has a number for each position of the prompt: which video it belongs to, -1 for none; text may be between
the tokens of a video. Which tokens stay is decided by the prompt alone, so that positions behind it see what a cache of
it would hold.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from earlytom_compile.reference import merge_inner_tokens


@dataclass
class _Sequence:
    hidden: Tensor  # [L, D]
    places: list[int]  # of the whole sequence
    video_of: list[int]  # of the prompt's positions that are left
    last: int  # the prompt's last position

    @property
    def prompt(self) -> int:
        return len(self.video_of)


@torch.no_grad()
def reduced_logits(
    model,
    embeddings: Tensor,
    video_of: Sequence[int],
    steps,
    prompt: int | None = None,
    *,
    positions: Tensor | None = None,
    added: Sequence[Tensor] = (),
) -> Tensor:
    """``[L', vocab]`` of one row ``[L, D]``, whose first ``prompt`` positions are the prompt.

    positions: int64 ``[..., L]``, what the rotary table is made of; None: they are counted. added: what the first
    layers' outputs get on top, each ``[L, D]``."""
    assert prompt in (None, len(video_of))
    text = getattr(model.model, "language_model", model.model)  # LLaVA's own has no model around it
    state = _Sequence(embeddings, list(range(len(embeddings))), list(video_of), len(video_of) - 1)
    entered = {video: list(video_of).count(video) for video in set(video_of) - {-1}}
    positions, paid = torch.arange(len(embeddings)) if positions is None else positions, None
    for index, layer in enumerate(text.layers[: text.config.num_hidden_layers]):
        for step in steps:
            if step.layer == index:
                _reduce(state, step, paid, entered)
        table = text.rotary_emb(state.hidden[None], positions[..., None, state.places])
        paid = _paid(layer, state, table, [step.scores for step in steps if step.layer == index + 1])
        length = len(state.hidden)
        mask = torch.full((length, length), -math.inf).triu(1)[None, None].to(state.hidden)
        output = layer(state.hidden[None], attention_mask=mask, position_embeddings=table)
        state.hidden = (output[0] if isinstance(output, tuple) else output).view(length, -1)
        if index < len(added):
            state.hidden = state.hidden + added[index][state.places]
    return model.lm_head(text.norm(state.hidden))


def _paid(layer, state: _Sequence, table, wanted: list[str]) -> Tensor | None:
    """[prompt]: attention that each position of the prompt is paid in ``layer``, before it runs."""
    if not wanted:
        return None
    attention, prompt = layer.self_attn, state.prompt
    normed = layer.input_layernorm(state.hidden[:prompt])
    size = attention.head_dim
    query, key = (
        getattr(attention, f"{name}_norm", nn.Identity())(
            getattr(attention, f"{name}_proj")(normed).view(prompt, -1, size)
        )
        for name in "qk"
    )
    query, key = query.transpose(0, 1), key.transpose(0, 1)
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
    """One video after another: each among its own tokens, whatever is between them."""
    for video in sorted(entered):
        own = [place for place, other in enumerate(state.video_of) if other == video]
        keep = max(1, round(entered[video] * step.keep_ratio))
        merged, left = _kept(state.hidden[own], paid[own], step, keep)
        state.hidden = state.hidden.clone()
        state.hidden[[own[i] for i in left]] = merged
        gone = set(own) - {own[i] for i in left}
        stay = [place for place in range(state.prompt) if place not in gone]
        behind = list(range(state.prompt, len(state.hidden)))
        state.hidden = state.hidden[stay + behind]
        state.places = [state.places[p] for p in stay + behind]
        state.last = stay.index(state.last) if state.last in stay else len(stay) - 1
        state.video_of = [state.video_of[p] for p in stay]
        paid = paid[stay]


def _kept(hidden: Tensor, paid: Tensor, step, keep: int) -> tuple[Tensor, list[int]]:
    """(what is left, which it was) of a video's tokens ``[n, D]``; the others merge into them, or are gone."""
    if step.merge == "drop":
        order = sorted(range(len(hidden)), key=lambda i: (-float(paid[i]), i))
        left = sorted(order[:keep])
        return hidden[left], left
    merged, left = merge_inner_tokens(
        hidden[None],
        paid,
        image_start=0,
        image_length=len(hidden),
        drop_ratio=1 - keep / len(hidden),  # a ratio that leaves exactly so many
        variant="paper" if step.merge == "mean" else "released",
    )
    return merged[0], left.tolist()
