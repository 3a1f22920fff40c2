"""How much memory encoding a video takes at its peak, in a process of its own: a program, and what runs it.

    python frame_memory.py qwen3_vl 96 8192      bytes beyond what there was before, with so many places at once

A process' peak can be set back on Linux only, and another test's memory must not be in it.
"""

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

RESET = Path("/proc/self/clear_refs")
SIZES = {"vision_layers": 4, "vision_hidden": 32, "vision_heads": 2, "vision_intermediate": 1024, "image_size": 32}


def peak_of(model: str, frames: int, places_at_once: int) -> int:
    """Bytes that a child process needed beyond what it had; ``model`` is ``"llava"``, or one of tiny_qwen.KINDS."""
    command = [sys.executable, __file__, model, str(frames), str(places_at_once)]
    # Blocks from this size on go back to the system when they are freed, whatever was freed before.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16), "OMP_NUM_THREADS": "1"}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-2000:]
    return int(child.stdout.split()[-1])


def hidden_bytes(frames: int) -> int:
    """The hidden state of all frames, float32."""
    return frames * (SIZES["image_size"] // 4) ** 2 * SIZES["vision_hidden"] * 4


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


def _model_and_videos(name: str, *frames: int) -> tuple[Any, list[dict[str, Any]]]:
    """With as many places a frame, and as many channels, whatever the model is."""
    from tiny_models import tiny_llava_onevision, video_inputs
    from tiny_qwen import Clip, qwen_inputs, tiny_qwen

    side = SIZES["image_size"] // 4
    if name == "llava":
        model = tiny_llava_onevision(**SIZES)
        inputs = [video_inputs(model, count) for count in frames]
    else:
        model = tiny_qwen(name, vision_layers=SIZES["vision_layers"], full=(1, 3), deepstack=(0, 2))
        inputs = [qwen_inputs(model, [[3, Clip(count, side, side), 4]]) for count in frames]
    return model, [{key: x for key, x in each.items() if "video" in key} for each in inputs]


def _main(name: str, frames: int, places_at_once: int) -> None:
    import earlytom_compile
    from earlytom_compile import frame_chunks

    frame_chunks.PLACES_AT_ONCE = {"cpu": places_at_once}
    model, (short, video) = _model_and_videos(name, 8, frames)
    earlytom_compile.compile(
        model, variant="paper", merge_layers=(1, 2), retain_ratio=0.05, lowering="eager", compile_llm=False
    )
    earlytom_compile.encode_videos(model, **short)
    gc.collect()
    RESET.write_text("5", encoding="ascii")
    before = _status("VmRSS")
    earlytom_compile.encode_videos(model, **video)
    print(_status("VmHWM") - before)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    _main(sys.argv[1], *map(int, sys.argv[2:]))
