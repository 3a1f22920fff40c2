"""What is seen when and where in a video's frames, from which every answer and every label follows.

    story = story_of(video)
    story.shots[0].tracks[0]     # Track(("red", "ring"), radius=20.0, glows=False, places=((40.0, 71.5), None, ...))

A story does not say how a video was made. That of a part of a scene, of its frames in another order, or of frames at
another rate is a selection of frames from it, and so are the answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from earlytom_compile.photoworld import film
from earlytom_compile.photoworld.drawing import SIZE, Shape, mask_of
from earlytom_compile.photoworld.world import Place, Scene, Video
from earlytom_compile.toyworld.world import COLORS, SHAPES, Pair

CELLS = 8
"""Cells of a frame in each direction, one for each video token."""
_LEAST_PIXELS = 50
"""Of a thing, in the cell of which it is the label."""


@dataclass(frozen=True)
class Track:
    """A thing in the frames of one shot: its centre, or None where it is not seen."""

    pair: Pair
    radius: float
    glows: bool
    places: tuple[Place | None, ...]

    @property
    def seen(self) -> list[int]:
        """Frames of the shot that show it."""
        return [frame for frame, place in enumerate(self.places) if place is not None]


@dataclass(frozen=True)
class Shot:
    """``length`` frames between two cuts."""

    length: int
    tracks: tuple[Track, ...]

    def picked(self, frames: Sequence[int]) -> "Shot":
        """The shot that shows these of its frames, in this order; what none of them shows is no part of it."""
        tracks = (Track(t.pair, t.radius, t.glows, tuple(t.places[f] for f in frames)) for t in self.tracks)
        return Shot(len(frames), tuple(track for track in tracks if track.seen))


@dataclass(frozen=True)
class Story:
    """Shots one after another."""

    shots: tuple[Shot, ...]

    @property
    def length(self) -> int:
        """Frames."""
        return sum(shot.length for shot in self.shots)

    @property
    def starts(self) -> list[int]:
        """The first frame of each shot."""
        return [sum(shot.length for shot in self.shots[:index]) for index in range(len(self.shots))]


def story_of(video: Video, count: int | None = None) -> Story:
    """Of its sampled frames, or of so many evenly spaced ones (:meth:`Video.frames`)."""
    times = film.sampled_times(video.length, video.length if count is None else count)
    inside: dict[int, list[float]] = {}
    for time in times:
        scene, at = video.at(time)
        inside.setdefault(video.scenes.index(scene), []).append(at)
    return Story(tuple(shot_of(video.scenes[index], at) for index, at in sorted(inside.items())))


def shot_of(scene: Scene, times: Sequence[float]) -> Shot:
    """What a scene shows at these times."""
    found: dict[tuple[Pair, float, bool], list[Place | None]] = {}
    for frame, time in enumerate(times):
        for thing, place, glows in scene.visible(time):
            key = thing.pair, thing.radius, glows
            found.setdefault(key, [None] * len(times))[frame] = place
    return Shot(len(times), tuple(Track(*key, tuple(places)) for key, places in found.items()))


def cells(shot: Shot, frame: int) -> tuple[np.ndarray, ...]:
    """Colour and shape, int64 [64], 0 where there is nothing; whether it glows, int64 [64]; and how far its centre is
    from the cell's, float32 [64, 2] (x, y), in cells: of the thing that covers most of each cell."""
    color, shape, glows = (np.zeros((CELLS, CELLS), np.int64) for _ in range(3))
    offset = np.zeros((CELLS, CELLS, 2), np.float32)
    most, side = np.full((CELLS, CELLS), _LEAST_PIXELS), SIZE // CELLS
    middle = (np.arange(CELLS) + 0.5) * side
    for track in shot.tracks:
        place = track.places[frame]
        if place is None:
            continue
        mask = mask_of(Shape(*track.pair, track.radius, place))
        cover = mask.reshape(CELLS, side, CELLS, side).sum((1, 3))
        here = cover > most
        most[here] = cover[here]
        color[here] = 1 + list(COLORS).index(track.pair[0])
        shape[here] = 1 + SHAPES.index(track.pair[1])
        glows[here] = track.glows
        away = np.stack(np.broadcast_arrays((place[0] - middle)[None, :], (place[1] - middle)[:, None]), -1) / side
        offset[here] = away[here]
    return color.reshape(-1), shape.reshape(-1), glows.reshape(-1), offset.reshape(-1, 2)
