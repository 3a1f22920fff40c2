"""What can be read off an observation, the same for every way to draw it: places, colours, words and numbers.

Frames are counted from 1, as people do; layers from 0, as the option ``merge_layers`` does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..integrations.observe import MergeStep, Observation, ReusedPatches, Source
from ..methods.registry import EARLYTOM, method_named
from .content import Clip, Fact

# Nine colours of matplotlib's "inferno": dark to bright, even to the eye, and to those who see fewer colours.
_INFERNO = ("000004", "1f0c48", "550f6d", "88226a", "ba3655", "e35933", "f98e09", "f9cb35", "fcffa4")
_VEIL, _VEIL_OPACITY = (0x7D, 0x82, 0x8C), 0.72
"""Of pixels, what style.py has for the page."""
FRAMES = "Frames"
MERGES, LEFT, LOOKS = "Frames, segments and merges", "What is left", "Where the encoder looks: every frame, every place"
"""The three parts of what is shown of a video; the first is ``FRAMES`` where none can merge."""
COMPUTED = "What was computed"
"""The first of them where unchanged patches are reused and no frames merge."""
_SINK = 3.0
"""A place that receives so many times the average over all frames is called a sink."""
_FAINTEST = 0.25
"""Of the average: less than that is drawn as that, and twice as much where no token receives less."""
_FINE = 8
"""Tokens in a row or column of a frame: more than that need a larger picture."""
_LONGEST = 1.8
"""Longest side of a picture, in sides of a square of its size."""


def headline(clips: Sequence[Clip]) -> str:
    """What came of it, in a sentence."""
    before, after = (sum(clip.observation.tokens[i] for clip in clips) for i in (0, 1))
    return f"{count(after)} of {count(before)} video tokens reach the language model"


def count(number: int) -> str:
    """6272 -> "6,272"."""
    return f"{number:,}"


def share(part: int, whole: int) -> str:
    """(13, 128) -> "10.2%"."""
    return f"{part / whole:.1%}"


def gains(clips: Sequence[Clip]) -> list[Fact]:
    """What is gained, and at what price, of all videos together."""
    before, after = (sum(clip.observation.tokens[i] for clip in clips) for i in (0, 1))
    facts = [Fact("video tokens", f"{count(before)} → {count(after)}", f"{share(after, before)} kept")]
    facts.append(_patches_fact(clips) or _frames_fact(clips))
    both = [asked.agree for clip in clips for asked in clip.asked if asked.agree is not None]
    if both:
        facts.append(Fact("same answer", f"{sum(both)} of {len(both)}", "with all tokens and with those kept"))
    return facts


def _patches_fact(clips: Sequence[Clip]) -> Fact | None:
    """What the encoder computed, where unchanged patches are reused."""
    counts = [clip.observation.reuse.counts for clip in clips if clip.observation.reuse]
    if len(counts) < len(clips):
        return None
    every, total = sum(each.every for each in counts), sum(each.total for each in counts)
    note = f"{share(total, every)} computed" if total < every else "nothing reused"
    return Fact("patches in the encoder", f"{count(every)} → {count(total)}", note)


def _frames_fact(clips: Sequence[Clip]) -> Fact:
    chains = [clip.observation.frame_counts for clip in clips]
    if len(set(map(len, chains))) > 1:  # short videos have nothing to merge
        chains = [(chain[0], chain[-1]) for chain in chains]
    frames = " → ".join(str(sum(counts)) for counts in zip(*chains, strict=True))
    merges = [step for clip in clips for step in clip.observation.merges]
    none = clips[0].observation.config.method != EARLYTOM  # of others none can
    return Fact("frames", frames, "none merged" if none else merged_word(merges))


def merged_word(steps: Sequence[MergeStep]) -> str:
    """Behind which layers there were fewer frames than before, of all ``steps``."""
    if not steps:
        return "too few to merge"
    layers = sorted({step.layer for step in steps if len(step.sources) < step.frames})
    if not layers:
        return "none merged"
    return f"merged after encoder layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


def frames_word(source: Source, *, short: bool = False) -> str:
    """((1, 0.5), (2, 0.5)) -> "frames 2 + 3"; more of them in a row -> "frames 2–5"; ``short``: "2 + 3"."""
    frames = [frame + 1 for frame, _ in source]
    if len(frames) > 2 and frames[-1] - frames[0] == len(frames) - 1:
        numbers = f"{frames[0]}–{frames[-1]}"
    else:
        numbers = " + ".join(map(str, frames))
    return numbers if short else f"{'frames' if len(frames) > 1 else 'frame'} {numbers}"


def merge_word(observation: Observation, place: int) -> str | None:
    """Of which sampled frames a frame that is left is made, and after which layers they merged; None if untouched."""
    layers, parts = [], {place}
    for step in reversed(observation.merges):
        sources = [step.sources[part] for part in parts]
        if any(len(source) > 1 for source in sources):
            layers.append(str(step.layer))
        parts = {part for source in sources for part, _ in source}
    if not layers:
        return None
    *others, last = reversed(layers)
    named = f"layers {', '.join(others)} and {last}" if others else f"layer {last}"
    return f"after {named}: {weights_word(observation.origins()[place])}"


def merging_word(observation: Observation) -> str:
    """How to read the curves."""
    if not observation.merges:
        return "A video of fewer than four frames has nothing to merge: first and last frame of a segment stay."
    return (
        f"Each curve is the similarity of a frame to the {compared_with(observation)} as the encoder sees it after "
        "that layer, and its moving average. Where the average falls below the threshold, a new segment begins. "
        "Inside a segment, neighbours that are alike enough become one frame."
    )


def encoded(clip: Clip) -> tuple[str, str]:
    """Title of the first part of what is shown of a video, and how to read it."""
    title, text = _encoded(clip.observation)
    if clip.pictures > 1:
        text += (
            f" A frame is a temporal patch, which the encoder makes of {clip.pictures} pictures of the video; the "
            "first of them is shown."
        )
    return title, text


def _encoded(observation: Observation) -> tuple[str, str]:
    method = observation.config.method
    if observation.reuse is None and method != EARLYTOM:
        return FRAMES, f"With method {method} no frames merge: the vision encoder computes all of every frame."
    if observation.reuse is None:
        return MERGES, merging_word(observation)
    return COMPUTED, observation.reuse.counts.told(observation.config, observation.layers)


def computed_word(reuse: ReusedPatches, frame: int) -> str:
    """``"140 of 729 patches (19%)"``."""
    counts = reuse.counts
    return f"{counts.by_frame[frame]} of {counts.places} patches ({counts.by_frame[frame] / counts.places:.0%})"


def attention_word(observation: Observation, heat: "Heat | None") -> str:
    """How to read the heat map, and what is to be seen in it."""
    if heat is None:
        return "This encoder does not tell how much attention a token receives."
    config = observation.config
    chosen = 'variant="plus"' if config.method == EARLYTOM else f'method="{config.method}"'
    unused = "" if observation.importance_decides else f" With {chosen} it decides nothing and is only shown."
    layer = "the last merge layer"
    if observation.reuse is not None or config.method != EARLYTOM:
        layer = f"encoder layer {observation.config.scored_layer(observation.layers)}"
    return (
        f"Attention that each token receives in {layer}. A row is a frame that is left, a column the same "
        "place in all of them, row by row of the picture; bright columns are sinks, places that draw attention "
        f"whatever they show. {sinks_word(heat)}{unused}"
    )


def weights_word(source: Source) -> str:
    """((1, 0.5), (2, 0.5)) -> "50% of frame 2, 50% of frame 3"."""
    return ", ".join(f"{weight:.0%} of frame {frame + 1}" for frame, weight in source)


def compared_with(observation: Observation) -> str:
    """What the similarity that Eq. 1 takes is one to."""
    return "first frame of its segment" if observation.config.variant == "released" else "frame before"


def selection_word(observation: Observation) -> str:
    """By which rule the tokens were kept."""
    if (method := method_named(observation.config.method)) is not None:
        if method.keep is None:
            return f"Method {method.name} ({method.paper}) keeps every token up to the language model."
        return (
            f"Kept is what method {method.name} keeps ({method.paper}). A token of it may stand for several, whose "
            "average it is, at the place of one of them."
        )
    if observation.config.variant == "plus":
        return (
            "Kept are the tokens that together represent all others best; the attention they receive has no part in it."
        )
    return (
        "First and last frame of each segment are dynamic and keep their most attended tokens wherever they are; the "
        "frames between are static and keep the best of each of several even runs, so that their tokens stay spread."
    )


def options_in_force(observation: Observation) -> list[tuple[str, str]]:
    """Those that decide what is computed, by name, as they were resolved."""
    config = observation.config
    first = ("variant", str(config.variant)) if config.method == EARLYTOM else ("method", config.method)
    always = [first, ("retain_ratio", f"{config.retain_ratio:g}")]
    if config.reuses():
        budget = config.encode_ratio
        return [
            *always,
            ("tau_reuse", f"{config.tau_reuse:g}" if budget is None else "set by the budget"),
            ("encode_ratio", "none" if budget is None else f"{budget:g}"),
            ("full_layers", ", ".join(map(str, config.resolve_full_layers(observation.layers))) or "none"),
        ]
    if config.method != EARLYTOM:
        return always
    layers = [step.layer for step in observation.merges] or config.resolve_merge_layers(observation.layers)
    return [
        *always,
        ("merge_layers", ", ".join(map(str, layers)) or "none"),
        ("tau_seg", f"{config.tau_seg:g}"),
        ("alpha", f"{config.alpha:g}"),
        ("tau_merge", config.tau_merge if isinstance(config.tau_merge, str) else f"{config.tau_merge:g}"),
        ("max_window", str(config.window())),
    ]


def kept_by_frame(observation: Observation) -> list[list[tuple[int, int]]]:
    """Of each frame left, (row, column) of the tokens it keeps."""
    kept: list[list[tuple[int, int]]] = [[] for _ in range(observation.frame_counts[-1])]
    for frame, row, column in observation.kept:
        kept[frame].append((row, column))
    return kept


def card_size(clip: Clip, side: float, fine_side: float) -> tuple[float, float]:
    """Width and height of a frame, as large as a square of ``side``, or ``fine_side`` where tokens are small."""
    return picture_size(clip, clip.observation.grid, side, fine_side)


def picture_size(clip: Clip, grid: tuple[int, int], side: float, fine_side: float) -> tuple[float, float]:
    """The same where what is shown has another grid."""
    wider = math.sqrt(clip.width_by_height)
    side = fine_side if max(grid) > _FINE else side
    side *= min(1.0, _LONGEST / max(wider, 1 / wider))
    return side * wider, side / wider


def veiled(pixels: np.ndarray, clear: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3], washed out where bool [H, W] is False."""
    behind = pixels * (1 - _VEIL_OPACITY) + np.array(_VEIL) * _VEIL_OPACITY
    return np.where(clear[..., None], pixels, behind.round()).astype(np.uint8)


