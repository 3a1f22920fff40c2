"""What a compressed call decided, as plain data: for a picture, a notebook, a question of "why this frame?".

    observe(model, pixels [V, F, 3, H, W], retain_ratio=0.1)
 -> Observation: merges[0].segments      ((0, 4), (5, 7))                 # of the F frames, after layer 1
                 merges[0].sources       (((0, 1.0),), ((1, 0.5), (2, 0.5)), ...)
                 importance              float32 [N, h, w]
                 kept                    ((0, 1, 2), ...)                 # merged frame, row, column

Nothing is decided a second time for it: the rewritten graph is the one that a compressed call runs, and an
interpreter writes down what goes into its operators and what comes out. What they keep to themselves, the segments and
the moving average, their own code tells once more for the same similarities. The model and what was compiled for it
stay as they are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule, Interpreter, Node

from ..config import EarlyTomConfig
from ..errors import EarlyTomCompileError, EarlyTomConfigError, EarlyTomError
from ..families.base import Family, Video
from ..families.registry import family_of
from ..frame_sources import Source, blend, parts, untouched
from ..kernels.plan_merge import explain_segments
from ..passes.manager import Rewrite, run_passes
from ..passes.reasons import NotApplicable
from ..reused import ComputedPatches, computed_patches
from .checks import check_family
from .placement import video_path
from .tracing import with_its_own_code
from .vision_path import kind_of, traced_arguments, video_rows


@dataclass(frozen=True)
class MergeStep:
    """One merge layer: n frames came in, m are left. Frames are numbered within the n."""

    layer: int
    """0-based layer of the vision encoder, behind which it happens."""
    neighbours: tuple[float, ...]
    """[n - 1]: similarity of each frame, from the second on, to the one before it."""
    compared: tuple[float, ...]
    """[n - 1]: the similarity that Eq. 1 takes there: ``neighbours``, or under ``variant="released"`` that to the first
    frame of the segment. NaN where a full window ended the segment unseen."""
    smoothed: tuple[float, ...]
    """[n - 1]: its moving average; a segment begins where it is below ``tau_seg``. NaN where a full window ended it."""
    segments: tuple[tuple[int, int], ...]
    """First and last frame of each, both inclusive."""
    thresholds: tuple[float, ...]
    """Of each segment, the similarity that two of its frames need to merge (Eq. 2)."""
    sources: tuple[Source, ...]
    """Of each of the m frames, which of the n it is made of (Eq. 3)."""

    @property
    def frames(self) -> int:
        """n."""
        return len(self.neighbours) + 1

    @property
    def merged(self) -> tuple[Source, ...]:
        """Those of ``sources`` that blend two frames."""
        return tuple(source for source in self.sources if len(source) > 1)


@dataclass(frozen=True)
class ReusedPatches:
    """Which patches of a video of F frames were computed; the others took over what was computed of them before."""

    source: np.ndarray
    """int64 [F, S]: the frame in which each place was last computed; its own, if it was computed there."""
    grid: tuple[int, int]
    """Rows and columns of patches, which are the last of the S places, in raster order."""
    covered: tuple[float, float]
    """Shares of a frame's height and width, from its upper left corner, that the patches cover."""
    counts: ComputedPatches

    @property
    def computed(self) -> np.ndarray:
        """bool [F, rows, columns]."""
        own = self.source == np.arange(len(self.source))[:, None]
        return own[:, own.shape[1] - self.grid[0] * self.grid[1] :].reshape(-1, *self.grid)


@dataclass(frozen=True)
class Observation:
    """One video of F frames through a compressed vision encoder: N frames are left, of h x w tokens each."""

    frames: int
    """F."""
    grid: tuple[int, int]
    """(h, w); (1, P) where tokens are no grid, as with a class token among them."""
    layers: int
    """Layers of the vision encoder."""
    config: EarlyTomConfig
    """The options in force."""
    merges: tuple[MergeStep, ...]
    """One for each merge layer; none for a video of fewer frames than can merge."""
    dynamic: tuple[bool, ...] | None
    """[N]: whether a frame keeps its most important tokens wherever they are; None where selection does not ask."""
    importance: np.ndarray | None
    """float32 [N, h, w]: attention that each token receives in the last merge layer, or in the layer of ``method``,
    pooled as the features are; None where the encoder does not tell and selection does not ask."""
    importance_decides: bool
    """False under ``variant="plus"`` and with a ``method`` that keeps tokens without a look at ``importance``."""
    kept: tuple[tuple[int, int, int], ...]
    """(frame of N, row, column) of each token that reaches the language model, in their order there. What another
    ``method`` keeps at a place may be made of several tokens."""
    reuse: ReusedPatches | None = None
    """What was computed, where unchanged patches are reused instead of merging frames."""

    @property
    def frame_counts(self) -> tuple[int, ...]:
        """Frames at first, then after each merge layer."""
        return (self.frames, *(len(step.sources) for step in self.merges))

    @property
    def tokens(self) -> tuple[int, int]:
        """Video tokens of the uncompressed video and of this one, the newline not counted."""
        return self.frames * self.grid[0] * self.grid[1], len(self.kept)

    def origins(self, merges: int | None = None) -> tuple[Source, ...]:
        """Of each frame left after the first ``merges`` merge layers (None: all), the sampled frames it is made of."""
        made = untouched(self.frames)
        for step in self.merges[:merges]:
            made = tuple(blend(made, source) for source in step.sources)
        return made


