"""The ``torch.compile`` backend: ``torch.compile(model, backend="earlytom", options={"retain_ratio": 0.1})``.

Either the graph that Dynamo hands over is rewritten completely, or it is compiled unchanged by Inductor with an
:class:`EarlyTomFallbackWarning` that names the reason and the cure. Loaded by torch through the entry point, which
is also the moment when transformers' modules are made traceable.
"""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from .config import EarlyTomConfig
from .errors import EarlyTomConfigError, EarlyTomError, EarlyTomFallbackWarning
from .families.registry import make_traceable
from .integrations.spellings import warn_of_generate
from .passes.manager import Rewrite, run_passes
from .passes.reasons import NotApplicable, NothingToCompress
from .reporting import GraphRecord, add_record, discard_record, progress
from .stages import Kinds, fall_back, inductor_options, lower, lower_compressed

Compiled = Callable[..., Sequence[Any]]


def earlytom(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Backend for ``torch.compile``; ``options`` are those of :class:`EarlyTomConfig`, one of which is ``mode``, since
    ``torch.compile`` takes either of the two."""
    try:
        config = EarlyTomConfig.from_options({**(options or {}), **({"mode": mode} if mode else {})})
    except EarlyTomConfigError as error:
        return raising(error)
    return compile_graph(graph_module, example_inputs, config)


def compile_graph(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    config: EarlyTomConfig,
    *,
    features_only: bool = False,
    frames_only: bool = False,
    kinds: Kinds | None = None,
    cause: str = "",
) -> Compiled:
    """Compress and lower one Dynamo graph.

    With ``features_only`` the caller knows that it gets compressed video features and places them itself, with
    ``frames_only`` that the graph is a vision tower whose frames merge; ``kinds``
    holds what the same caller has compiled before, and ``cause`` says for the report what this graph is for.
    """
    record = add_record(_new_record(config, cause), example_inputs)
    original = GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    state = Rewrite(graph_module, config, features_only, frames_only, example_inputs)
    try:
        with progress(f"finding the video in a graph of {len(graph_module.graph.nodes)} operations"):
            state = run_passes(state)
        _describe(state, record)
        return lower_compressed(state, original, example_inputs, record, kinds)
    except NotApplicable as found:
        if isinstance(found, NothingToCompress):
            record.note(found.reason)
        elif _computes(original):
            try:
                fall_back(found.reason, found.cure, config, record)
            except EarlyTomError as error:
                return raising(error)
        return _noting(lower(original, example_inputs, config.lowering, inductor_options(config.mode)), record)
    except EarlyTomConfigError as error:
        return raising(error)
    except Exception:
        discard_record(record)  # such as Dynamo's own request to trace once more: nothing was compiled
        raise


def _noting(run: Compiled, record: GraphRecord) -> Compiled:
    """``run``, whose calls the report shall know of."""

    def run_uncompressed(*args: Any) -> Sequence[Any]:
        record.ran_uncompressed()
        return run(*args)

    return run_uncompressed


def raising(error: EarlyTomError) -> Compiled:
    """A graph that raises ``error`` when it is called; raised here, Dynamo would wrap it in an error of its own."""

    def raise_error(*args: Any) -> Sequence[Any]:
        raise error

    return raise_error


def _new_record(config: EarlyTomConfig, cause: str) -> GraphRecord:
    compile_id = torch._guards.CompileContext.current_compile_id()
    compilation = getattr(compile_id, "frame_compile_id", None) or 0
    cause = cause or ("inputs of other shapes than before" if compilation else "")
    record = GraphRecord(str(compile_id), compilation > 0, cause, config=config, lowering=config.lowering)
    limit = torch._dynamo.config.recompile_limit
    if compilation + 1 >= limit:
        record.note(f"Dynamo compiles no more than {limit} shapes of one function; the next one runs uncompressed")
        warnings.warn(
            f"{record.reasons[-1]}. Use earlytom_compile.compile(model), which has no such limit, or raise "
            "torch._dynamo.config.recompile_limit.",
            EarlyTomFallbackWarning,
            stacklevel=2,
        )
    return record


def _describe(state: Rewrite, record: GraphRecord) -> None:
    path = state.path
    assert path is not None
    record.config = state.config
    if state.not_reusable:
        record.note(f"patches, so that frames merge: {state.not_reusable}")
    record.encoder = path.encoder.name
    record.layers = len(path.encoder.blocks)
    record.merge_layers = state.config.resolve_merge_layers(record.layers, path.encoder.full_layers)
    record.tokens_per_frame = path.tokens
    record.budget = state.config.token_budget if state.config.keeps_exactly() and not state.frames_only else None
    record.inserted, record.providers = state.inserted, state.providers
    record.seconds.update(state.seconds)


def _computes(graph_module: GraphModule) -> bool:
    """The pieces around a graph break that hold no matrix product have nothing to compress and no news to tell."""
    products = ("linear", "matmul", "bmm", "addmm", "conv", "attention", "transformer")
    return any(word in str(node.target) for node in graph_module.graph.nodes for word in products)


make_traceable()
warn_of_generate()