def outline(tokens: Sequence[tuple[int, int]]) -> list[tuple[int, int, int, int]]:
    """Edges (row, column, row, column) around groups of tokens, in steps of the grid."""
    kept, edges = set(tokens), []
    for row, column in tokens:
        edges += [
            (row + r0, column + c0, row + r1, column + c1)
            for r0, c0, r1, c1, beside in (
                (0, 0, 0, 1, (row - 1, column)),
                (1, 0, 1, 1, (row + 1, column)),
                (0, 0, 1, 0, (row, column - 1)),
                (0, 1, 1, 1, (row, column + 1)),
            )
            if beside not in kept
        ]
    return edges


def places(observation: Observation, merges: int) -> list[float]:
    """Where each frame left after so many merge layers is drawn: amid the sampled frames that it is made of."""
    return [sum(frame for frame, _ in source) / len(source) for source in observation.origins(merges)]


def borders(step: MergeStep, x: Sequence[float]) -> list[tuple[float, float]]:
    """Left and right edge of each segment, half-way to the neighbouring frame; ``x`` as from :func:`places`."""
    middles = [(a + b) / 2 for a, b in pairwise(x)]
    edges = [x[0] - 0.5, *middles, x[-1] + 0.5]
    return [(edges[first], edges[last + 1]) for first, last in step.segments]