def observe(
    model: torch.nn.Module, pixel_values_videos: Any, arguments: Mapping[str, Any] | None = None, /, **options: Any
) -> list[Observation]:
    """What a call of ``model`` compiled with ``options`` decides about each video.

    ``pixel_values_videos``: [V, F, 3, H, W], or a sequence of videos [F, 3, H, W], as a processor makes them, on the
    model's device. ``arguments`` are what else of a call the model takes for its videos, such as ``video_grid_thw``,
    with which models of Qwen get patches. ``options`` are those of :class:`EarlyTomConfig`; nothing is compiled,
    whatever ``lowering`` says.
    Raises :class:`EarlyTomConfigError` for bad ones, another model or another shape, and :class:`EarlyTomCompileError`
    where a call would run uncompressed.
    """
    inner: Any = getattr(model, "_orig_mod", model)  # behind torch.compile(model)
    family = family_of(inner)
    config = EarlyTomConfig.from_options(family.options(options))
    family.require_versions()
    check_family(inner, family)
    family.prepare()
    observers: dict[Any, tuple[Observer, Callable[..., Any]]] = {}
    observed = []
    call = {**family.by_our_names(arguments or {}), "pixel_values_videos": pixel_values_videos}
    for video in family.videos(inner, call):
        kind = kind_of(video, any_length=False)
        if kind not in observers:
            observer = Observer(config)
            # A function for each shape: Dynamo compiles only so many shapes of one.
            compiled = torch.compile(with_its_own_code(video_rows), backend=observer.backend)
            observers[kind] = observer, compiled
        observer, rows = observers[kind]
        with video_path(inner, family):
            observed.append(observer.watch(rows, family, inner, video))
    return observed


