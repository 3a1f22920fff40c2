"""Train the toy world's model from nothing: three quarters of an hour on one CPU core, in bfloat16.

    ACCELERATE_MIXED_PRECISION=bf16 python -m earlytom_compile.toyworld.train --output runs/0 --seed 0
    accelerate launch --mixed_precision bf16 -m earlytom_compile.toyworld.train --output runs/0 --seed 0

Matrix products in float32 take several times as long where the CPU has instructions for bfloat16.

Phases: the vision encoder learns to say what each patch shows; with the encoder frozen, the language model
learns first what is where and then what moves; last, all of it together. Of the video tokens, a random part
is dropped in training: a model that has only ever seen whole videos answers worse once the tokens that remain
are numbered anew, and an accuracy measured with it would tell more about positions than about compression.

A run that finds its own state in ``--output`` continues there. At the end the folder holds ``checkpoint``,
``history.jsonl`` and ``curves.png``.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch import nn
from torch.nn import functional as F
from transformers import LlavaOnevisionForConditionalGeneration

from earlytom_compile.toyworld.answers import answer_logits, normalized
from earlytom_compile.toyworld.batches import IGNORED, Cells, PatchBatch, QuestionBatch, patch_batch, question_batch
from earlytom_compile.toyworld.model import GRID, POOLED, SHAPE, VIDEO_TOKENS, build_model, save
from earlytom_compile.toyworld.questions import CATEGORIES, TRAINING_CATEGORIES
from earlytom_compile.toyworld.world import COLORS, SHAPES

QUESTIONS_OF_EACH = 12
CHECK_VIDEOS = 200
_CHECK_AT_ONCE = 50
CHECK_EVERY = 250  # steps
SAVE_EVERY = 200  # steps
_MOST_NOISE = 6.0  # standard deviation, in grey levels of 255
_FEWEST_TOKENS = 0.08
_WARM_UP = 50  # steps
_LAST_RATE = 0.05  # of the highest
RENUMBERED, BOTH = "renumbered", "both"
"""Positions of the tokens that are left where some are dropped: numbered anew, or kept in half of these batches."""


@dataclass(frozen=True)
class Phase:
    """``weights`` of the categories of questions, in the order of TRAINING_CATEGORIES; None: patch labels.

    ``drop`` is the share of batches that lose video tokens.
    """

    name: str
    steps: int
    videos: int
    rate: float
    weights: tuple[float, ...] | None = None
    encoder: bool = False
    drop: float = 0.0


PHASES = (
    Phase("patches", 4000, 16, 2e-3, encoder=True),
    Phase("binding", 500, 16, 4e-3, (1, 0, 1, 1, 1, 4), drop=0.2),
    Phase("motion", 1000, 16, 4e-3, (1, 4, 0.5, 1, 1, 2), drop=0.3),
    Phase("together", 2500, 16, 3e-3, (1, 4, 1, 1.5, 1.5, 1), encoder=True, drop=0.6),
)


class PatchTrainee(nn.Module):
    """The vision path with heads that say what each patch shows and, behind projector and pooling, each video token.

    Where a patch is has to be said too: it is an input of the encoder, and no other label would keep it to the end.
    """

    def __init__(self, model: LlavaOnevisionForConditionalGeneration) -> None:
        super().__init__()
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        self.pool = model.model.apply_pooling
        self.heads = nn.ModuleList([_CellHeads(SHAPE.vision_width, GRID), _CellHeads(SHAPE.text_width, POOLED)])

    def forward(self, batch: PatchBatch) -> dict[str, torch.Tensor]:
        patches = self.tower(normalized(noisy(batch.frames)), output_hidden_states=True).hidden_states[-1]
        tokens = self.pool(self.projector(patches))
        of_patches, of_tokens = self.heads[0](patches, batch.patches), self.heads[1](tokens, batch.tokens)
        return {name: of_patches[name] + of_tokens[name] for name in of_patches}


class _CellHeads(nn.Module):
    """Linear heads for what a cell shows and where it is; thrown away afterwards."""

    def __init__(self, width: int, grid: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.color = nn.Linear(width, 1 + len(COLORS))
        self.shape = nn.Linear(width, 1 + len(SHAPES))
        self.flashes = nn.Linear(width, 2)
        self.offset = nn.Linear(width, 2)
        self.place = nn.Linear(width, grid**2)

    def forward(self, hidden: torch.Tensor, cells: Cells) -> dict[str, torch.Tensor]:
        hidden = self.norm(hidden)
        something = cells.color > 0
        place = torch.arange(hidden.shape[1], device=hidden.device).repeat(len(hidden))
        return {
            "color": F.cross_entropy(self.color(hidden).flatten(0, 1), cells.color.flatten()),
            "shape": F.cross_entropy(self.shape(hidden).flatten(0, 1), cells.shape.flatten()),
            "flashes": F.cross_entropy(self.flashes(hidden).flatten(0, 1), cells.flashes.flatten()),
            "offset": F.smooth_l1_loss(self.offset(hidden)[something], cells.offset[something], beta=0.1),
            "place": F.cross_entropy(self.place(hidden).flatten(0, 1), place),
        }


class AnswerTrainee(nn.Module):
    """The whole model on rows of questions; the encoder only runs forward where it is frozen."""

    def __init__(
        self, model: LlavaOnevisionForConditionalGeneration, phase: Phase, positions: str = RENUMBERED
    ) -> None:
        super().__init__()
        self.model, self.phase, self.positions = model, phase, positions
        model.model.vision_tower.requires_grad_(phase.encoder)

    def forward(self, batch: QuestionBatch) -> dict[str, torch.Tensor]:
        tokens, places = video_tokens(self.model, noisy(batch.frames), batch.index), None
        if torch.rand(()) < self.phase.drop:
            share = _FEWEST_TOKENS + (1 - _FEWEST_TOKENS) * torch.rand(()).item()
            tokens, kept = some_of(tokens, round(VIDEO_TOKENS * share))
            if self.positions == BOTH and torch.rand(()) < 0.5:
                places = list(kept)
        logits, labels = answer_logits(self.model, list(tokens), batch.rows, places)
        return {"answers": F.cross_entropy(logits, labels)}


def noisy(frames: torch.Tensor) -> torch.Tensor:
    """uint8 RGB [F, 96, 96, 3] with as much noise as a codec leaves, float32."""
    strength = _MOST_NOISE * torch.rand(len(frames), 1, 1, 1, device=frames.device)
    return (frames + strength * torch.randn(frames.shape, device=frames.device)).clamp(0, 255)


def video_tokens(
    model: LlavaOnevisionForConditionalGeneration, frames: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """[V, 128, C]: encodes the distinct ``frames`` and puts them where ``index`` [V, 8] says."""
    inner = model.model
    hidden = inner.vision_tower(normalized(frames), output_hidden_states=True).hidden_states[-1]
    pooled = inner.apply_pooling(inner.multi_modal_projector(hidden))
    return pooled[index].flatten(1, 2)


def some_of(tokens: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``keep`` of each row's tokens [V, T, C], at random, in their order, and their places, int64 [V, keep]."""
    order = torch.rand(tokens.shape[:2], device=tokens.device).argsort(1)[:, :keep].sort(1).values
    return tokens.gather(1, order[..., None].expand(-1, -1, tokens.shape[-1])), order


