"""What a served model is asked under load: a checkpoint with random weights, and requests with a video file each.

    model = write_checkpoint("cpu-small", folder / "model")
    write_requests(folder / "8.json", videos=folder / "videos", first=16, count=32, frames=16)

No two requests have the same video: neither vLLM's caches of processed and encoded videos nor that of prefixes answers
any of them.
"""

import json
import typing
from pathlib import Path

import av
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from earlytom_compile.benchmarks.workload import SCENE_FRAMES, random_model
from earlytom_compile.errors import EarlyTomConfigError
from earlytom_compile.model_shape import LlavaShape
from earlytom_compile.shapes import config_of, shape_of
from earlytom_compile.toyworld.checkpoint import save_checkpoint
from earlytom_compile.toyworld.language import CHAT_TEMPLATE, build_tokenizer

QUESTION = "how many things are in the video ?"
WIDTH, HEIGHT, FPS = 320, 240, 12
_BETWEEN = 4
"""Pictures of a file for each that is sampled of it."""
_BLOCK, _BOX = 40, 48  # pixels


def write_checkpoint(shape: str, folder: Path) -> Path:
    """A LLaVA-OneVision of this shape as published checkpoints are, with a tokenizer that has a word for each id.

    Raises :class:`EarlyTomConfigError` for other models, whose checkpoints must be given."""
    if not isinstance(shape_of(shape), LlavaShape):
        raise EarlyTomConfigError(
            f"shape={shape!r}: only LLaVA-OneVision's are written here; give --model a checkpoint."
        )
    config, tokenizer = config_of(shape), build_tokenizer()
    tokenizer.add_tokens([f"word{number}" for number in range(config.text_config.vocab_size - len(tokenizer))])
    config.image_token_id, config.video_token_id = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    model = random_model(config, device="cpu", dtype=torch.float32)
    save_checkpoint(folder, model, tokenizer, CHAT_TEMPLATE)
    _with_published_names(folder / "model.safetensors")
    return folder


def _with_published_names(file: Path) -> None:
    """transformers from 5.24 on writes vision_tower.x; vLLM reads vision_tower.vision_model.x, as it was published."""
    old, new = "vision_tower.", "vision_tower.vision_model."
    weights = load_file(file)
    named = {name if new in name else name.replace(old, new, 1): weight for name, weight in weights.items()}
    save_file(named, file, metadata={"format": "pt"})


def write_requests(file: Path, *, videos: Path, first: int, count: int, frames: int) -> list[Path]:
    """``count`` requests in the format of ``vllm bench serve --dataset-name sharegpt``, and their videos in the folder
    ``videos``, numbered from ``first`` on. ``frames`` is how many the server samples of each."""
    videos.mkdir(parents=True, exist_ok=True)
    paths = [videos / f"{number}.mp4" for number in range(first, first + count)]
    for number, path in enumerate(paths, first):
        write_video(path, frames, seed=number)
    turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": "two"}]
    file.write_text(json.dumps([{"video": str(path), "conversations": turns} for path in paths]), encoding="utf-8")
    return paths


def write_video(path: Path, frames: int, seed: int) -> None:
    """H.264 (or MPEG-4) of which ``frames`` evenly spaced pictures are scenes of :data:`SCENE_FRAMES` each, in which a
    box moves before a background that stands still."""
    rng = np.random.default_rng(seed)
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w") as container:
        stream = typing.cast(av.VideoStream, container.add_stream(codec, rate=FPS))
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(frames * _BETWEEN):
            if number % (SCENE_FRAMES * _BETWEEN) == 0:
                blocks = rng.integers(0, 256, (HEIGHT // _BLOCK, WIDTH // _BLOCK, 3), np.uint8)
                background = blocks.repeat(_BLOCK, 0).repeat(_BLOCK, 1)
                color, left, top = rng.integers(0, 256, 3), rng.integers(WIDTH // 2), rng.integers(HEIGHT - _BOX)
            picture = background.copy()
            picture[top : top + _BOX, left + number % 16 :][:, :_BOX] = color
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
