"""What a video costs against its number of frames (pictures): time to encode it, and memory at the peak.

    python -m earlytom_compile.benchmarks.long_videos --shape cpu-small --frames 8,16,32,64,128,256,512,768 --repeats 3

Each video is made of scenes and encoded in place with everything compiled, once more than is timed; the fastest call
counts. On a CPU seconds are those that its cores have worked for the process, to which whatever else runs there adds
little. Memory is what the process (or the GPU) holds at most during a call beyond what it held before: on a CPU
that can be told on Linux only.
A line through the times, and the largest deviation from it, say whether the time is linear.
"""

import argparse
import ctypes
import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import earlytom_compile
from earlytom_compile.benchmarks.environment import environment
from earlytom_compile.benchmarks.markdown import heading, table
from earlytom_compile.benchmarks.workload import make_inputs, random_model
from earlytom_compile.model_shape import ModelShape
from earlytom_compile.qwen_shape import QwenShape
from earlytom_compile.shapes import config_of, shape_of

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True)
class Cost:
    """Of one number of frames."""

    frames: int  # pictures
    seconds: float  # of the fastest call
    peak: int | None  # bytes
    hidden: int  # bytes of the encoder's hidden state of all frames


def main(arguments: list[str] | None = None) -> int:
    """Print a table, and what a line through the times says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--shape", default="cpu-small", metavar="NAME", help="random weights in this shape")
    parser.add_argument("--frames", default="8,16,32,64,128,256,512,768", help="comma-separated (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each (%(default)s)")
    parser.add_argument("--variant", default="plus", choices=("paper", "released", "plus"))
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    shape, model = shape_of(given.shape), random_model(config_of(given.shape), device=device, dtype=dtype)
    earlytom_compile.compile(model, retain_ratio=0.1, variant=given.variant, compile_llm=False)
    costs = [cost(model, shape, int(frames), given.repeats) for frames in given.frames.split(",")]
    print("\n".join([*heading(environment(device)), *table(given.shape, *rows(costs))]))
    print(linearity(costs))
    return 0


def cost(model: Any, shape: ModelShape, frames: int, repeats: int) -> Cost:
    """Of a video of ``frames`` pictures. The first call, which may compile, is not timed; the peak is the last's."""
    size = shape.picture_size if isinstance(shape, QwenShape) else None
    inputs = make_inputs(model, frames=frames, picture_size=size)
    video = inputs.pop("pixel_values_videos")
    of_video = {name: x for name, x in inputs.items() if "video" in name}

    def encode() -> None:
        earlytom_compile.encode_videos(model, video, **of_video)

    encode()
    runs = [_timed(encode, video.device) for _ in range(repeats)]
    hidden = shape.frames_of(frames) * shape.frame_tokens * shape.vision_width * video.element_size()
    return Cost(frames, min(seconds for seconds, _ in runs), runs[-1][1], hidden)


def _timed(call: Callable[[], Any], device: torch.device) -> tuple[float, int | None]:
    before = _start_peak(device)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = clock() - start
    if device.type == "cuda":
        return seconds, torch.cuda.max_memory_allocated(device) - before
    return seconds, _of_process("VmHWM") - before if _RESET.exists() else None


def _start_peak(device: torch.device) -> int:
    """Bytes held now, from which on the peak counts."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if not _RESET.exists():
        return 0
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed and not given back
    _RESET.write_text("5", encoding="ascii")
    return _of_process("VmRSS")


def _of_process(name: str) -> int:
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


def rows(costs: Sequence[Cost]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells."""
    headings = ["frames", "seconds", "milliseconds a frame", "peak MiB", "hidden state of all frames, MiB"]
    cells = [
        [
            str(each.frames),
            f"{each.seconds:.2f}",
            f"{1e3 * each.seconds / each.frames:.1f}",
            "unknown" if each.peak is None else f"{each.peak / 2**20:.0f}",
            f"{each.hidden / 2**20:.1f}",
        ]
        for each in costs
    ]
    return headings, cells


def linearity(costs: Sequence[Cost]) -> str:
    """The least-squares line through the times, each weighted alike in relation to its size, and the exponent of the
    frames between the two longest videos (1 is linear, 2 quadratic)."""
    if len(costs) < 2:
        return "one number of frames: no line"
    frames, seconds = ([float(x) for x in column] for column in ([c.frames for c in costs], [c.seconds for c in costs]))
    weights = [1 / t for t in seconds]
    system = torch.tensor([[w, w * f] for w, f in zip(weights, frames, strict=True)], dtype=torch.float64)
    wanted = torch.tensor([w * t for w, t in zip(weights, seconds, strict=True)], dtype=torch.float64)
    start, slope = torch.linalg.lstsq(system, wanted[:, None]).solution[:, 0].tolist()
    worst = max(abs(start + slope * f - t) / t for f, t in zip(frames, seconds, strict=True))
    exponent = torch.tensor(seconds[-1] / seconds[-2]).log() / torch.tensor(frames[-1] / frames[-2]).log()
    return (
        f"seconds = {start:.3f} + {slope:.5f} x frames, at most {worst:.0%} off; between the two longest the time "
        f"grows with frames^{float(exponent):.2f}"
    )


if __name__ == "__main__":
    sys.exit(main())
