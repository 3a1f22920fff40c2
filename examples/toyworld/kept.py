"""What the kept tokens show: why one way to select answers more questions than another.

    python -m earlytom_compile.toyworld.kept

Frames stay unmerged, so that every token is one square of one frame, of which world.py knows what it shows.
"""

import argparse

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlavaOnevisionForConditionalGeneration

from earlytom_compile import reference
from earlytom_compile.config import EarlyTomConfig
from earlytom_compile.toyworld.answers import normalized
from earlytom_compile.toyworld.batches import cells
from earlytom_compile.toyworld.methods import Encoded, Model, encode
from earlytom_compile.toyworld.model import POOLED, WEIGHTS
from earlytom_compile.toyworld.world import FRAMES, Video, sample_video

Kept = tuple[float, bool]
"""Share of the kept tokens that show a thing; whether every pair of colour and shape kept a token."""


def shown(video: Video) -> torch.Tensor:
    """int64 [8, 16]: the pair of colour and shape in each token's square, 0 for background."""
    labels = [cells(video, time, POOLED) for time in range(FRAMES)]
    return torch.stack([torch.from_numpy(10 * color + shape) for color, shape, *_ in labels])


def kept_tokens(model: Model, video: Video, retain_ratio: float) -> dict[str, Kept]:
    """By variant, and for all tokens."""
    pixels = normalized(torch.from_numpy(video.frames()))
    encoded = encode(model, EarlyTomConfig(retain_ratio=retain_ratio, variant="paper"), pixels, merge=False)
    pairs = shown(video)
    every = torch.ones_like(pairs).nonzero()
    return {name: _kept(pairs, rows) for name, rows in (("all tokens", every), *_selections(encoded, retain_ratio))}


def _selections(encoded: Encoded, retain_ratio: float) -> list[tuple[str, torch.Tensor]]:
    paper = reference.select_tokens(
        encoded.importance, encoded.segments, frames_in=FRAMES, retain_ratio=retain_ratio, variant="paper"
    )
    plus = reference.select_representatives(encoded.tokens, frames_in=FRAMES, retain_ratio=retain_ratio)
    return [("paper", paper), ("plus", plus)]


def _kept(pairs: torch.Tensor, rows: torch.Tensor) -> Kept:
    kept = pairs[rows[:, 0], rows[:, 1]]
    return (kept > 0).float().mean().item(), set(pairs[pairs > 0].tolist()) <= set(kept.tolist())


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=300, help="of the split validation (%(default)s)")
    parser.add_argument("--retain-ratio", type=float, default=0.1, help="share of the tokens (%(default)s)")
    given = parser.parse_args(arguments)
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(WEIGHTS).eval()
    videos = [kept_tokens(model, sample_video("validation", seed), given.retain_ratio) for seed in range(given.videos)]
    table = Table("selection", "kept tokens that show a thing", "videos with a token of every pair")
    for name in videos[0]:
        things, complete = zip(*(video[name] for video in videos), strict=True)
        table.add_row(name, f"{sum(things) / len(videos):.1%}", f"{sum(complete) / len(videos):.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