class Observer:
    """A backend that rewrites a graph as every other lowering does, and writes down what its operators did."""

    def __init__(self, config: EarlyTomConfig) -> None:
        self._config = config
        self._last: Observation | None = None
        self._grid: tuple[int, int] | None = None

    @torch.no_grad()
    def watch(self, compiled: Callable[..., Any], family: Family, model: Any, video: Video) -> Observation:
        """Call ``compiled``, which is :func:`video_rows` compiled by this backend."""
        self._last, self._grid = None, family.token_grid(model, video)
        compiled(family, model, *traced_arguments(video, any_length=False))
        if self._last is None:
            raise EarlyTomCompileError(
                "nothing to observe: Dynamo did not trace the vision path. It is switched off, or a mode that it skips "
                "is active: call without torch.compiler.set_stance, TORCHDYNAMO_DISABLE and TorchDispatchModes around."
            )
        return self._last

    def backend(self, graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """For ``torch.compile``; errors are raised at the call, since Dynamo would wrap them in one of its own."""
        state = Rewrite(graph_module, self._config, features_only=True, example_inputs=example_inputs)
        try:
            state = run_passes(state)
        except NotApplicable as found:
            return _raising(EarlyTomCompileError(f"nothing to observe: {found.reason}. {found.cure}."))
        except EarlyTomConfigError as error:
            return _raising(error)

        def run(*inputs: Any) -> Any:
            recorder = _Recorder(state)
            outputs = recorder.run(*inputs)
            self._last = recorder.observation(self._grid)
            return outputs

        return run


def _raising(error: EarlyTomError) -> Callable[..., Any]:
    def raise_error(*inputs: Any) -> Any:
        raise error

    return raise_error


_Call = tuple[dict[str, Any], Any]
"""Arguments of an operator by name, and what it returned."""


class _Recorder(Interpreter):
    """Runs a rewritten graph once and keeps the small tensors that its operators took and gave."""

    def __init__(self, state: Rewrite) -> None:
        super().__init__(state.graph_module)
        assert state.boundary is not None
        self._config = state.config
        self._boundary = state.boundary
        self._map = state.token_map
        blocks = state.boundary.encoder.blocks
        full = state.path.encoder.full_layers if state.path else ()
        self._layers = state.config.resolve_merge_layers(len(blocks), full)
        self._scored = blocks[state.config.scored_layer(len(blocks), full)]
        self._reused = state.reused
        self._reuse: _Call | None = None
        self._plans: list[_Call] = []
        self._dynamic: torch.Tensor | None = None
        self._selected: _Call | None = None
        self._received: torch.Tensor | None = None  # float32 [n, S], where selection does not ask for it
        self._importance: torch.Tensor | None = None  # the same [N, P], pooled

    def run_node(self, n: Node) -> Any:
        if n is self._scored.attention and not self._config.selects_by_attention():
            self._received = self._attention_received()
        if self._map is not None and n is self._map.pool and self._received is not None:
            (_, *arguments), options = self.fetch_args_kwargs_from_env(n)
            self._importance = self._map.apply(self._received, arguments, options)
        return super().run_node(n)

    def _attention_received(self) -> torch.Tensor | None:
        """What ``paper`` would go by; None where queries and keys do not tell (grouped heads)."""
        query, key = self.env[self._scored.query], self.env[self._scored.key]
        if query.shape != key.shape:
            return None
        if self._reused is not None and self._reused.is_packed(self._scored):
            rows = self.env[self._reused.rows]
            query, key = (torch.ops.earlytom.spread_places(heads, rows) for heads in (query, key))
        scale = self._scored.scale
        scale = self.env[scale] if isinstance(scale, Node) else scale
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if self._scored.windows:
            return torch.ops.earlytom.window_attention_received(query, key, self._scored.windows, scale)
        received = torch.ops.earlytom.attention_received(query, key, scale)
        if self._reused is not None and self._reused.has_distinct_frames(self._scored):
            assert self._reused.frames is not None
            received = torch.ops.earlytom.return_frames(received, self.env[self._reused.frames[0]])
        return received

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().call_function(target, args, kwargs)
        name = str(target).removeprefix("earlytom.").removesuffix(".default")
        if name == str(target):
            return result
        schema = getattr(target, "default", target)._schema  # of what was called without an overload, as families do
        given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
        if name == "plan_reuse":
            self._reuse = given, result
        elif name == "plan_merge":
            self._plans.append((given, result))
        elif name == "merge_frames" and self._received is not None:  # of the last merge layer, which scores
            plan = given["source"], given["weight"], given["n"]
            (self._received,) = torch.ops.earlytom.merge_frames([self._received], *plan)
        elif name == "dynamic_frames":
            self._dynamic = result
        elif name.startswith("select_") or name == "keep_by_method":
            self._selected = given, result
        return result

    def observation(self, grid: tuple[int, int] | None = None) -> Observation:
        """Read off what was recorded, which waits for the device. ``grid``: of the tokens of a frame, where somebody
        knows."""
        assert self._selected is not None
        given, result = self._selected
        height, width = grid or (self._map.shape if self._map is not None else (1, self._boundary.tokens))
        kept = result[1].reshape(-1, result[1].shape[-1])[:, -2:].tolist()  # released: the video before them
        if self._map is not None and self._map.pool is None and self._received is not None:
            self._importance = self._map.apply(self._received)
        decides = given.get("importance") is not None
        importance = given["importance"] if decides else self._importance
        layers = self._layers if self._plans else ()  # a short video has nothing to merge
        steps = tuple(_merge_step(layer, *plan) for layer, plan in zip(layers, self._plans, strict=True))
        return Observation(
            frames=steps[0].frames if steps else int(given["counts"].sum()),
            grid=(int(height), int(width)),
            layers=len(self._boundary.encoder.blocks),
            config=self._config,
            merges=steps,
            dynamic=None if self._dynamic is None else tuple(self._dynamic.tolist()),
            importance=None if importance is None else importance.float().cpu().numpy().reshape(-1, height, width),
            importance_decides=decides,
            kept=tuple((frame, place // width, place % width) for frame, place in kept),
            reuse=None if self._reuse is None else reused_patches(*self._reuse),
        )


def reused_patches(given: dict[str, Any], plan: Sequence[torch.Tensor]) -> ReusedPatches:
    """What a call of ``plan_reuse`` with these arguments decided about the only video in it."""
    source, change, _, measured = plan
    (counts,) = computed_patches(source, change, measured)
    rows, columns = given["grid"]
    height, width = (count * side for count, side in zip((rows, columns), given["patch"], strict=True))
    covered = height / given["pixels"].shape[-2], width / given["pixels"].shape[-1]
    return ReusedPatches(source[0].cpu().numpy(), (rows, columns), covered, counts)


def _merge_step(layer: int, given: dict[str, Any], plan: tuple[torch.Tensor, ...]) -> MergeStep:
    (explained,) = explain_segments(**given)
    source, weight, counts = (x.tolist() for x in plan)
    return MergeStep(
        layer=layer,
        neighbours=tuple(given["similarity"][1:, 0].tolist()),
        compared=explained.compared,
        smoothed=explained.smoothed,
        segments=explained.segments,
        thresholds=explained.thresholds,
        sources=tuple(tuple(parts(*row)) for row in list(zip(source, weight, strict=True))[: sum(counts)]),
    )
