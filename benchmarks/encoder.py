"""What a vision encoder takes against the number of patches that it computes, beside what Inductor makes of all.

    python -m earlytom_compile.benchmarks.encoder --shape llava-onevision-0.5b --frames 32 --json encoder.json

    arm                patches computed   ms     range       of its time   of its work   time / work      (made up)
    inductor           23328              61.0   60.8-61.4          100%          100%   1.00
    encode_ratio 0.5   11664              34.1   34.0-34.5           56%           54%   1.04, met
    as it changes       5103              ...

Arms take turns on the frames of a drawn still camera, and each keeps its budget whatever the video shows; the last one
has none. The work is that of ``flops.count(protocol="exact")``, which the time is to exceed by a fifth at most on a
GPU. An encoder that computes all must return what the tower returns.
"""

import argparse
import functools
import json
import statistics
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

import earlytom_compile
from earlytom_compile.benchmarks import markdown
from earlytom_compile.benchmarks.environment import environment
from earlytom_compile.benchmarks.measure import timed
from earlytom_compile.benchmarks.still_camera import Take, draw_frames
from earlytom_compile.benchmarks.workload import random_tower
from earlytom_compile.config import EarlyTomConfig
from earlytom_compile.flops import Reuse, count
from earlytom_compile.integrations.pixels import PixelSettings
from earlytom_compile.integrations.tower import MergedFrames
from earlytom_compile.shapes import LlavaShape, ModelShape, config_of, shape_of

RATIOS = (1.0, 0.5, 0.35, 0.25, 0.15)
MOST_TIME_FOR_WORK = 1.2
"""What a share of the time is to be at most on an H200, in shares of the work."""
_FREE = "as it changes"
Encoders = dict[str, Callable[[Tensor], Any]]
"""By name, of pixels [F, 3, H, W]."""
HEADINGS = ("arm", "patches computed", "ms", "range", "of its time", "of its work", "time / work", "error")


