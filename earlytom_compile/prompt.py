"""Placeholders of a prompt: do they match the videos, and which of them go when a video shrinks?

    [5, 5, <video> x 73, 7, <video> x 73]   two videos of 73 rows that keep 8 each
 -> [5, 5, <video> x  8, 7, <video> x  8]

    [5, 5, <video>, 7, <video>]             the same two, encoded before: one placeholder each will do
 -> [5, 5, <video> x  8, 7, <video> x  8]

A prompt that does not match its videos is an error. One that matches but cannot be cut (text inside a video) gives
a reason to run the call uncompressed.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .errors import EarlyTomConfigError


class UncuttablePrompt(Exception):
    """The prompt matches its videos but its placeholders cannot be cut; the message is the reason."""

    def __init__(self, reason: str, cure: str = "Write each video as one <video> in the prompt") -> None:
        super().__init__(reason)
        self.cure = cure


Places = list[list[list[range]]]
"""Of each row of a prompt, of each of its videos, the runs of placeholders."""


def locate_runs(input_ids: torch.Tensor, token: int, sizes: Sequence[int]) -> Places:
    """What :func:`locate_videos` finds, as places."""
    remaining = iter(sizes)
    return [
        [[range(start, start + next(remaining))] for start in row] for row in locate_videos(input_ids, token, sizes)
    ]


def locate_pieces(input_ids: torch.Tensor, token: int, sizes: Sequence[int]) -> Places:
    """The same of videos that lie in several runs each, with text between them; a run belongs to one video.

    Raises :class:`EarlyTomConfigError` where the runs of a row do not add up to its videos."""
    remaining, places = list(sizes), list[list[list[range]]]()
    for row in input_ids.tolist():
        runs = _runs(row, token)
        places.append([])
        while runs:
            video, missing = list[range](), remaining.pop(0) if remaining else 0
            while runs and missing >= len(runs[0]):
                video.append(runs.pop(0))
                missing -= len(video[-1])
            if missing or not video:
                raise _unmatched(input_ids, token, sizes)
            places[-1].append(video)
    if remaining:
        raise _unmatched(input_ids, token, sizes)
    return places


def _runs(row: Sequence[int], token: int) -> list[range]:
    """Where ``token`` is, in runs of neighbours."""
    groups = itertools.groupby(enumerate(row), key=lambda place: place[1] == token)
    found = ([place for place, _ in group] for is_video, group in groups if is_video)
    return [range(places[0], places[-1] + 1) for places in found]


def _unmatched(input_ids: torch.Tensor, token: int, sizes: Sequence[int]) -> EarlyTomConfigError:
    return EarlyTomConfigError(
        f"the prompt has {int((input_ids == token).sum())} video placeholder tokens (id {token}), but its {len(sizes)} "
        f"videos need {sum(sizes)} ({', '.join(map(str, sizes))}). Build the prompt with the model's processor, "
        "from the same videos."
    )


def locate_videos(input_ids: torch.Tensor, token: int, sizes: Sequence[int]) -> list[list[int]]:
    """Where each video's placeholders begin, row by row.

    ``input_ids`` int64 [R, S], read by the host; ``sizes[v]`` is the number of placeholders ``token`` of video v, in
    reading order. Raises :class:`EarlyTomConfigError` if they do not match, :class:`UncuttablePrompt` if a video is
    not in one piece.
    """
    rows = input_ids.tolist()
    places = [[i for i, token_id in enumerate(row) if token_id == token] for row in rows]
    if sum(map(len, places)) != sum(sizes):
        raise _unmatched(input_ids, token, sizes)
    remaining = list(sizes)
    starts: list[list[int]] = []
    for place in places:
        starts.append(row_starts := [])
        while place:
            size = remaining.pop(0)
            if len(place) < size or place[size - 1] - place[0] != size - 1:
                raise UncuttablePrompt(
                    f"the {size} placeholders of a video are not next to each other in one row of the prompt"
                )
            row_starts.append(place[0])
            place = place[size:]
    return starts


def sizes_in_prompt(input_ids: torch.Tensor, token: int, videos: int) -> list[int]:
    """How many placeholders ``token`` of the prompt int64 [R, S] belong to each of ``videos`` videos whose sizes are
    not known: one each, or else each run of them is a video. Raises :class:`EarlyTomConfigError` if neither fits."""
    runs = [len(run) for row in input_ids.tolist() for run in _runs(row, token)]
    total = sum(runs)
    if total == videos:
        return [1] * videos
    if len(runs) != videos:
        raise EarlyTomConfigError(
            f"the prompt has {total} video placeholder tokens (id {token}) in {len(runs)} places, but {videos} encoded "
            "video(s) came. Write one <video> for each."
        )
    return runs


def videos_of(input_ids: torch.Tensor, token: int, sizes: Sequence[int]) -> torch.Tensor:
    """int64 [R, S], on the host: the video that each placeholder ``token`` of ``input_ids`` [R, S] belongs to, numbered
    from 0 in each row; -1 elsewhere. ``sizes[v]`` is the number of placeholders of video v, in reading order."""
    placeholder = input_ids == token
    remaining = iter(sizes)
    rows = []
    for row in placeholder:
        videos, left = list[int](), int(row.sum())
        while len(videos) < left:
            number = 0 if not videos else videos[-1] + 1
            videos += [number] * next(remaining)
        rows.append(torch.full(row.shape, -1).masked_scatter(row, torch.tensor(videos, dtype=torch.int64)))
    return torch.stack(rows)


@dataclass(frozen=True)
class ExpectedPlaceholders:
    """What a compiled graph needs of a prompt: ``videos`` runs of ``per_video`` placeholders ``token``."""

    token: int
    videos: int
    per_video: int
    even_rows: bool
    """Every row must have the same number of videos."""

    def reason_not_to_cut(self, input_ids: torch.Tensor) -> str | None:
        """None if the prompt int64 [R, S] can be cut, else why not; raises where it does not match at all."""
        try:
            starts = locate_videos(input_ids, self.token, [self.per_video] * self.videos)
        except UncuttablePrompt as reason:
            return str(reason)
        counts = [len(row) for row in starts]
        if self.even_rows and len(set(counts)) > 1:
            return f"the rows of the batch have different numbers of videos ({', '.join(map(str, counts))})"
        return None


@dataclass(frozen=True)
class PromptCut:
    """Which positions of each row stay, or are there several times; shorter rows are padded on the left. R rows,
    S -> S' positions."""

    positions: torch.Tensor  # int64 [R, S'] on the host, -1 = padding
    trimmed: torch.Tensor  # int64 [R, 1] on the host: how much of its own padding on the left each row lost
    length: int  # S

    @classmethod
    def plan(
        cls,
        input_ids: torch.Tensor,
        places: Places,
        after: Sequence[int | torch.Tensor],
        mask: torch.Tensor | None = None,
    ) -> "PromptCut":
        """``after[v]`` placeholders in the places of each video v in reading order: the first of them, and the last as
        often as it takes; or those that an int64 [K] on the host, ascending, counts from 0. Rows that were padded on
        the left (``mask`` [R, S], 0 or False there, on the host) beside one with a longer video lose what no row needs
        any more."""
        padding = _padding_on_the_left(input_ids, mask, places)
        rows, stays = [], iter(after)
        for row in places:
            kept, end = [], 0
            for video in row:
                own = _stay(video, next(stays))
                for run in video:
                    here = own[(own >= run.start) & (own < run.stop)]
                    kept += [torch.arange(end, run.start), here]
                    end = run.stop
            rows.append(torch.cat([*kept, torch.arange(end, input_ids.shape[1])]))
        # What all rows had in common stays: whoever pads to a length of his own meant it.
        width = max(len(row) - own for row, own in zip(rows, padding, strict=True)) + min(padding)
        trimmed = torch.tensor([[max(len(row) - width, 0)] for row in rows])
        padded = [torch.nn.functional.pad(row, (width - len(row), 0), value=-1) for row in rows]  # or cut, if negative
        return cls(torch.stack(padded), trimmed, input_ids.shape[1])

    @property
    def padded(self) -> bool:
        """True if some row had to be padded."""
        return bool((self.positions < 0).any())

    @property
    def dropped(self) -> int:
        """S - S'; negative where the prompt grows."""
        return self.length - self.positions.shape[1]

    def take(self, x: torch.Tensor, fill: float) -> torch.Tensor:
        """Cut ``x`` [R, S], with ``fill`` where a row is padded."""
        positions = without_waiting(self.positions, x.device)
        return x.gather(1, positions.clamp_min(0)).masked_fill(positions < 0, fill)

    def renumber(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Cut position ids [R or 1, S] and close the gaps, as if the prompt had been written with smaller videos."""
        taken = self.take(position_ids.expand(self.positions.shape[0], -1), 0)
        pads = (self.positions < 0).sum(1, keepdim=True)
        places = torch.arange(self.positions.shape[1]) + self.trimmed
        gaps = (self.positions + pads - places).masked_fill(self.positions < 0, 0)
        moved = (taken - without_waiting(gaps, taken.device)).clamp_min(0)
        return moved.masked_fill(without_waiting(self.positions < 0, taken.device), 0)


def _stay(video: Sequence[range], after: int | torch.Tensor) -> torch.Tensor:
    """Which positions of a prompt stay of a video's placeholders."""
    places = torch.cat([torch.arange(run.start, run.stop) for run in video])
    return places[torch.arange(after).clamp_max(len(places) - 1) if isinstance(after, int) else after]


def _padding_on_the_left(input_ids: torch.Tensor, mask: torch.Tensor | None, places: Places) -> list[int]:
    """How many positions each row has before the first that is attended to, or belongs to a video."""
    if mask is None:
        return [0] * len(places)
    attended, last = mask.ne(0).long().cumsum(1).eq(0).sum(1).tolist(), input_ids.shape[1] - 1
    return [min(own, last, *(video[0].start for video in row[:1])) for own, row in zip(attended, places, strict=True)]


def without_waiting(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``x`` of the host on ``device``, which need not have finished what it does: other copies wait for that."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
