"""``--html FILE`` and ``--png FILE`` of ``earlytom run`` and ``explain``: a picture of what compression did.

check_pictures(arguments)                              # before the work: can they be written?
write_pictures(loaded, [filmed("talk.mp4", inputs, asked)], options, html="talk.html", png=None)
"""

import argparse
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

import earlytom_compile

from ..integrations.observe import observe
from ..picture import Asked, Clip, Fact, write_html, write_png
from ..picture.frames import first_pictures, frames_seen, pictures_in_a_frame
from ..picture.plot import require_matplotlib
from .comparison import decode, timed_answer
from .loading import Inputs, Loaded, progress_bars
from .outputs import check_outputs


@dataclass(frozen=True)
class Filmed:
    """A video, the model's inputs for it (of any question), what was asked about it, and its width by height."""

    name: str
    inputs: Inputs
    asked: Sequence[Asked] = ()
    aspect: float | None = None


def filmed(video: str | Path, inputs: Inputs, asked: Sequence[Asked] = (), *, name: str | None = None) -> Filmed:
    """That of a video file, which is looked at once more, since the model sees every video squeezed into a square."""
    return Filmed(name or os.path.basename(os.fspath(video)), inputs, asked, _width_by_height(video))


def check_pictures(arguments: argparse.Namespace) -> None:
    """Raise :class:`EarlyTomConfigError` where the pictures asked for could not be written."""
    if arguments.png:
        require_matplotlib()
    check_outputs(arguments)


def write_pictures(
    loaded: Loaded,
    videos: Sequence[Filmed],
    options: dict[str, Any],
    *,
    html: str | Path | None = None,
    png: str | Path | None = None,
    model: str = "",
    facts: Sequence[Fact] = (),
    progress_on: Console,
) -> None:
    """Observe one compressed call for each video and draw the page to ``html``, the image to ``png``, or both.

    ``options`` are those of ``earlytom_compile.compile``, ``model`` is its name for people, ``facts`` are shown beside
    the tokens and frames. The model may be compiled or not and stays so. Says on ``progress_on`` where the pictures
    are. Raises :class:`EarlyTomCompileError` for a model that would run uncompressed.
    """
    with progress_bars(progress_on) as progress:
        progress.add_task("drawing the picture", total=None)
        clips = [_clip(loaded, filmed, options) for filmed in videos]
        written = [
            draw(path, clips, model=_model_name(model), facts=facts)
            for path, draw in ((html, write_html), (png, write_png))
            if path is not None
        ]
    for path in written:
        progress_on.print(f"picture in {path}", markup=False, highlight=False, soft_wrap=True)


def wants_picture(arguments: argparse.Namespace) -> bool:
    """Whether one was asked for."""
    return bool(arguments.html or arguments.png)


@dataclass(frozen=True)
class Answered:
    """One question of ``earlytom run``; ``full`` is None where the full model was not asked."""

    video: str | Path
    question: str
    inputs: Inputs
    compressed: str
    full: str | None = None


def write_run_pictures(
    loaded: Loaded,
    answered: Sequence[Answered],
    options: dict[str, Any],
    *,
    html: str | Path | None,
    png: str | Path | None,
    model: str,
    facts: Sequence[Fact],
    max_new_tokens: int,
    progress_on: Console,
) -> None:
    """:func:`write_pictures` of all videos and questions; the full model is asked what it was not asked yet.

    Afterwards the model is as it was before compression, if it was asked.
    """
    asked: dict[str, list[Asked]] = {}
    inputs = {str(one.video): one.inputs for one in answered}
    for one, both in zip(answered, both_answers(loaded, answered, max_new_tokens, progress_on), strict=True):
        asked.setdefault(str(one.video), []).append(both)
    films = [filmed(video, inputs[video], questions) for video, questions in asked.items()]
    where = {"html": html, "png": png}
    write_pictures(loaded, films, options, **where, model=model, facts=facts, progress_on=progress_on)


def both_answers(
    loaded: Loaded, answered: Sequence[Answered], max_new_tokens: int, progress_on: Console
) -> list[Asked]:
    """Of each question; the full model is asked what it was not asked yet, and compression undone for that."""
    return [
        Asked(
            one.question,
            _answer_with_all(loaded, one.inputs, max_new_tokens, progress_on) if one.full is None else one.full,
            one.compressed,
        )
        for one in answered
    ]


def _answer_with_all(loaded: Loaded, inputs: Inputs, max_new_tokens: int, progress_on: Console) -> str:
    earlytom_compile.restore(loaded.model)
    with progress_bars(progress_on) as progress:
        progress.add_task("answering with all tokens", total=None)
        return decode(loaded, timed_answer(loaded.model, inputs, max_new_tokens)[0])


def facts_of(prompt: Sequence[int] | None, first_token_seconds: tuple[float, float] | None = None) -> list[Fact]:
    """Tiles: the prompt's length before and after, and the time to the first token of the full and the compressed
    model."""
    facts = []
    if prompt:
        facts.append(Fact("prompt", "{} → {} tokens".format(*prompt)))
    if first_token_seconds:
        full, compressed = first_token_seconds
        change = f"{full / compressed:.1f}x faster" if full >= compressed else f"{compressed / full:.1f}x slower"
        facts.append(Fact("time to first token", f"{1000 * full:.0f} → {1000 * compressed:.0f} ms", change))
    return facts


def _model_name(name: str) -> str:
    """Of a folder its name: where it lies is nobody's business who gets the page."""
    return Path(name).resolve().name if name and Path(name).is_dir() else name


def _clip(loaded: Loaded, filmed: Filmed, options: dict[str, Any]) -> Clip:
    inputs, processor = filmed.inputs, loaded.processor
    pixels, grid = inputs["pixel_values_videos"], inputs.get("video_grid_thw")
    of_videos = {} if grid is None else {"video_grid_thw": grid}
    (observation,) = observe(loaded.model, pixels, of_videos, **options)
    asked = tuple(filmed.asked)
    if grid is None:
        return Clip(filmed.name, frames_seen(processor, pixels[0]), observation, asked, filmed.aspect)
    count, height, width = grid[0].tolist()
    frames = first_pictures(processor, pixels, (count, height, width))
    return Clip(filmed.name, frames, observation, asked, filmed.aspect, pictures_in_a_frame(processor))


def _width_by_height(video: str | Path) -> float:
    from ..integrations.video import read_video  # timing needs no PyAV, and a lent machine may lack it

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is to be said of the file was said when its frames were read
        _, height, width, _ = read_video(video, 1).pixels.shape
    return width / height