def curve(values: Sequence[float], x: Sequence[float], breaks: Sequence[int] = ()) -> list[list[tuple[float, float]]]:
    """Runs of (x, value) between frames t - 1 and t, without those that are not known; a run ends before a break."""
    runs: list[list[tuple[float, float]]] = [[]]
    for t, value in enumerate(values, start=1):
        if t - 1 in breaks or not math.isfinite(value):
            runs.append([])
        if math.isfinite(value):
            runs[-1].append(((x[t - 1] + x[t]) / 2, value))
    return [run for run in runs if run]


def value_range(step: MergeStep, tau: float) -> tuple[float, float]:
    """Lowest and highest similarity of a panel, in whole tenths."""
    known = [value for value in (*step.compared, *step.smoothed, tau) if math.isfinite(value)]
    return min(math.floor(10 * min(known) - 0.5) / 10, 0.9), max(1.0, math.ceil(10 * max(known)) / 10)


@dataclass(frozen=True)
class Heat:
    """An importance as colours. ``times``: float [N, h, w], as multiples of the average over all tokens."""

    times: np.ndarray
    low: float
    high: float

    @property
    def levels(self) -> np.ndarray:
        """[N, h, w] from 0 to 1, even in the logarithm: a few sinks must not leave all else black."""
        return np.log2(np.clip(self.times, self.low, self.high) / self.low) / math.log2(self.high / self.low)

    @property
    def pixels(self) -> np.ndarray:
        """uint8 RGB [N, h, w, 3]."""
        return colours(self.levels)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """(level, label) of powers of two."""
        powers = range(round(math.log2(self.low)), math.floor(math.log2(self.high)) + 1)
        span = math.log2(self.high / self.low)
        return [((p - math.log2(self.low)) / span, {-2: "¼×", -1: "½×"}.get(p, f"{2.0**p:g}×")) for p in powers]

    @property
    def sinks(self) -> list[tuple[int, int, float]]:
        """(row, column, times the average) of places far above it over all frames, the brightest first."""
        over_frames = self.times.mean(axis=0)
        found = [(int(r), int(c), float(over_frames[r, c])) for r, c in np.argwhere(over_frames >= _SINK)]
        return sorted(found, key=lambda place: -place[2])

    @property
    def sinks_share(self) -> float:
        """Of all attention, what the sinks receive."""
        return sum(times for _, _, times in self.sinks) / self.times[0].size


