"""Videos of a model to the rows that its language model gets: one compiled path for each kind of them.

encoder = VideoEncoder(model, config, family, record)
encoded = encoder.encode(video)          # .rows [K, C], .size rows it would have had, .counts of what was kept
"""

import copy
import threading
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import EarlyTomConfig
from ..errors import EarlyTomFallbackWarning
from ..families.base import Family, Reason, Video
from ..prompt import without_waiting
from ..reporting import Counts, GraphRecord
from ..stages import CompressedGraph, Kinds, asks_for_cuda_graphs, fall_back
from .placement import MOST_SETS_OF_HOOKS, Placement, weights_in_place
from .vision_path import VisionPath, describe, kind_of

MOST_COMPILED_SIZES = 8
"""Of videos, as many sizes get code of Inductor's, which takes from seconds to a minute each."""
MOST_SIZES = 64
"""Of videos whose traced graphs are kept, those that were used last."""


@dataclass(frozen=True)
class EncodedVideo:
    """One video, ready for the prompt."""

    rows: Tensor
    """[K, C], separators included."""
    size: int
    """Rows it would have uncompressed."""
    counts: tuple[GraphRecord, Counts] | None
    """What the call kept, and of which graph; None where it ran uncompressed."""
    known: Tensor | None = None
    """What :meth:`places` said when it was encoded, in a call before."""

    def places(self) -> Tensor:
        """int64 [K], on the host, ascending: which of its ``size`` rows each row is, that of a merged frame in the
        first of its frames. Waits for the device."""
        if self.known is not None:
            return self.known
        if self.counts is None:
            return torch.arange(len(self.rows))
        (record, counts), (frame, token) = self.counts, _kept(self.counts[1]).unbind(1)
        first = frame if counts.first is None else counts.first[frame]
        return (first * record.tokens_per_frame + token).cpu()


