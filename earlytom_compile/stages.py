"""From a rewritten graph to something that runs: lowering, and the checks around every call.

staged: cut at the encoder's layers (passes/split_stages.py); Inductor compiles one of each kind
whole:  one Inductor graph
eager:  the rewritten graph as it is

Frame counts are unbacked sizes in all of them, so new videos never recompile.
"""

import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch._inductor.exc import InductorError
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, PendingUnbackedSymbolNotFound

from .config import EarlyTomConfig
from .cuda_graphs import replay_runs
from .errors import EarlyTomCompileError, EarlyTomFallbackWarning
from .frame_chunks import NO_FRAMES, Framed, framed_of, run_in_chunks
from .passes.find_frame_runs import find_frame_runs
from .passes.find_video_boundary import Boundary
from .passes.find_vision_encoder import Block
from .passes.manager import Rewrite
from .passes.patterns import value_of
from .passes.run_on_fakes import data_dependent_sizes
from .passes.split_stages import Piece, split_stages
from .prompt import ExpectedPlaceholders
from .reporting import Counts, GraphRecord, ReusePlan, progress
from .unknown_sizes import UnknownSizes, forget_sizes, is_free, is_symbolic, symbolic_sizes

log = logging.getLogger(__name__)
_CANNOT_LOWER = (
    InductorError,
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
    GuardOnDataDependentSymNode,
    PendingUnbackedSymbolNotFound,
)
Runnable = Callable[..., Sequence[Any]]
Kinds = dict[Any, "_Compiled | None"]
"""Compiled code by what it was compiled from; None: Inductor cannot."""


_CUDA_GRAPHS = "triton.cudagraphs"
LAST_MERGES: ContextVar[tuple[Sequence[Any], Sequence[Any], ReusePlan | None] | None] = ContextVar(
    "earlytom_last_merges", default=None
)
"""Of the tower that ran last in this thread: frames of the video at first and after each merge; then the source and
weight of each merge, and the importance if there is one; and by what plan patches were reused."""
LAST_COUNTS: ContextVar["tuple[CompressedGraph, Counts] | None"] = ContextVar("earlytom_last_counts", default=None)
"""The graph that compressed a video last in this thread, and what it kept: a record has those of all threads."""


def inductor_options(mode: str | None) -> dict[str, Any]:
    """What ``torch.compile``'s ``mode`` means to Inductor."""
    return dict(torch._inductor.list_mode_options(mode)) if mode else {}


def asks_for_cuda_graphs(mode: str | None) -> bool:
    """Whether ``torch.compile``'s ``mode`` means that CUDA graphs replay what was compiled."""
    return bool(inductor_options(mode).get(_CUDA_GRAPHS))


def lower(
    graph_module: GraphModule, example_inputs: Sequence[Any], lowering: str, options: Mapping[str, Any]
) -> Runnable:
    """Compile a graph with Inductor, or leave it to the interpreter of Python (``"eager"``)."""
    if lowering == "eager":
        return graph_module.forward
    from torch._inductor.compile_fx import compile_fx

    return cast(Runnable, compile_fx(graph_module, list(example_inputs), config_patches=dict(options) or None))


def lower_compressed(
    state: Rewrite,
    original: GraphModule,
    example_inputs: Sequence[Any],
    record: GraphRecord,
    kinds: "Kinds | None" = None,
) -> "CompressedGraph":
    """Lower a rewritten graph whose counts are handed out beside its own outputs; of pieces that serve any number of
    frames, those among ``kinds`` are compiled already, and those compiled now are added."""
    outputs = _append_counts(state)
    options = inductor_options(state.config.mode)
    start = time.perf_counter()
    with data_dependent_sizes():
        compiled = _lower(state, example_inputs, options, record, kinds)
    record.seconds["lowering"] = time.perf_counter() - start
    return CompressedGraph(compiled, original, outputs, _expected(state), state, record)


