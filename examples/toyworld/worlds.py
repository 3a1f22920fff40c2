"""The worlds that ``earlytom eval --toy`` asks about: what differs between them, which no method knows.

    world = world_named("photo")               # "toy" is this package's own, TOY
    video = world.sample_video("test", 3)
    world.ask(video, rng)                      # {"appearance": Question(...), ...}

What they share: models are LLaVA-OneVisions, the toy world's prompt stands around a question, and pixels come from -1
to 1 (``answers.py``).
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from earlytom_compile.errors import EarlyTomConfigError
from earlytom_compile.toyworld import batches, model, questions, world
from earlytom_compile.toyworld.answers import answer_logits
from earlytom_compile.toyworld.installed import Model
from earlytom_compile.toyworld.questions import Question
from earlytom_compile.toyworld.world import HELD_OUT, Video

DEFAULT = "toy"
NAMES = (DEFAULT, "photo")


@dataclass(frozen=True, eq=False)
class World:
    """Videos, questions about them, the language of these and what its trained model is."""

    name: str
    categories: tuple[str, ...]
    sample_video: Callable[[str, int], Any]
    """Of a split and a number; it has ``frames()``, uint8 [F, H, W, 3]."""
    ask: Callable[[Any, np.random.Generator], dict[str, Question]]
    """One question of each category that the video has any of."""
    shows_held_out: Callable[[Any], bool]
    """Whether a pair of colour and shape is in the video that no training video has."""
    ids: Mapping[str, int]
    """Of words."""
    rows_of: Callable[..., batches.Rows]
    answer_logits: Callable[..., Any]
    weights: Path
    """Folder of the trained checkpoint, where one comes along."""
    frames: int
    side: int
    """Video tokens of a frame in each direction."""
    encoder_layers: int
    language_layers: int
    load: Callable[[str | Path], Model] | None = None
    """Of a folder that lacks some weights; None: a checkpoint like any other."""
    encoded: Callable[[Any], np.ndarray] | None = None
    """A video's frames as they come out of a file; None where they always do."""
    unreadable: tuple[str, ...] = ()
    """Methods written with hooks that find nothing in the vision encoder of this world's model."""


def world_named(name: str) -> World:
    """Raises :class:`EarlyTomConfigError` where a package is missing that it needs."""
    if name == DEFAULT:
        return TOY
    try:
        return _photo()
    except ImportError as error:
        raise EarlyTomConfigError(
            f"world={name!r}: {error}: pip install '.[toy,photo]' in the repository brings what it needs."
        ) from error


def _through_mp4(video: Video) -> np.ndarray:
    with tempfile.TemporaryDirectory(prefix="earlytom-eval-") as folder:
        world.write_mp4(video, Path(folder) / "video.mp4")
        return world.read_sampled(Path(folder) / "video.mp4")


TOY = World(
    name=DEFAULT,
    categories=questions.CATEGORIES,
    sample_video=world.sample_video,
    ask=questions.ask,
    shows_held_out=lambda video: any(thing.pair in HELD_OUT for thing in video.things),
    ids=batches.IDS,
    rows_of=batches.rows_of,
    answer_logits=answer_logits,
    weights=model.WEIGHTS,
    frames=world.FRAMES,
    side=model.POOLED,
    encoder_layers=model.SHAPE.vision_layers,
    language_layers=model.SHAPE.text_layers,
    encoded=_through_mp4,
)


def _photo() -> World:
    from earlytom_compile.photoworld import answers, language, model, questions, story, world

    def shows_held_out(video: world.Video) -> bool:
        seen = [(*scene.things, *(flash.thing for flash in scene.flashes)) for scene in video.scenes]
        return any(thing.pair in HELD_OUT for things in seen for thing in things)

    return World(
        name="photo",
        categories=questions.CATEGORIES,
        sample_video=world.sample_video,
        ask=questions.ask,
        shows_held_out=shows_held_out,
        ids=language.IDS,
        rows_of=answers.rows_of,
        answer_logits=answers.answer_logits,
        weights=model.WEIGHTS,
        frames=world.FRAMES,
        side=story.CELLS,
        encoder_layers=model.VISION_LAYERS,
        language_layers=model.TEXT_LAYERS,
        load=lambda folder: model.load(folder, model.dinov2),
        unreadable=("only stage 2", "top-k without decoupling"),
    )
