"""A pool of short clips from which endless training videos are put together.

The vision encoder is frozen and looks at each frame by itself, so that its features of a clip serve in every video that
shows the clip: a part of it, or its frames in another order, before or after parts of other clips.

    clip = sample_clip(seed=3)              # a scene, and what its frames may become
    video, frames = compose(rng, clips)   # a Story, and which frames of which clips show it

moving      a part of it, forwards or backwards; where that is too short, what moves stands still before or after
flashing    plain frames and frames in which one of two things glows: any number of flashes at any time
appearing   frames without and with one thing: it may come at any time
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from earlytom_compile.photoworld import film, world
from earlytom_compile.photoworld.story import Shot, Story, shot_of
from earlytom_compile.photoworld.world import Scene
from earlytom_compile.toyworld.world import rng_of

_MOVING_FRAMES = 12
_PLAIN, _GLOWING = 3, 2  # frames of a flashing clip: without, and with either of two things
_WITHOUT, _WITH = 3, 3  # frames of an appearing clip
KINDS = ("moving", "flashing", "appearing")
_SHARES = (0.45, 0.35, 0.2)
_STREAM = 5


@dataclass(frozen=True)
class Clip:
    """A scene for the pool, of one of :data:`KINDS`."""

    kind: str
    scene: Scene

    @property
    def shot(self) -> Shot:
        """What its frames show."""
        return shot_of(self.scene, range(self.scene.length))

    def frames(self) -> np.ndarray:
        """Encoded and decoded, uint8 RGB [length, 224, 224, 3]."""
        return film.sampled(self.scene.draw, self.scene.length, self.scene.length)


def sample_clip(seed: int, split: str = "train") -> Clip:
    """Clip number ``seed``, always the same one."""
    rng = rng_of(split, seed, stream=_STREAM)
    kind, pairs = str(rng.choice(KINDS, p=_SHARES)), world.pairs_of(split)
    if kind == "moving":
        return Clip(kind, world.moving_scene(rng, _MOVING_FRAMES, pairs))
    if kind == "flashing":
        return Clip(kind, world.staged_scene(rng, pairs, (_PLAIN, _GLOWING, _GLOWING)))
    return Clip(kind, world.appearing_scene(rng, pairs, _WITHOUT, _WITH))


def compose(rng: np.random.Generator, clips: Sequence[Clip]) -> tuple[Story, list[tuple[int, int]]]:
    """A story of 16 frames, and for each of them the number of its clip in ``clips`` and its frame there."""
    shots, shown = [], []
    for length in world.spans(rng):
        number = int(rng.integers(len(clips)))
        frames = _order(rng, clips[number].kind, length)
        shots.append(clips[number].shot.picked(frames))
        shown += [(number, frame) for frame in frames]
    return Story(tuple(shots)), shown


def _order(rng: np.random.Generator, kind: str, length: int) -> list[int]:
    """Which frames of a clip of that kind a scene of ``length`` frames shows."""
    if kind == "moving":
        return _stretch(rng, length)
    if kind == "flashing":
        return _flashes(rng, length)
    first = int(rng.integers(1, length))
    before, after = rng.integers(_WITHOUT, size=first), _WITHOUT + rng.integers(_WITH, size=length - first)
    return [*before.tolist(), *after.tolist()]


def _stretch(rng: np.random.Generator, length: int) -> list[int]:
    rest = length - _MOVING_FRAMES
    if rest > 0:
        before = int(rng.integers(rest + 1))
        frames = [0] * before + list(range(_MOVING_FRAMES)) + [_MOVING_FRAMES - 1] * (rest - before)
    else:
        first = int(rng.integers(-rest + 1))
        frames = list(range(first, first + length))
    return frames if rng.random() < 0.5 else frames[::-1]


def _flashes(rng: np.random.Generator, length: int) -> list[int]:
    """As in world.py, with frames of this clip."""
    frames = rng.integers(_PLAIN, size=length)
    one, other = (_PLAIN + _GLOWING * which for which in rng.permutation(2))
    for at, which in world.flash_times(rng, length):
        frames[at] = (one, other)[which] + rng.integers(_GLOWING)
    return frames.tolist()
