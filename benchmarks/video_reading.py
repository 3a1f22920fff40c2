"""What reading 32 frames of a video costs: by seeking, by decoding everything, and made small while decoding.

    python -m earlytom_compile.benchmarks.video_reading --minutes 60          # a drawn video of 640x360, and 20 s of 4K
    python -m earlytom_compile.benchmarks.video_reading talk.mp4 walk.mkv     # files of one's own

Each way has a process of its own: processor seconds of all its threads, seconds waited, and the most memory that it
held at once, Python and the imports included. Linux only.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

# Plain PyAV, as the tutorials have it: the yardstick shares no code with what it measures.
_EVERYTHING = """
import sys, av, numpy as np
path, total, frames = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
wanted = set(np.linspace(0, total - 1, frames, dtype=np.int64).tolist())
with av.open(path) as container:
    container.streams.video[0].thread_type = "AUTO"
    decoded = enumerate(container.decode(video=0))
    kept = np.stack([frame.to_ndarray(format="rgb24") for i, frame in decoded if i in wanted])
"""
_SEEKING = """
import sys
from earlytom_compile.integrations.video import read_video
read_video(sys.argv[1], int(sys.argv[3]))
"""
_SMALL = """
import sys
from earlytom_compile.integrations.preprocess import PixelSettings
from earlytom_compile.integrations.video import read_video
small = PixelSettings({"height": 384, "width": 384})
read_video(sys.argv[1], int(sys.argv[3]), resize=small.resized_frame)
"""
WAYS = {"decoding everything": _EVERYTHING, "read_video": _SEEKING, "read_video, 384x384 while decoding": _SMALL}
# At the end of each. What the parent is told (ru_maxrss) has the memory of the parent in it, which was copied first.
_MOST_MEMORY = """
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""
_NO_VIDEO = "import earlytom_compile.integrations.preprocess"  # torch, which the last way needs


class Cost(NamedTuple):
    """Of one process."""

    processor: float  # seconds, of all threads
    waited: float  # seconds
    memory: int  # bytes, the most at once


def main(arguments: list[str] | None = None) -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("videos", nargs="*", type=Path, help="files to read; without any, drawn ones")
    parser.add_argument("--minutes", type=float, default=60, help="length of the drawn video (%(default)s)")
    parser.add_argument("--frames", type=int, default=32, help="to take of each (%(default)s)")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="earlytom-") as folder:
        print("| video | way | processor s | waited s | memory MB |\n|---|---|---|---|---|")
        for video in given.videos or _drawn_videos(Path(folder), given.minutes):
            total = _count(video)
            name = f"{video.name}, {total} frames, {video.stat().st_size / 1e6:.0f} MB"
            for way, code in WAYS.items():
                cost = measured(code, str(video), str(total), str(given.frames))
                print(f"| {name} | {way} | {cost.processor:.1f} | {cost.waited:.1f} | {cost.memory / 1e6:.0f} |")
    cost = measured(_NO_VIDEO)
    print(f"\nImporting torch and transformers, in the last way: {cost.processor:.1f} s, {cost.memory / 1e6:.0f} MB.")
    return 0


def measured(code: str, *arguments: str) -> Cost:
    """What running ``code`` in a Python of its own costs; raises :class:`subprocess.CalledProcessError` if it fails."""
    command = [sys.executable, "-P", "-c", code + _MOST_MEMORY, *arguments]
    before, start = _spent(), time.perf_counter()
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    waited = time.perf_counter() - start
    return Cost(_spent() - before, waited, int(printed.split()[-1]) * 1024)


def _spent() -> float:
    """Processor seconds of all processes so far that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _drawn_videos(folder: Path, minutes: float) -> Iterator[Path]:
    for name, width, height, seconds in (("640x360.mp4", 640, 360, 60 * minutes), ("3840x2160.mp4", 3840, 2160, 20)):
        draw(folder / name, width, height, round(30 * seconds))
        yield folder / name


def draw(file: Path, width: int, height: int, frames: int) -> None:
    """H.264 at 30 frames a second with a key frame every 250: a ramp that moves under a little noise."""
    noise = np.random.default_rng(0).integers(0, 24, (height, width, 3), dtype=np.uint8)
    ramp = np.linspace(0, 200, 2 * width, dtype=np.uint8)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "ultrafast", "g": "250"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            start = index % width
            picture = np.roll(noise, index, axis=1) + ramp[None, start : start + width, None]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def _count(video: Path) -> int:
    with av.open(str(video)) as container:
        return container.streams.video[0].frames or sum(1 for _ in container.decode(video=0))


if __name__ == "__main__":
    sys.exit(main())