def heat_of(observation: Observation) -> Heat | None:
    """The importance of the frames left; None where there is none."""
    if observation.importance is None:
        return None
    importance = observation.importance.astype(np.float64)
    times = importance / max(importance.mean(), 1e-30)
    faintest = _FAINTEST if times.min() < 2 * _FAINTEST else 2 * _FAINTEST
    return Heat(times, faintest, max(2.0, float(times.max())))


def colours(levels: np.ndarray) -> np.ndarray:
    """Levels from 0 to 1 -> uint8 RGB [..., 3], dark to bright."""
    anchors = np.array([[int(colour[i : i + 2], 16) for i in (0, 2, 4)] for colour in _INFERNO])
    steps = np.linspace(0, 1, len(anchors))
    return np.stack([np.interp(levels, steps, anchors[:, i]) for i in range(3)], axis=-1).round().astype(np.uint8)


def gradient() -> list[str]:
    """The colours of a heat map, for a legend."""
    return [f"#{colour}" for colour in _INFERNO]


def sinks_word(heat: Heat) -> str:
    """What is to be seen in a heat map."""
    sinks = heat.sinks
    if not sinks:
        return f"No place receives {_SINK:g} times the average over all frames: this video has no sinks."
    first = ", ".join(f"row {row + 1} column {column + 1} ({times:.1f}×)" for row, column, times in sinks[:4])
    return (
        f"{len(sinks)} of {heat.times[0].size} places receive at least {_SINK:g} times the average over all frames, "
        f"together {heat.sinks_share:.0%} of all attention: {first}{', ...' if len(sinks) > 4 else ''}."
    )
