"""One compiled vision path for videos of every length, against one made for a single length.

    python -m earlytom_compile.benchmarks.video_lengths --shape cpu-small --frames 32 --repeats 12

Encodes a video of ``--frames`` frames with both, in turn, after each has been warmed up; then videos of 1, 2, ... as
many frames with the first, and counts its compilations.
"""

import argparse
import statistics
import sys
import time

import torch

import earlytom_compile
from earlytom_compile.benchmarks.arms import twin_of
from earlytom_compile.benchmarks.workload import make_inputs, random_model
from earlytom_compile.shapes import config_of


def main(arguments: list[str] | None = None) -> int:
    """Print medians and ranges in seconds, their ratio, and what was compiled."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--shape", default="cpu-small", metavar="NAME", help="random weights in this shape")
    parser.add_argument("--frames", type=int, default=32, help="of the video (%(default)s)")
    parser.add_argument("--repeats", type=int, default=12, help="timed runs of each (%(default)s)")
    given = parser.parse_args(arguments)
    model = random_model(config_of(given.shape), device="cpu", dtype=torch.float32)
    video = make_inputs(model, frames=given.frames)["pixel_values_videos"]
    names = "any length", "one length"
    arms = {name: earlytom_compile.compile(twin_of(model), retain_ratio=0.1, variant="paper") for name in names}
    arms["one length"].__dict__["_earlytom"].encoder.any_length = False
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for run in range(given.repeats + 1):
        for name, arm in arms.items():
            start = time.perf_counter()
            earlytom_compile.encode_videos(arm, video)
            if run > 0:
                seconds[name].append(time.perf_counter() - start)
    for name, runs in seconds.items():
        print(f"{name}: median {statistics.median(runs):.3f} s, {min(runs):.3f} to {max(runs):.3f}")
    ratio = statistics.median(seconds["any length"]) / statistics.median(seconds["one length"])
    print(f"any length takes {ratio:.3f} of the time of one length")
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for frames in range(1, given.frames + 1):
        earlytom_compile.encode_videos(arms["any length"], video[:, :frames])
    more = graphs["unique_graphs"] - before
    print(f"videos of 1 to {given.frames} frames: {1 + more} compilations, {more} of them after the first")
    return 0


if __name__ == "__main__":
    sys.exit(main())