class VideoEncoder:
    """The compiled vision paths of one model; ``record`` is where reasons go."""

    def __init__(self, model: Any, config: EarlyTomConfig, family: Family, record: GraphRecord) -> None:
        self._model = model
        self._config = config
        self._family = family
        self._record = record
        # A CUDA graph replays fixed sizes, and none is captured behind a size that is not known.
        self.any_length = not asks_for_cuda_graphs(config.mode)
        self._reset()

    def _reset(self) -> None:
        self._paths: dict[Any, VisionPath] = {}  # the one used last is the last
        self._kinds: Kinds = {}
        self._compiled_sizes: set[Any] = set()
        self._lock = threading.Lock()  # of these

    def __deepcopy__(self, memo: dict[int, Any]) -> "VideoEncoder":
        # A copy of the model compiles for itself: compiled code belongs to the weights it was traced with.
        twin = memo[id(self)] = type(self).__new__(type(self))
        own = ("_paths", "_kinds", "_compiled_sizes", "_lock")
        state = {name: value for name, value in self.__dict__.items() if name not in own}
        twin.__dict__.update(copy.deepcopy(state, memo))
        twin._reset()
        return twin

    def take_over(self, before: "VideoEncoder") -> None:
        """Use what was compiled with other options and does not depend on them."""
        self._kinds = before._kinds

    def records(self) -> list[GraphRecord]:
        """Those of all graphs that compress videos."""
        return [graph.record for path in self._known_paths().values() for graph in path.graphs]

    def _known_paths(self) -> dict[Any, VisionPath]:
        """Those there are now; other threads may add to them."""
        with self._lock:
            return dict(self._paths)

    def reason_against_placement(self) -> Reason | None:
        """(reason, cure) where the model is placed by now so that its videos cannot be compiled."""
        placed, known = self._placement(), {key[-1] for key in self._known_paths()}
        if placed.hooks not in known and len(known) >= MOST_SETS_OF_HOOKS:
            return (
                f"hooks of the video path have changed {MOST_SETS_OF_HOOKS} times, and each set of them is compiled",
                "Register the same hooks for all calls, and look at observe(model, ...) for what happens inside",
            )
        return placed.reason_against

    def encode(self, video: Video) -> EncodedVideo:
        """Through the compiled path of its kind, or uncompressed with a reason."""
        frames, (rows, compressed) = len(video.pixels), self._through_path(video)
        counts, size = None, len(rows)
        if compressed is not None:
            graph, kept = compressed
            self.any_length &= graph.any_length or frames == 1  # some models cannot be traced so
            counts, size = (graph.record, kept), graph.rows_of(frames)
        every = self._family.separators(self._model, _all_tokens(frames, size))
        if every is None:
            return EncodedVideo(rows, size, counts)
        behind = every if counts is None else self._family.separators(self._model, _kept(counts[1]))
        assert behind is not None
        with weights_in_place(self._model, self._family):
            rows = insert_rows(rows, without_waiting(behind, rows.device), self._family.separator(self._model))
        return EncodedVideo(rows, size + len(every), counts)

    def _through_path(self, video: Video) -> tuple[Tensor, tuple[CompressedGraph, Counts] | None]:
        """Rows [K, C]; the graph that compressed them, and what it kept."""
        placed = self._placement()
        video = placed.on_device(video)
        any_length = self.any_length and len(video.pixels) > 1  # PyTorch tells sizes of 1 from all others
        path = self._path(video, any_length, placed.hooks)
        rows, compressed = path(self._model, video)
        if path.broken and (names := placed.names_of_hooked):
            self._blame_hooks(names)
            return path.uncompiled(self._model, video), None
        if compressed is None and not path.told:
            fall_back(
                "Dynamo did not trace the vision path: it is switched off, or a mode that it skips is active",
                "Call without torch.compiler.set_stance, TORCHDYNAMO_DISABLE and TorchDispatchModes around it",
                self._config,
                self._record,
            )
        return rows, compressed

    def _path(self, video: Video, any_length: bool, hooks: tuple[Any, ...]) -> VisionPath:
        """That of this kind of videos; a new one is made for a size that was not there before."""
        frames, *size = kind_of(video, any_length)
        key = (frames, *size, hooks)
        with self._lock:
            path = self._paths.pop(key, None)
            if path is None:
                config = self._config if self._is_compiled(tuple(size)) else self._config.not_compiled()
                path = VisionPath(self._family, config, any_length, self._kinds, describe(video, any_length))
            self._paths[key] = path
            while len(self._paths) > MOST_SIZES:
                del self._paths[next(iter(self._paths))]
        return path

    def _is_compiled(self, size: tuple[Any, ...]) -> bool:
        """Whether videos of this size get compiled code: one of the first that came."""
        if len(self._compiled_sizes) < MOST_COMPILED_SIZES:
            self._compiled_sizes.add(size)
        if size in self._compiled_sizes or self._config.lowering == "eager":
            return True
        reason = (
            f"videos of more than {MOST_COMPILED_SIZES} sizes came: those of further sizes are compressed and not "
            "compiled"
        )
        if reason not in self._record.reasons:
            self._record.note(reason)
            warnings.warn(
                f"{reason}, which is slower. Bring videos to a few sizes before they go to the processor.",
                EarlyTomFallbackWarning,
                stacklevel=2,
            )
        return False

    def _placement(self) -> Placement:
        return Placement.of(self._model, self._family, asks_for_cuda_graphs(self._config.mode))

    def _blame_hooks(self, names: str) -> None:
        """Once. Such a call runs as it is: Dynamo loses what a hook returns if it breaks the graph."""
        reason = f"hooks in the video path (on {names}) break its graph"
        if reason not in self._record.reasons:
            fall_back(reason, "Take them off, or keep .item() and the like out of them", self._config, self._record)


def insert_rows(rows: Tensor, behind: Tensor, row: Tensor) -> Tensor:
    """``rows`` [K, C] with ``row`` [C] once more behind each of those that ``behind``, int64 [M], names: [K + M, C]."""
    places = torch.cat((2 * torch.arange(len(rows), device=rows.device), 2 * behind + 1))
    row = row.to(rows.device, rows.dtype)
    return torch.cat((rows, row.expand(len(behind), -1)))[places.argsort()]


def _kept(counts: Counts) -> Tensor:
    """int64 [K, 2]: the (merged frame, token) of each row of the only video of a call."""
    assert counts.kept is not None
    return counts.kept.reshape(-1, counts.kept.shape[-1])[:, -2:]


def _all_tokens(frames: int, tokens: int) -> Tensor:
    """The same of a video whose frames keep all of their tokens, on the host."""
    return torch.cartesian_prod(torch.arange(frames), torch.arange(tokens // frames))