def _lower(
    state: Rewrite,
    example_inputs: Sequence[Any],
    options: Mapping[str, Any],
    record: GraphRecord,
    kinds: "Kinds | None",
) -> Runnable:
    assert state.path is not None
    frames = state.path.frames
    if state.config.lowering == "staged":
        # Inductor cannot take a mask whose two axes are known only at run time, as released has them.
        has_language_model = state.boundary is not None and state.boundary.placeholders is not None
        cut_language_model = has_language_model and state.config.keeps_exactly() and state.even_rows
        videos = state.path.videos
        return lower_stages(
            state.graph_module,
            example_inputs,
            record,
            options,
            state.path.encoder.blocks,
            by_module=cut_language_model,
            frames=range(videos, videos * frames + 1) if isinstance(frames, int) else range(0),
            any_size=not isinstance(frames, int),
            kinds=kinds,
            selection=state.selected.kept if state.selected else None,
            framed=framed_of(state),
        )
    graph_module = _in_chunks(state) if state.config.lowering == "eager" else state.graph_module
    return lower_whole(graph_module, example_inputs, record, options)


def _in_chunks(state: Rewrite) -> GraphModule:
    """The rewritten graph, through which long videos go in chunks where each frame is computed by itself."""
    assert state.path is not None
    framed, selection = framed_of(state), state.selected.kept if state.selected else None
    if not framed.counts:
        return state.graph_module
    stages, pieces = split_stages(state.graph_module, state.path.encoder.blocks, by_module=False, selection=selection)
    run_in_chunks(stages, find_frame_runs(pieces, framed.counts), framed.places)
    return stages


def lower_whole(
    graph_module: GraphModule, example_inputs: Sequence[Any], record: GraphRecord, options: Mapping[str, Any]
) -> Runnable:
    """Compile one graph of everything, or as ``record.lowering`` says nothing; one that Inductor cannot compile runs
    as it is, with a warning."""
    options = dict(options)
    if options.pop(_CUDA_GRAPHS, False):
        # They cannot hold a wait for the host, as one for a frame count, and Inductor's own would write the next
        # prompt's keys and values over a cache that somebody still reads.
        record.note('without the CUDA graphs that mode asks for, which need lowering="staged"')
    try:
        with progress("making the graph runnable" if record.lowering == "eager" else "compiling one graph of all"):
            return lower(graph_module, example_inputs, record.lowering, options)
    except _CANNOT_LOWER as error:
        # Left to Dynamo, some of these would become a silent graph break.
        record.lowering = "eager"
        record.note(_not_compiled("the whole graph", error))
        return graph_module.forward


def lower_stages(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    record: GraphRecord,
    options: Mapping[str, Any] | None = None,
    blocks: Sequence[Block] = (),
    *,
    by_module: bool = True,
    frames: range = range(0),
    any_size: bool = False,
    kinds: "Kinds | None" = None,
    selection: Node | None = None,
    framed: Framed = NO_FRAMES,
) -> Runnable:
    """Compile one piece of each kind. Pieces that hold only operators of ours have nothing to compile, and a piece
    that Inductor cannot compile runs as it is, with a warning. CUDA graphs among Inductor's ``options`` are ours,
    for which ``frames`` are the values of sizes known at run time only. With ``any_size``, no piece is specialised
    to a size that is a symbol, so that it is of one kind with those whose sizes depend on the data, and may be taken
    from ``kinds``. Long videos go in chunks through what computes each frame by itself: between two merges, and between
    the last and the ``selection``; not with CUDA graphs."""
    options = dict(options or {})
    cuda_graphs = options.pop(_CUDA_GRAPHS, False)
    stages, pieces = split_stages(graph_module, blocks, by_module=by_module, selection=selection)
    inputs = [value_of(node) for node in graph_module.graph.nodes if node.op == "placeholder"]
    given = {id(value): example for value, example in zip(inputs, example_inputs, strict=True)}
    runs = [] if cuda_graphs else find_frame_runs(pieces, framed.counts)  # while the pieces show whose sizes they have
    forgotten = forget_sizes(pieces, given) if any_size else set()
    kinds, own = kinds if kinds is not None else {}, dict[Any, _Compiled | None]()
    settings, used = _settings(options), dict[Any, bool]()
    total = len({piece.key for piece in pieces if piece.computes})
    compiled = set[str]()
    for piece in pieces:
        if not piece.computes:
            continue
        key = piece.key, settings
        # What a piece has as attributes is not in its key, and may be another thing in another graph.
        known = kinds if piece.name in forgotten and not piece.has_attributes else own
        if key not in known:
            try:
                with progress(f"compiling piece {len(used) + 1} of {total} ({piece.where})"):
                    known[key] = _compile_piece(piece, given, options)
            except _CANNOT_LOWER as error:
                known[key] = None
                record.note(_not_compiled(f"a part of the model ({piece.where})", error))
        run = known[key]
        used[key] = run is not None
        if run is not None:
            stages.add_submodule(piece.name, run)
            compiled.add(piece.name)
    record.stages = len(pieces), sum(used.values())
    if cuda_graphs:
        replay_runs(stages, pieces, compiled, frames, record)
    run_in_chunks(stages, runs, framed.places)
    return cast(Runnable, stages.forward)


