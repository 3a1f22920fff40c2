"""Features of clips and videos by the frozen vision encoder, computed once and kept on disk.

    python -m earlytom_compile.photoworld.pool /work/cache --clips 1500 --videos 150     # goes on where it stopped

    folder/train/00000.npy   float16 [frames, 64, 4, 384]: behind the encoder's last layer, without the class token, the
                             four patches of each video token together, so that a token is read in one piece
    folder/train/00000.npz   what each of those tokens shows (story.cells)
    folder/validation/...    whole videos of the split ``validation``

200 kB a frame; a file holds 25 clips or videos.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from earlytom_compile.photoworld.answers import normalized
from earlytom_compile.photoworld.clips import Clip, sample_clip
from earlytom_compile.photoworld.story import CELLS, Shot, cells, story_of
from earlytom_compile.photoworld.world import sample_video
from earlytom_compile.toyworld.batches import Cells

TOKENS = CELLS**2
"""Of a frame."""
EACH = 25
"""Clips or videos of a file."""
LABELS = ("color", "shape", "glows", "offset")
_AT_ONCE = 64  # frames
_MOST_FILES = 100_000


def grouped(patches: torch.Tensor) -> torch.Tensor:
    """[F, 256, D] -> [F, 64, 4, D]: the four patches that pooling makes one token of."""
    square = patches.unflatten(1, (CELLS, 2, CELLS, 2))
    return square.permute(0, 1, 3, 2, 4, 5).flatten(1, 2).flatten(2, 3)


@torch.no_grad()
def encoded(tower: Any, frames: np.ndarray) -> np.ndarray:
    """float16 [F, 64, 4, D]: what the projector gets."""
    first = next(tower.parameters())
    found = []
    for chunk in torch.from_numpy(frames).split(_AT_ONCE):
        pixels = normalized(chunk).to(first)
        hidden = tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        found.append(grouped(hidden).half())
    return torch.cat(found).numpy()


def fill(folder: Path, tower: Any, count: int, split: str) -> None:
    """Encode what is missing of the first ``count`` clips, or videos if the split is not ``train``."""
    folder = folder / split
    folder.mkdir(parents=True, exist_ok=True)
    for number, first in enumerate(range(0, count, EACH)):
        target = folder / f"{number:05d}.npy"
        if target.exists():
            continue
        each = [_sampled(split, seed) for seed in range(first, first + EACH)]
        features = encoded(tower, np.concatenate([item.frames() for item in each]))
        np.savez_compressed(target.with_suffix(".npz"), **_labels(each))
        # Whole or not at all, whenever it is stopped.
        np.save(target.with_suffix(".part.npy"), features)
        target.with_suffix(".part.npy").rename(target)
        print(target, len(features), flush=True)


def _labels(each: Sequence[Any]) -> dict[str, Any]:
    """What the tokens of all frames of these clips or videos show, in small types."""
    labels = [cells(shot, frame) for item in each for shot in _shots(item) for frame in range(shot.length)]
    color, shape, glows, offset = (np.stack(column) for column in zip(*labels, strict=True))
    numbers = (column.astype(np.uint8) for column in (color, shape, glows))
    return dict(zip(LABELS, (*numbers, offset.astype(np.float16)), strict=True))


def _sampled(split: str, seed: int) -> Any:
    return sample_clip(seed) if split == "train" else sample_video(split, seed)


def _shots(item: Any) -> Sequence[Shot]:
    return (item.shot,) if isinstance(item, Clip) else story_of(item).shots


class Pool:
    """The first ``count`` clips, or videos, of a folder that :func:`fill` filled; None: all that are there by now."""

    def __init__(self, folder: Path, split: str, count: int | None = None) -> None:
        there = [file for number in range(_MOST_FILES) if (file := folder / split / f"{number:05d}.npy").exists()]
        count = len(there) * EACH if count is None else count
        files = there[: -(-count // EACH)]
        if not 0 < count <= len(files) * EACH:
            has = f"{folder / split} has {len(there) * EACH} clips or videos, not {count or 'any'}"
            raise SystemExit(f"{has}: python -m earlytom_compile.photoworld.pool {folder} makes more.")
        self.clips = [_sampled(split, seed) for seed in range(count)]
        """Or videos."""
        self._features = [np.load(file, mmap_mode="r") for file in files]
        labels = [np.load(file.with_suffix(".npz")) for file in files]
        self.labels = {name: np.concatenate([each[name] for each in labels]) for name in LABELS}
        """What the tokens of all frames show, [frames, 64, ...] (story.cells)."""
        lengths = [sum(shot.length for shot in _shots(clip)) for clip in self.clips]
        self.first = [0, *itertools.accumulate(lengths)]
        """The place of each clip's first frame among all frames; last, their number."""
        self._file_first = [0, *itertools.accumulate(map(len, self._features))]

    def features(self, frame: int, tokens: np.ndarray | slice) -> np.ndarray:
        """float16 [tokens, 4, D] of that one of all frames."""
        file = int(np.searchsorted(self._file_first, frame, side="right")) - 1
        return np.asarray(self._features[file][frame - self._file_first[file], tokens])

    def tokens(self, frames: np.ndarray, places: np.ndarray | None) -> np.ndarray:
        """float16 [K, 4, D] of a video of these frames: the tokens in these ``places``, or all."""
        if places is None:
            return np.concatenate([self.features(int(frame), slice(None)) for frame in frames])
        of = [places[places // TOKENS == number] % TOKENS for number in range(len(frames))]
        return np.concatenate([self.features(int(frame), chosen) for frame, chosen in zip(frames, of, strict=True)])

    def cells(self, frames: np.ndarray) -> Cells:
        """What the tokens of these frames show."""
        color, shape, glows = (torch.from_numpy(self.labels[name][frames]).long() for name in LABELS[:3])
        return Cells(color, shape, glows, torch.from_numpy(self.labels["offset"][frames]).float())

    def scale(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of each feature, float32 [D], in the first file."""
        some = torch.from_numpy(np.array(self._features[0])).float().flatten(0, -2)
        return some.mean(0), some.std(0)


def main() -> None:
    """The command."""
    from earlytom_compile.benchmarks.pretrained import dinov2_small
    from earlytom_compile.photoworld.drawing import SIZE

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clips", type=int, default=1500, help="of the split train (1500)")
    parser.add_argument("--videos", type=int, default=150, help="of the split validation (150)")
    arguments = parser.parse_args()
    # bfloat16 takes a third of the time, and a feature's cosine to that in float32 is 0.9997 or more.
    tower = dinov2_small(SIZE).to(torch.bfloat16)
    fill(arguments.folder, tower, arguments.videos, "validation")
    fill(arguments.folder, tower, arguments.clips, "train")


if __name__ == "__main__":
    main()
