"""Train projector and language model of this world on features of a frozen vision encoder.

    python -m earlytom_compile.photoworld.pool cache --clips 1400 --videos 100
    ACCELERATE_MIXED_PRECISION=bf16 python -m earlytom_compile.photoworld.train --pool cache --output runs/0

Phases: the projector learns to say what each video token shows and where it is; then it and the language model learn
what is where and then what happens when, from nearly all tokens that show a thing and few others, at their own
positions; last everything that is asked, from tokens drawn by lot, in half of the batches with better odds for those
that show a thing, in half of them numbered anew. A step costs what it keeps, and a model that has only ever seen whole
videos would say more about that than about compression.

A run that finds its own state in ``--output`` continues there. At the end the folder holds ``checkpoint`` and
``history.jsonl``.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional as F

from earlytom_compile.photoworld import batches
from earlytom_compile.photoworld.answers import answer_logits
from earlytom_compile.photoworld.batches import Kept, QuestionBatch, TokenBatch
from earlytom_compile.photoworld.model import TEXT_WIDTH, VIDEO_TOKENS, Model, build_model, fold, save
from earlytom_compile.photoworld.pool import TOKENS, Pool
from earlytom_compile.photoworld.questions import CATEGORIES, ask
from earlytom_compile.toyworld import train as toy
from earlytom_compile.toyworld.batches import IGNORED, Cells
from earlytom_compile.toyworld.train import Run
from earlytom_compile.toyworld.world import COLORS, SHAPES, rng_of

QUESTIONS_OF_EACH = 12
CHECK_EVERY = 250  # steps
SAVE_EVERY = 100  # steps
_CHECK_AT_ONCE = 10
_FAVOUR, _FAVOUR_THINGS = 8.0, 100.0
_FEWEST_TOKENS = 0.08
_WHOLE_VIDEOS = 1 / 4  # of a phase's videos a batch, where these keep all tokens
_WARM_UP = 50  # steps
_LAST_RATE = 0.05  # of the highest


@dataclass(frozen=True)
class Phase(toy.Phase):
    """``weights`` of the categories of questions, in the order of CATEGORIES; None: labels of tokens, and ``videos``
    counts frames. ``drop`` is the share of batches that lose tokens; they keep ``most`` of them at most. With
    ``things`` these are nearly all that show a thing, at their own positions: what happens when is learned sooner.
    """

    most: float = 0.5
    things: bool = False


PHASES = (
    Phase("tokens", 1000, 48, 2e-3),
    Phase("binding", 600, 16, 4e-3, (1, 0.5, 0.5, 0, 0.5, 1, 4, 0.5), drop=1.0, most=0.16, things=True),
    Phase("motion", 3000, 16, 4e-3, (0.5, 4, 0.5, 2, 0.7, 0.5, 0.5, 3), drop=1.0, most=0.16, things=True),
    Phase("together", 1200, 16, 3e-3, (1, 3, 1, 1.5, 1.5, 1, 1, 1.5), drop=0.9, most=0.4),
)


class TokenTrainee(nn.Module):
    """The projector with linear heads that say what each video token shows and where it is; they are thrown away."""

    def __init__(self, model: Model, scale: "Scale") -> None:
        super().__init__()
        self.projector, self.scale = model.model.multi_modal_projector, scale
        self.norm = nn.LayerNorm(TEXT_WIDTH)
        sizes = {"color": 1 + len(COLORS), "shape": 1 + len(SHAPES), "flashes": 2, "offset": 2, "place": TOKENS}
        self.heads = nn.ModuleDict({name: nn.Linear(TEXT_WIDTH, size) for name, size in sizes.items()})

    def forward(self, batch: TokenBatch) -> dict[str, torch.Tensor]:
        """The loss of each head."""
        said = self.said(batch.features)
        labels = _labels(batch.tokens)
        losses = {name: F.cross_entropy(said[name].flatten(0, 1), label.flatten()) for name, label in labels}
        something = batch.tokens.color > 0
        losses["offset"] = F.smooth_l1_loss(said["offset"][something], batch.tokens.offset[something], beta=0.1)
        return losses

    def said(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """What each head says of each token."""
        hidden = self.norm(projected(self.projector, self.scale, features))
        return {name: head(hidden) for name, head in self.heads.items()}


def _labels(cells: Cells) -> list[tuple[str, torch.Tensor]]:
    place = torch.arange(TOKENS, device=cells.color.device).expand(cells.color.shape)
    return [("color", cells.color), ("shape", cells.shape), ("flashes", cells.flashes), ("place", place)]


class Scale(nn.Module):
    """Features with a mean of 0 and a standard deviation of 1; the checkpoint's projector does this itself."""

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, mean: torch.Tensor, deviation: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """float16 [..., D] -> float32."""
        return (features.float() - self.mean) / self.deviation