@torch.no_grad()
def accuracies(model: LlavaOnevisionForConditionalGeneration, videos: int) -> dict[str, float]:
    """Share of right answers by category, on the first validation videos with all tokens."""
    right, asked = ([0] * len(CATEGORIES) for _ in range(2))
    device = next(model.parameters()).device
    for first in range(0, videos, _CHECK_AT_ONCE):
        seeds = range(first, first + _CHECK_AT_ONCE)
        batch = question_batch(seeds, dict.fromkeys(CATEGORIES, 1.0), QUESTIONS_OF_EACH, "validation").to(device)
        logits, labels = answer_logits(model, list(video_tokens(model, batch.frames, batch.index)), batch.rows)
        categories = batch.rows.category[batch.rows.labels != IGNORED]
        hits = logits.argmax(-1) == labels
        for category, hit in zip(categories[::2].tolist(), hits[::2].tolist(), strict=True):
            asked[category] += 1
            right[category] += hit
    return {name: r / max(n, 1) for name, r, n in zip(CATEGORIES, right, asked, strict=True)}


# --- The loop -----------------------------------------------------------------------------------------


class Run:
    """One training run in one folder: where it is, its state on disk, its history."""

    def __init__(self, folder: Path, seed: int, phases: tuple[Phase, ...], accelerator: Accelerator) -> None:
        self.folder, self.seed, self.accelerator = folder, seed, accelerator
        self.names = [phase.name for phase in phases]
        self.phase, self.step = 0, 0
        folder.mkdir(parents=True, exist_ok=True)
        self._goes_on = self._progress.exists()
        if self._goes_on:
            progress = json.loads(self._progress.read_text())
            if progress["seed"] != seed:
                raise SystemExit(f"{folder} holds a run with seed {progress['seed']}, not {seed}: name another folder.")
            self.phase, self.step = progress["phase"], progress["step"]
            self._forget_what_was_not_saved()

    @property
    def history(self) -> Path:
        """Losses and accuracies, a JSON object a line."""
        return self.folder / "history.jsonl"

    @property
    def _progress(self) -> Path:
        return self.folder / "state" / "progress.json"

    def begin_phase(self) -> None:
        """Load what was saved of this phase, once prepared; or from here on, what is on disk belongs to it."""
        if self._goes_on:
            self.accelerator.load_state(str(self.folder / "state"))
            self._goes_on = False
        else:
            self.save()

    def save(self) -> None:
        """Everything that going on needs."""
        self.accelerator.save_state(str(self.folder / "state"))
        if self.accelerator.is_main_process:
            self._progress.write_text(json.dumps({"seed": self.seed, "phase": self.phase, "step": self.step}))

    def _forget_what_was_not_saved(self) -> None:
        """Those steps are done again."""
        if self.history.exists() and self.accelerator.is_main_process:
            lines = [json.loads(line) for line in self.history.read_text(encoding="utf-8").splitlines()]
            now = self.phase, self.step
            kept = [line for line in lines if (self.names.index(line["phase"]), line["step"]) <= now]
            self.history.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def record(self, **values: Any) -> None:
        """A line of the history."""
        values = {"phase": self.names[self.phase], "step": self.step, **values}
        if self.accelerator.is_main_process:
            with open(self.history, "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
            print(json.dumps(values), flush=True)


def train(
    folder: Path, seed: int, phases: tuple[Phase, ...] = PHASES, *, cpu: bool = False, positions: str = RENUMBERED
) -> Path:
    """Run what is left of ``phases`` and return the checkpoint's folder."""
    # The vision tower's last norm is no part of what reaches the projector, and gets no gradient.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=cpu, kwargs_handlers=[unused])
    set_seed(seed)
    run = Run(folder, seed, phases, accelerator)
    model = build_model(seed).train()
    # Its matrix products run in the precision of the others; the fused kernels of a CPU are slower in bfloat16.
    model.set_attn_implementation("eager")
    while run.phase < len(phases):
        first_seed = sum(p.steps * p.videos for p in phases[: run.phase])
        _run_phase(run, model, phases[run.phase], first_seed, positions)
        run.phase, run.step = run.phase + 1, 0
    if accelerator.is_main_process:
        save(model.eval(), folder / "checkpoint")
        draw_curves(run.history, folder / "curves.png")
    accelerator.wait_for_everyone()
    return folder / "checkpoint"


def _run_phase(
    run: Run, model: LlavaOnevisionForConditionalGeneration, phase: Phase, first_seed: int, positions: str
) -> None:
    accelerator = run.accelerator
    trainee = PatchTrainee(model) if phase.weights is None else AnswerTrainee(model, phase, positions)
    trainee, *optimizers = accelerator.prepare(trainee, *_optimizers(trainee))
    run.begin_phase()
    for batch in _batches(run, phase, first_seed):
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = phase.rate * _rate(run.step, phase.steps)
        losses = trainee(batch.to(accelerator.device))
        accelerator.backward(sum(losses.values()))
        accelerator.clip_grad_norm_(trainee.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        run.step += 1
        if run.step % 50 == 0 or run.step == phase.steps:
            run.record(**{k: v.item() for k, v in losses.items()})
        if phase.weights and (run.step % CHECK_EVERY == 0 or run.step == phase.steps):
            run.record(validation=_check(model))
        if run.step % SAVE_EVERY == 0:
            run.save()
    accelerator.free_memory()
    if phase.weights is None:
        _match_scales(model, accelerator.device)


def _optimizers(trainee: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between a layer's input and output, with which the language model learns to look things
    up in half as many steps as with AdamW; AdamW for all else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in trainee.named_parameters():
        if parameter.requires_grad:
            inner = parameter.ndim == 2 and ("layers." in name or "projector." in name)
            (matrices if inner else others).append(parameter)
    return [
        torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.01),
    ]


@torch.no_grad()
def _match_scales(model: LlavaOnevisionForConditionalGeneration, device: torch.device) -> None:
    """Words and video tokens enter the language model with a standard deviation of 1.

    The encoder's features have any scale, and what has a large one is hardly changed by the first layers: without
    this, learning takes twice as many steps.
    """
    batch = question_batch(range(_CHECK_AT_ONCE), {"place": 1.0}, 1).to(device)
    projector: Any = model.model.multi_modal_projector
    projector.linear_2.weight /= video_tokens(model, batch.frames, batch.index).std()
    words: Any = model.get_input_embeddings().weight
    words /= words.std()


def _batches(run: Run, phase: Phase, first_seed: int) -> Iterator[Any]:
    """The batches of the steps that are left: every video once in the whole run, whatever the processes."""
    processes, process = run.accelerator.num_processes, run.accelerator.process_index

    def batch(step: int) -> Any:
        first = processes * first_seed + (processes * step + process) * phase.videos
        seeds = range(first, first + phase.videos)
        if phase.weights is None:
            return patch_batch(seeds)
        return question_batch(seeds, dict(zip(TRAINING_CATEGORIES, phase.weights, strict=True)), QUESTIONS_OF_EACH)

    # Drawing takes a tenth of a step on a CPU; only a GPU would wait for it.
    workers = 8 if run.accelerator.device.type == "cuda" else 0
    dataset: Any = _Steps(batch)
    yield from torch.utils.data.DataLoader(
        dataset,
        batch_size=None,
        sampler=range(run.step, phase.steps),
        num_workers=workers,
        generator=torch.Generator(),  # of its own: a run that goes on must not draw from the training's once more
    )


class _Steps:
    def __init__(self, batch: Callable[[int], Any]) -> None:
        self.batch = batch

    def __getitem__(self, step: int) -> Any:
        return self.batch(step)


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine."""
    fall = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / _WARM_UP) * (_LAST_RATE + (1 - _LAST_RATE) * fall)


def _check(model: LlavaOnevisionForConditionalGeneration) -> dict[str, float]:
    model.eval()
    found = accuracies(model, CHECK_VIDEOS)
    model.train()
    return found


def draw_curves(history: Path, picture: Path) -> None:
    """Losses above, accuracy on the validation videos below, against the steps of the whole run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in history.read_text(encoding="utf-8").splitlines()]
    starts: dict[str, int] = {}
    for line in lines:
        starts.setdefault(line["phase"], sum(_last_steps(lines, starts)))
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    for name in ("color", "shape", "flashes", "offset", "place", "answers"):
        points = [(starts[line["phase"]] + line["step"], line[name]) for line in lines if name in line]
        if points:
            top.plot(*zip(*points, strict=True), label=name)
    checks = [line for line in lines if "validation" in line]
    for name in CATEGORIES:
        points = [(starts[line["phase"]] + line["step"], line["validation"][name]) for line in checks]
        if points:
            bottom.plot(*zip(*points, strict=True), label=name)
    for axes in (top, bottom):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        axes.grid(alpha=0.3)
        for start in starts.values():
            axes.axvline(start, color="grey", linewidth=0.5)
    top.set(yscale="log", ylabel="loss", title=" | ".join(starts))
    bottom.set(ylim=(0, 1), ylabel="accuracy, validation", xlabel="step")
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def _last_steps(lines: list[dict[str, Any]], phases: dict[str, int]) -> list[int]:
    """Steps of each of these phases."""
    return [max(line["step"] for line in lines if line["phase"] == phase) for phase in phases]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of what is random in training (0)")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU even where there is a GPU")
    parser.add_argument(
        "--positions",
        choices=(RENUMBERED, BOTH),
        default=RENUMBERED,
        help="of the tokens that are left where some are dropped: numbered anew, or kept in half of these batches "
        "(%(default)s)",
    )
    arguments = parser.parse_args()
    folder = train(arguments.output, arguments.seed, cpu=arguments.cpu, positions=arguments.positions)
    print(f"checkpoint in {folder}")


if __name__ == "__main__":
    main()
