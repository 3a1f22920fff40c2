"""What a Qwen model computes that goes on with fewer video tokens from some layer of its language model on: layer by
layer, without a cache, one row alone, each layer the model's own.

    step = InnerStep(layer=1, drop_ratio=0.5)
    (row, video_of), *_ = compressed_sequences(model, inputs, ...)      # of oracle_qwen.py
    logits = reduced_logits(model, row, video_of, step)                 # [L', vocab]

The tokens that go are those of a video to which the prompt's last position pays least in the layer before; each joins
the most similar of the others. What stays keeps its three positions, and what DeepStack adds to it.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from oracle_qwen import extended
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from earlytom_compile.reference import merge_inner_tokens


@dataclass(frozen=True)
class InnerStep:
    """Before ``layer``, ``drop_ratio`` of each video's tokens go."""

    layer: int
    drop_ratio: float
    variant: str = "paper"


@contextmanager
def _attention_recorded(text: Any, noted: list[Tensor]):
    """Softmax(q k scale) [H, L, L] of every attention of the language model, with all that is done to q and k."""

    def recording(module, query, key, value, attention_mask, scaling, **kwargs):
        copies = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(copies, 1) for x in (key, value))
        future = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
        paid = (query @ key.transpose(-1, -2) * scaling).masked_fill(future, -torch.inf).softmax(-1)
        noted.append(paid[0])
        return (paid @ value).transpose(1, 2), paid

    own = text.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register("recording", recording)
    text.config._attn_implementation = "recording"
    try:
        yield
    finally:
        text.config._attn_implementation = own


@torch.no_grad()
def reduced_logits(model: Any, row: Any, video_of: list[int], step: InnerStep) -> Tensor:
    """``[L', vocab]``. ``video_of``: of each position of the prompt, the number of its video, -1 for none; positions
    behind the prompt may follow."""
    text, noted = model.model.language_model, []
    hidden, positions, stay = row.embeddings, row.positions, torch.arange(len(row.embeddings))
    with _attention_recorded(text, noted):
        for index, layer in enumerate(text.layers):
            if index == step.layer:
                hidden, stay = _reduced(hidden, noted[-1], video_of, step)
                positions = positions[:, stay]
            table = text.rotary_emb(hidden[None], positions[:, None])
            output = layer(hidden[None], attention_mask=None, position_embeddings=table)
            hidden = (output[0] if isinstance(output, tuple) else output).view(len(hidden), -1)
            if index < len(row.deepstack):
                hidden = hidden + row.deepstack[index][stay]
    return model.lm_head(text.norm(hidden))


@torch.no_grad()
def generated_with_fewer(model: Any, row: Any, video_of: list[int], step: InnerStep, count: int) -> list[int]:
    """``count`` greedy tokens."""
    for _ in range(count):
        row = extended(model, row, int(reduced_logits(model, row, video_of, step)[-1].argmax()))
    return row.ids[-count:].tolist()


def _reduced(hidden: Tensor, paid: Tensor, video_of: list[int], step: InnerStep) -> tuple[Tensor, Tensor]:
    """The last video first, so that those before it stay where they are; (hidden, which positions are left)."""
    prompt = len(video_of)
    scores = paid[:, prompt - 1, :prompt].mean(0)
    left, behind, stay = hidden[:prompt], hidden[prompt:], torch.arange(prompt)
    for video in sorted(set(video_of) - {-1}, reverse=True):
        places = [position for position, owner in enumerate(video_of) if owner == video]
        # Text between the frames of a video stays where it is: only its tokens are looked at.
        tokens = torch.tensor(places)
        merged, kept = merge_inner_tokens(
            left[tokens][None],
            scores[tokens],
            image_start=0,
            image_length=len(tokens),
            drop_ratio=step.drop_ratio,
            variant=step.variant,
        )
        left = left.clone()
        left[tokens[kept]] = merged[0]
        gone = set(places) - set(tokens[kept].tolist())
        rest = torch.tensor([position for position in range(len(left)) if position not in gone])
        left, scores, stay = left[rest], scores[rest], stay[rest]
    return torch.cat([left, behind]), torch.cat([stay, torch.arange(prompt, prompt + len(behind))])