def _compile_piece(piece: Piece, given: Mapping[int, Any], options: Mapping[str, Any]) -> "_Compiled":
    """Compile a piece for all sizes; if that fails since it asks whether one of them is 1, as torchao's dynamic
    quantisation does, for all above 1."""
    try:
        return _Compiled(lower(piece.graph_module, _examples(piece, given), "whole", options), piece)
    except GuardOnDataDependentSymNode:
        if not is_free(piece, given):
            raise
        sizes = UnknownSizes(least=2)
        examples = [sizes.put_into(x) if is_symbolic(x) else x for x in _examples(piece, given)]
        places = {size.node.expr: (i, axis) for i, x in enumerate(examples) for axis, size in symbolic_sizes(x)}
        if not sizes.symbols <= places.keys():
            raise  # nobody could tell from an input of the piece whether the size is 1
        run = lower(piece.graph_module, examples, "whole", options)
        return _Compiled(run, piece, [places[symbol] for symbol in sizes.symbols])


def _not_compiled(what: str, error: Exception) -> str:
    """Warn that ``what`` runs eagerly; returns the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    wanted = next((line for line in lines if "error:" in line), lines[0] if lines else "")
    reason = f"Inductor cannot compile {what}, which runs eagerly: {type(error).__name__}: {wanted[:300]}"
    log.debug("%s", error)
    warnings.warn(f"{reason}. The result is the same, slower.", EarlyTomFallbackWarning, stacklevel=3)
    return reason


def _examples(piece: Piece, given: Mapping[int, Any]) -> list[Any]:
    """What Dynamo gave for inputs of the whole graph, subclasses and parameters included; for what other pieces
    make, fake tensors of the backend's own mode, which is not the one that traced them."""
    fake_mode = torch._guards.TracingContext.get().fake_mode
    assert fake_mode is not None

    def example(value: Any) -> Any:
        if id(value) in given or not isinstance(value, torch.Tensor):
            return given.get(id(value), value)
        with fake_mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)

    return [example(value) for value in piece.inputs]


def _settings(options: Mapping[str, Any]) -> tuple[Any, ...]:
    """What compiled code depends on beside the graph."""
    return (
        repr(sorted(options.items())),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        *(torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) for device in ("cpu", "cuda")),
    )


class _Compiled(torch.nn.Module):
    """Compiled code in the place of a submodule. ``above_one`` are the inputs, and their axes, whose sizes it takes for
    larger than 1; where one is not, the piece runs as it is."""

    def __init__(self, run: Runnable, piece: Piece, above_one: Sequence[tuple[int, int | None]] = ()) -> None:
        super().__init__()
        self._run = run
        self._piece = piece  # keeps its functions alive: their ids, which are in its key, must not become another's
        self._above_one = above_one

    def forward(self, *args: Any) -> Sequence[Any]:
        if any((args[i] if axis is None else args[i].shape[axis]) <= 1 for i, axis in self._above_one):
            return self._piece.graph_module(*args)
        return self._run(*args)