def projected(projector: Any, scale: Scale, features: torch.Tensor) -> torch.Tensor:
    """[..., 4, D] -> video tokens [..., C]: pooling a grid of an even size is the mean of each four."""
    tokens: torch.Tensor = projector(scale(features)).mean(-2)
    return tokens


class AnswerTrainee(nn.Module):
    """Projector and language model on rows of questions."""

    def __init__(self, model: Model, scale: Scale) -> None:
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, batch: QuestionBatch, keep_positions: bool) -> dict[str, torch.Tensor]:
        """The loss."""
        logits, labels = self.logits(batch, keep_positions)
        return {"answers": F.cross_entropy(logits, labels)}

    def logits(self, batch: QuestionBatch, keep_positions: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Of all labelled positions, and the labels."""
        tokens = projected(self.model.model.multi_modal_projector, self.scale, batch.features)
        return answer_logits(self.model, list(tokens), batch.rows, list(batch.places) if keep_positions else None)


@torch.no_grad()
def accuracies(trainee: AnswerTrainee, pool: Pool) -> dict[str, float]:
    """Share of right answers by category and over all questions, about the videos of ``pool`` with all tokens."""
    right, asked = ([0] * len(CATEGORIES) for _ in range(2))
    device = trainee.scale.mean.device
    for first in range(0, len(pool.clips), _CHECK_AT_ONCE):
        numbers = range(first, min(first + _CHECK_AT_ONCE, len(pool.clips)))
        batch = batches.whole_batch(pool, numbers, [check_questions(pool.clips[n], n) for n in numbers]).to(device)
        logits, labels = trainee.logits(batch, False)
        categories = batch.rows.category[batch.rows.labels != IGNORED]
        hits = logits.argmax(-1) == labels
        for category, hit in zip(categories[::2].tolist(), hits[::2].tolist(), strict=True):
            asked[category] += 1
            right[category] += hit
    by_category = {name: r / max(n, 1) for name, r, n in zip(CATEGORIES, right, asked, strict=True)}
    return {"overall": sum(right) / sum(asked), **by_category}


def check_questions(video: Any, seed: int, times: int = 3) -> list[Any]:
    """One of each category, a few times over; the same at every check."""
    rng = rng_of("validation", seed, stream=6)
    found = [question for _ in range(times) for question in ask(video, rng).values()]
    return list(dict.fromkeys(found))


# --- The loop -----------------------------------------------------------------------------------------


def train(
    folder: Path, pool: Pool, videos: Pool, seed: int = 0, phases: tuple[Phase, ...] = PHASES, *, cpu: bool = False
) -> Path:
    """Run what is left of ``phases`` and return the checkpoint's folder."""
    accelerator = Accelerator(cpu=cpu)
    set_seed(seed)
    run = Run(folder, seed, phases, accelerator)
    model = build_model(seed).train()
    model.model.vision_tower = nn.Identity()  # its part is in the pool
    # Its matrix products run in the precision of the others; the fused kernels of a CPU are slower in bfloat16.
    model.set_attn_implementation("eager")
    scale = Scale(*pool.scale())
    while run.phase < len(phases):
        _run_phase(run, model, scale, phases[run.phase], pool, videos)
        run.phase, run.step = run.phase + 1, 0
    mean, deviation = (value.to(accelerator.device) for value in (scale.mean, scale.deviation))
    fold(model.model.multi_modal_projector, mean, deviation)
    return save(model.eval(), folder / "checkpoint")


def _run_phase(run: Run, model: Model, scale: Scale, phase: Phase, pool: Pool, videos: Pool) -> None:
    accelerator = run.accelerator
    trainee: Any = TokenTrainee(model, scale) if phase.weights is None else AnswerTrainee(model, scale)
    trainee, *optimizers = accelerator.prepare(trainee, *_optimizers(trainee))
    run.begin_phase()
    run.record(clips=len(pool.clips))  # more of them, if the pool has grown before a run goes on
    while run.step < phase.steps:
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = phase.rate * _rate(run.step, phase.steps)
        losses = _losses(trainee, phase, pool, np.random.default_rng([run.seed, run.phase, run.step]), accelerator)
        accelerator.backward(sum(losses.values()))
        accelerator.clip_grad_norm_(trainee.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        run.step += 1
        last = run.step == phase.steps
        if run.step % 50 == 0 or last:
            run.record(**{k: v.item() for k, v in losses.items()})
        if phase.weights and (run.step % CHECK_EVERY == 0 or last):
            run.record(validation=_check(trainee, videos, accelerator))
        if run.step % SAVE_EVERY == 0:
            run.save()
    if phase.weights is None:
        _check_tokens(run, trainee, videos)
        _match_scales(model, scale, pool)
    accelerator.free_memory()


def _losses(
    trainee: Any, phase: Phase, pool: Pool, rng: np.random.Generator, accelerator: Accelerator
) -> dict[str, torch.Tensor]:
    """Of a batch that follows from ``rng``."""
    if phase.weights is None:
        losses: dict[str, torch.Tensor] = trainee(batches.token_batch(pool, rng, phase.videos).to(accelerator.device))
        return losses
    drop, favour, keep_positions = rng.random(3)
    kept, videos = Kept(VIDEO_TOKENS), max(1, round(phase.videos * _WHOLE_VIDEOS))
    if drop < phase.drop:
        # As many batches between 10 % and 20 % as between 20 % and 40 %.
        share = math.exp(rng.uniform(math.log(_FEWEST_TOKENS), math.log(phase.most)))
        often = _FAVOUR_THINGS if phase.things else _FAVOUR if favour < 0.5 else 1.0
        kept, videos = Kept(round(share * VIDEO_TOKENS), often), phase.videos
    weights = dict(zip(CATEGORIES, phase.weights, strict=True))
    batch = batches.question_batch(pool, rng, videos, weights, kept, QUESTIONS_OF_EACH).to(accelerator.device)
    losses = trainee(batch, phase.things or keep_positions < 0.5)
    return losses


def _optimizers(trainee: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between a layer's input and output, AdamW for all else, as in the toy world."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in trainee.named_parameters():
        inner = parameter.ndim == 2 and ("layers." in name or "projector." in name)
        (matrices if inner else others).append(parameter)
    return [
        torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine."""
    fall = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / _WARM_UP) * (_LAST_RATE + (1 - _LAST_RATE) * fall)


@torch.no_grad()
def _match_scales(model: Model, scale: Scale, pool: Pool) -> None:
    """Words and video tokens enter the language model with a standard deviation of 1, as in the toy world."""
    projector: Any = model.model.multi_modal_projector
    batch = batches.token_batch(pool, np.random.default_rng(0), 50).to(scale.mean.device)
    deviation = projected(projector, scale, batch.features).std()
    projector.linear_2.weight /= deviation
    projector.linear_2.bias /= deviation
    words: Any = model.get_input_embeddings().weight
    words /= words.std()


@torch.no_grad()
def _check_tokens(run: Run, trainee: Any, videos: Pool) -> None:
    """Record how often each head is right about tokens that show a thing; about all tokens where they are."""
    trainee.eval()
    batch = batches.token_batch(videos, np.random.default_rng(0), 200).to(run.accelerator.device)
    said, thing = trainee.said(batch.features), batch.tokens.color > 0
    hits = {name: said[name].argmax(-1) == label for name, label in _labels(batch.tokens)}
    found = {name: hit[thing].float().mean().item() for name, hit in hits.items()}
    off = (said["offset"] - batch.tokens.offset)[thing].abs().mean().item()
    nothing = (said["color"].argmax(-1) == 0)[~thing].float().mean().item()
    run.record(tokens={**found, "cells_off": off, "nothing": nothing})
    trainee.train()


def _check(trainee: Any, videos: Pool, accelerator: Accelerator) -> dict[str, float]:
    trainee.eval()
    with accelerator.autocast():
        found = accuracies(trainee, videos)
    trainee.train()
    return found


def main(given: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", required=True, type=Path, metavar="FOLDER", help="that photoworld.pool filled")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of what is random in training (0)")
    parser.add_argument("--clips", type=int, help="of the pool that are trained with (all that are there)")
    parser.add_argument("--videos", type=int, help="of the pool that are checked with (all that are there)")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU even where there is a GPU")
    arguments = parser.parse_args(given)
    pool = Pool(arguments.pool, "train", arguments.clips)
    videos = Pool(arguments.pool, "validation", arguments.videos)
    folder = train(arguments.output, pool, videos, arguments.seed, cpu=arguments.cpu)
    print(f"checkpoint in {folder}")


if __name__ == "__main__":
    main()