@dataclass
class Row:
    """What was measured of one arm; times in seconds."""

    arm: str
    computed: int  # patches
    work: float  # of the encoder, in operations
    seconds: list[float] = field(default_factory=list)
    error: float | None = None  # of what it returns, over the largest value; where all is computed
    failure: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def still_pixels(frames: int, size: int) -> Tensor:
    """float32 [frames, 3, size, size] as SigLIP gets them: a second apart, before a camera that stands still."""
    drawn = np.stack(list(draw_frames(Take(seconds=frames, rate=1))))
    settings = PixelSettings({"height": size, "width": size}, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    return settings.apply(drawn)


def encoders(tower: Any, ratios: Sequence[float], options: dict[str, Any]) -> Encoders:
    """Every arm, first the tower that computes all, compiled if the others are; nothing is before its first call."""
    compiled = options["lowering"] != "eager"
    whole = torch.compile(tower, dynamic=False) if compiled else tower
    made: Encoders = {"inductor" if compiled else "tower": lambda pixels: whole(pixels).last_hidden_state}
    reusing = functools.partial(earlytom_compile.compile_tower, tower, variant="plus", **options)
    for ratio in ratios:
        made[f"encode_ratio {ratio:g}"] = reusing(encode_ratio=ratio)
    made[_FREE] = reusing()
    return made


def computed_by(encoded: Tensor | MergedFrames, every: int) -> int:
    """Patches that a call computed, by what it returned."""
    computed_in = encoded.computed_in if isinstance(encoded, MergedFrames) else None
    if computed_in is None:
        return every
    frame = torch.arange(len(computed_in), device=computed_in.device)[:, None]
    return int((computed_in == frame).sum())


def work(shape: ModelShape, frames: int, computed: int, full_layers: tuple[int, ...]) -> float:
    """Operations of the encoder alone."""
    reuse = Reuse(computed, full_layers)
    return count(shape, protocol="exact", frames_schedule=(frames,), llm_tokens=0, reuse=reuse).encoder


def first_calls(encode: Encoders, pixels: Tensor, shape: ModelShape, full: Tensor) -> list[Row]:
    """Compile, and see what each computes; an arm that breaks has a row that says so. ``full``: what the tower
    itself returns."""
    every, rows = len(pixels) * shape.frame_tokens, []
    layers = EarlyTomConfig(reuse=True).resolve_full_layers(shape.vision_layers)
    for name, call in encode.items():
        print(f"{name}: first call", flush=True)
        try:
            call(pixels)
            encoded = call(pixels)
            computed = computed_by(encoded, every)
            row = Row(name, computed, work(shape, len(pixels), computed, layers))
            if computed == every:
                hidden = encoded.hidden if isinstance(encoded, MergedFrames) else encoded
                row.error = float((hidden - full).abs().max() / full.abs().max())
        except Exception as broken:  # one that does not compile must not take the others their turn
            traceback.print_exc()
            row = Row(name, 0, 0.0, failure=f"{type(broken).__name__}: {broken}".partition("\n")[0])
        rows.append(row)
    return rows


def cells(row: Row, reference: Row, on_gpu: bool) -> tuple[str, ...]:
    """A row as text, beside the one that computes all."""
    if row.failure or not row.seconds:
        return (row.arm, row.failure or "not timed", *[""] * (len(HEADINGS) - 2))
    median, least, most = (f"{1e3 * value:.1f}" for value in (row.median, min(row.seconds), max(row.seconds)))
    shares = ("", "", "")
    if reference.seconds:
        time, done = row.median / reference.median, row.work / reference.work
        verdict = ""
        if on_gpu and row is not reference:
            verdict = ", met" if time / done <= MOST_TIME_FOR_WORK else ", MISSED"
        shares = f"{time:.0%}", f"{done:.0%}", f"{time / done:.2f}{verdict}"
    error = "" if row.error is None else f"{row.error:.0e}"
    return (row.arm, str(row.computed), median, f"{least}-{most}", *shares, error)


def to_markdown(content: Mapping[str, Any], rows: Sequence[Row], on_gpu: bool) -> str:
    """For documents."""
    about = dict(content)
    what = f"vision encoder of {about.pop('shape')}, {about.pop('frames')} frames"
    title = f"{what}, time / work at most {MOST_TIME_FOR_WORK} on an H200"
    table = markdown.table(title, HEADINGS, [cells(row, rows[0], on_gpu) for row in rows])
    return "\n".join([*markdown.heading(about), *table]) + "\n"


def is_wrong(row: Row, dtype: torch.dtype) -> bool:
    """Whether an arm broke, or computed all and returned something else: more than a few hundred roundings off."""
    return bool(row.failure) or (row.error or 0) > 300 * torch.finfo(dtype).eps


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> int:
    """Measure in turn, print, and write after every round; 1 when an arm computes something else."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llava-onevision-0.5b", help="(%(default)s; the 7B model has this encoder)")
    parser.add_argument("--frames", type=int, default=32, help="(%(default)s)")
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS), help="budgets (%(default)s)")
    parser.add_argument("--repeats", type=int, default=20 if on_gpu else 5, help="rounds (%(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if on_gpu else "cpu", help="(%(default)s)")
    parser.add_argument("--lowering", default="staged", help="(%(default)s)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args(argv)
    on_gpu, dtype = arguments.device == "cuda", torch.bfloat16 if arguments.device == "cuda" else torch.float32
    shape, config = shape_of(arguments.shape), config_of(arguments.shape)
    if not isinstance(shape, LlavaShape):
        parser.error(
            f"--shape {arguments.shape}: unchanged patches are reused in the towers of LLaVA; give one of those"
        )
    tower = random_tower(config, device=arguments.device, dtype=dtype)
    pixels = still_pixels(arguments.frames, shape.image_size).to(arguments.device, dtype)
    about = {**environment(pixels.device), "shape": arguments.shape, "frames": arguments.frames}
    about |= {"dtype": str(dtype).removeprefix("torch."), "lowering": arguments.lowering}
    # Every arm compiles the same functions for itself, and Dynamo counts them together.
    with torch._dynamo.config.patch(recompile_limit=256):
        encode = encoders(tower, arguments.ratios, {"lowering": arguments.lowering, "strict": True})
        rows = first_calls(encode, pixels, shape, tower(pixels).last_hidden_state)
        for number in range(arguments.repeats):
            print(f"round {number + 1} of {arguments.repeats}", flush=True)
            for row in rows:
                if not row.failure:
                    row.seconds.append(timed(functools.partial(encode[row.arm], pixels), pixels.device)[0])
            _write(arguments, about, rows, on_gpu)
    Console(width=120).print(to_markdown(about, rows, on_gpu), markup=False, highlight=False)
    return int(any(is_wrong(row, dtype) for row in rows))


def _write(arguments: argparse.Namespace, about: dict[str, Any], rows: Sequence[Row], on_gpu: bool) -> None:
    if arguments.json:
        content = {**about, "target": MOST_TIME_FOR_WORK, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if arguments.markdown:
        arguments.markdown.write_text(to_markdown(about, rows, on_gpu), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