class CompressedGraph:
    """A compressed graph as Dynamo calls it: checks the prompt, runs, and notes what happened."""

    def __init__(
        self,
        compiled: Runnable,
        original: GraphModule,
        num_outputs: int,
        expected: tuple[int, ExpectedPlaceholders] | None,
        state: Rewrite,
        record: GraphRecord,
    ) -> None:
        self._compiled = compiled
        self._original = original
        self._num_outputs = num_outputs
        self._expected = expected
        self._config = state.config
        self._num_counts = len(state.video.counts) if state.video else 0
        self._tells_first = state.video is not None and state.video.first is not None
        self._inner_layers = state.inner.layers if state.inner else ()
        self._reuses = state.reused is not None
        self.record = record
        self._path = state.path
        self._frames_only = state.frames_only

    @property
    def any_length(self) -> bool:
        """Whether it serves videos of any number of frames above 1."""
        return self._path is not None and not isinstance(self._path.frames, int)

    def rows_of(self, frames: int) -> int:
        """Rows of a video of so many frames that is not compressed."""
        assert isinstance(self._path, Boundary)
        return self._path.rows_of(frames)

    def __call__(self, *args: Any) -> Sequence[Any]:
        if self._expected is not None:
            index, expected = self._expected
            reason = expected.reason_not_to_cut(args[index])
            if reason is not None:
                fall_back(
                    reason,
                    "Use earlytom_compile.compile(model) and generate(), or split the batch",
                    self._config,
                    self.record,
                )
                self.record.ran_uncompressed()
                return self._original(*args)
        outputs = self._compiled(*args)
        self._note(outputs[self._num_outputs :], args)
        return outputs[: self._num_outputs]

    def _note(self, counts: Sequence[Any], args: tuple[Any, ...]) -> None:
        record = self.record
        reuse = ReusePlan(*counts[:5]) if self._reuses else None
        counts = counts[5:] if self._reuses else counts
        frames, rest = counts[: self._num_counts], list(counts[self._num_counts :])
        record.last_call = time.monotonic()
        if self._frames_only:
            assert self._path is not None
            record.last_counts = Counts(frames, None, frames[-1] * self._path.tokens, reuse)
            LAST_MERGES.set((frames, rest, reuse))
            return
        first = rest.pop(0) if self._tells_first else None
        inside, rest = rest[len(rest) - len(self._inner_layers) :], rest[: len(rest) - len(self._inner_layers)]
        record.inside = [(layer, kept.shape[1]) for layer, kept in zip(self._inner_layers, inside, strict=True)]
        if self._expected is not None:
            record.prompt = (args[self._expected[0]].shape[1], rest.pop(0).shape[1])
        record.last_counts = Counts(frames, rest.pop(0), rest.pop(0) if rest else None, reuse, first)
        LAST_COUNTS.set((self, record.last_counts))


def fall_back(reason: str, cure: str, config: EarlyTomConfig, record: GraphRecord) -> None:
    """Say that something runs uncompressed: a warning, or an error under ``strict=True``."""
    record.note(reason)
    if config.strict:
        raise EarlyTomCompileError(f"not compressed: {reason}. {cure}. (strict=True makes this an error.)")
    log.info("not compressed: %s", reason)
    warnings.warn(f"running without compression: {reason}. {cure}.", EarlyTomFallbackWarning, stacklevel=2)


def _append_counts(state: Rewrite) -> int:
    """Add frame counts, the cut and the kept tokens to the graph's outputs; returns how many there were."""
    (output,) = (node for node in state.graph_module.graph.nodes if node.op == "output")
    own = tuple(output.args[0])  # type: ignore[arg-type]
    output.args = ((*own, *state.counted),)
    state.graph_module.recompile()
    return len(own)


def _expected(state: Rewrite) -> tuple[int, ExpectedPlaceholders] | None:
    boundary = state.boundary
    if boundary is None or boundary.placeholders is None:
        return None
    inputs = [node for node in state.graph_module.graph.nodes if node.op == "placeholder"]
    expected = ExpectedPlaceholders(
        boundary.placeholders.token,
        boundary.videos,
        boundary.rows_of(int(boundary.frames)),
        even_rows=state.config.keeps_exactly() and state.even_rows,
    )
    return inputs.index(boundary.placeholders.input_ids), expected
