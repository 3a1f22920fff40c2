"""What the compiler did to a model: what matched, what was inserted, what was left alone and why.

>>> earlytom_compile.report(model)             # the same in print(); a table in a notebook
state            compressing; the last call was compressed
options          retain_ratio=0.1, variant='plus', the others at their defaults
vision encoder   model.vision_tower.encoder.layers (26 layers), reuses patches but in layers 23, 24, 25
video 0          frames 32, patches 23328 -> 7290 (changed beyond 0.06), tokens 6272 -> 627
prompt           6310 -> 665 tokens
"""

import html
import inspect
import logging
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .config import EarlyTomConfig
from .errors import EarlyTomConfigError
from .families.registry import has_family
from .report_lines import COMPRESSING, NEVER_COMPILED, NOT_CALLED, NOTHING_YET, RESTORED, lines_of
from .reused import computed_patches

log = logging.getLogger(__name__)


Inside = Sequence[tuple[int, int]]
"""(layer, positions of the prompt from there on) where the language model went on with fewer tokens."""


@dataclass
class GraphRecord:
    """One compiled graph; what a call did is kept as device tensors and read only when somebody asks."""

    compile_id: str
    recompile: bool
    cause: str = ""
    """What the code is for that no other code was there for."""
    config: EarlyTomConfig | None = None
    encoder: str = ""
    layers: int = 0
    merge_layers: tuple[int, ...] = ()
    tokens_per_frame: int = 0  # P, after pooling
    budget: Callable[[int, int], int] | None = None  # (F, P) -> K; None where that depends on the content
    inserted: dict[str, int] = field(default_factory=dict)
    providers: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    lowering: str = ""
    stages: tuple[int, int] | None = None  # pieces of the graph, kinds of them that were compiled
    cuda_graphs: list["TimedGraph"] = field(default_factory=list)
    last_call: float = 0.0  # time.monotonic(), 0 = never
    last_counts: "Counts | None" = None
    prompt: tuple[int, int] | None = None
    inside: Inside = ()
    parameters: list[weakref.ref[torch.Tensor]] = field(default_factory=list)

    @property
    def compressed(self) -> bool:
        """True if this graph compresses a video."""
        return bool(self.encoder) and bool(self.inserted)

    @property
    def part(self) -> str:
        """What was compiled, for people."""
        if "language model" in self.seconds:
            return "prompt"
        return "video" if self.compressed else "model"

    @property
    def function(self) -> str:
        """What Dynamo numbers the compiled function by: ``"3"`` of ``"3/1"``."""
        return self.compile_id.rpartition("/")[0]

    def ran_uncompressed(self) -> None:
        """Remember a call that kept all tokens."""
        self.last_call, self.last_counts, self.prompt, self.inside = time.monotonic(), None, None, ()

    def note(self, reason: str) -> None:
        """Remember a reason, once."""
        if reason not in self.reasons:
            self.reasons.append(reason)

    def describe(self, counts: "Counts") -> list[dict[str, Any]]:
        """Frames and tokens of each video of a call, and its patches where they are reused."""
        videos = torch.stack(list(counts.frames), dim=1).tolist()
        if self.budget is not None:
            kept = [self.budget(frames[0], self.tokens_per_frame) for frames in videos]
        else:
            assert counts.tokens is not None
            kept = counts.tokens.tolist()
        described: list[dict[str, Any]] = [
            {"frames": frames, "tokens": [frames[0] * self.tokens_per_frame, tokens]}
            for frames, tokens in zip(videos, kept, strict=True)
        ]
        if (plan := counts.reuse) is not None:
            found = computed_patches(plan.source, plan.change, plan.measured, plan.distinct)
            for video, patches in zip(described, found, strict=True):
                video["patches"] = asdict(patches)
        return described


@dataclass(frozen=True)
class ReusePlan:
    """What one call computed of its V videos of F frames with S places each, and what it reused, as device tensors."""

    source: torch.Tensor  # int64 [V, F, S], the frame in which each place was last computed
    change: torch.Tensor  # float32 [V, F, S], how much it differed from then
    computed: torch.Tensor  # int64 [V], places that were computed
    distinct: torch.Tensor  # int64 [V], frames that layers in full computed: those that repeat no other exactly
    measured: torch.Tensor  # float32 [V, 2], the video's own noise and the threshold that followed from it


@dataclass(frozen=True)
class Counts:
    """What one call kept, as device tensors: nobody waits for them until somebody asks."""

    frames: Sequence[torch.Tensor]  # int64 [V] each: at first, then after each merge layer
    kept: torch.Tensor | None  # int64 [V, K, 2], or [M, 2] of all videos: the (merged frame, token) of each that stays
    tokens: torch.Tensor | None  # int64 [V] where it depends on the content, else the record's budget tells
    reuse: ReusePlan | None = None  # None where every patch of every frame was computed
    first: torch.Tensor | None = None  # int64 [N], of one video: the first of the frames each merged frame is made of


@dataclass(frozen=True)
class TimedGraph:
    """A CUDA graph against plain calls; the faster of the two is used."""

    part: str  # of the model, and the size
    seconds: float
    plain_seconds: float

    @property
    def used(self) -> bool:
        """Whether the graph is replayed."""
        return self.seconds < self.plain_seconds

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        milliseconds = {"graph_ms": round(1e3 * self.seconds, 3), "plain_ms": round(1e3 * self.plain_seconds, 3)}
        return {"part": self.part, "used": self.used, **milliseconds}


_RECORDS: list[GraphRecord] = []
_RESTORED: "weakref.WeakSet[torch.nn.Module]" = weakref.WeakSet()  # a mark on the model itself would not be "exactly"


def add_record(record: GraphRecord, example_inputs: Iterable[Any]) -> GraphRecord:
    """Remember ``record`` for the models that own the parameters among ``example_inputs``."""
    record.parameters = [weakref.ref(x) for x in example_inputs if isinstance(x, torch.nn.Parameter)]
    _RECORDS[:] = [kept for kept in _RECORDS if any(ref() is not None for ref in kept.parameters)]
    _RECORDS.append(record)
    return record


def discard_record(record: GraphRecord) -> None:
    """Forget ``record``, whose graph was never compiled."""
    _RECORDS[:] = [kept for kept in _RECORDS if kept is not record]


def records_of(model: torch.nn.Module) -> list[GraphRecord]:
    """Records of the graphs that use a parameter of ``model``, oldest first."""
    owned = {id(parameter) for parameter in model.parameters()}
    return [record for record in _RECORDS if any(id(ref()) in owned for ref in record.parameters)]


def forget(model: torch.nn.Module) -> None:
    """Drop the records of ``model``."""
    dropped = {id(record) for record in records_of(model)}
    _RECORDS[:] = [record for record in _RECORDS if id(record) not in dropped]


def note_restored(model: torch.nn.Module, restored: bool) -> None:
    """Remember that ``model`` was compiled once and is not any more, or that it is again."""
    (_RESTORED.add if restored else _RESTORED.discard)(model)


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Say in the log (level INFO) that ``what`` begins, and how long it took; for what may take minutes."""
    log.info("%s ...", what)
    start = time.perf_counter()
    yield
    log.info("%s: %.1f s", what, time.perf_counter() - start)


@dataclass(frozen=True, repr=False)
class Report:
    """What is known about one model; ``str()``, ``repr()`` and a notebook's table for people, ``to_dict()`` for
    programs."""

    records: tuple[GraphRecord, ...]
    calls: tuple[tuple[GraphRecord, Counts], ...] | None = None
    prompt: tuple[int, int] | None = None
    inside: Inside = ()
    notes: tuple[str, ...] = ()
    state: str = NOT_CALLED
    """One of :data:`report_lines.STATES`."""
    config: EarlyTomConfig | None = None
    """The options in force; None where none are."""
    last_call: str | None = None
    """``"compressed"``, ``"encoded"`` (by ``encode_videos``), ``"no video"``, ``"uncompressed"`` (with a reason) or
    ``"failed"``; None = there was none."""

    def to_dict(self) -> dict[str, Any]:
        """All of the report as plain values."""
        compressed = [record for record in self.records if record.compressed]
        last = max(compressed, key=lambda record: record.last_call, default=None)
        reasons = [*self.notes, *(reason for record in self.records for reason in record.reasons)]
        prompt = self.prompt if self.calls is not None else last.prompt if last else None
        inside = self.inside if self.calls is not None else last.inside if last else ()
        calls = self.calls
        if calls is None:
            calls = ((last, last.last_counts),) if last is not None and last.last_counts is not None else ()
        if self.last_call not in (None, "compressed", "encoded"):
            prompt, inside, calls = None, (), ()
        return {
            "state": self.state,
            "last_call": self.last_call,
            "options": _options(self.config) if self.config is not None else None,
            "encoder": {"layers": last.layers, "module": last.encoder} if last else None,
            "merge_layers": list(last.merge_layers) if last else [],
            "full_layers": list(_full_layers(last)) if last else [],
            "inserted": dict(last.inserted) if last else {},
            "providers": dict(last.providers) if last else {},
            "lowering": last.lowering if last else None,
            "stages": list(last.stages) if last and last.stages else None,
            "cuda_graphs": [graph.to_dict() for record in self.records for graph in record.cuda_graphs],
            "videos": [video for record, counts in calls for video in record.describe(counts)],
            "prompt": list(prompt) if prompt else None,
            "inside": [{"layer": layer, "prompt": positions} for layer, positions in inside],
            "reasons": list(dict.fromkeys(reasons)),
            "compile_seconds": round(sum(sum(record.seconds.values()) for record in self.records), 3),
            "graphs": len(self.records),
            "recompiles": sum(record.recompile for record in self.records),
            "compilations": [_compilation(record) for record in self.records],
            "graph_breaks": sum(torch._dynamo.utils.counters["graph_break"].values()),
        }

    def __str__(self) -> str:
        return "\n".join(f"{heading:16} {text}" for heading, text in self._lines())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """For notebooks: the lines of ``str()`` as a table."""
        left = 'style="text-align: left; vertical-align: top; white-space: pre-wrap"'
        rows = "".join(
            f"<tr><th {left}>{html.escape(heading)}</th><td {left}>{html.escape(text)}</td></tr>"
            for heading, text in self._lines()
        )
        return f'<table aria-label="earlytom_compile report"><tbody>{rows}</tbody></table>'

    def _lines(self) -> list[tuple[str, str]]:
        """(heading, text), line by line."""
        return lines_of(self.to_dict(), self.config)


def _full_layers(record: GraphRecord) -> tuple[int, ...]:
    """Those that compute every patch where others reuse some."""
    config = record.config
    return config.resolve_full_layers(record.layers) if config is not None and config.reuses() else ()


def _options(config: EarlyTomConfig) -> dict[str, Any]:
    return asdict(config)


def _compilation(record: GraphRecord) -> dict[str, Any]:
    return {
        "id": record.compile_id,
        "part": record.part,
        "compressed": record.compressed,
        "recompile": record.recompile,
        "cause": record.cause,
        "seconds": round(sum(record.seconds.values()), 3),
    }


def report(model: torch.nn.Module) -> Report:
    """The report of a model compiled by :func:`earlytom_compile.compile` or with ``backend="earlytom"``.

    ``state`` is ``"never compiled"`` for a model that could be, ``"compiled, not called yet"``, ``"compressing"``,
    ``"called, nothing compressed so far"``, or ``"restored"``. Frame and token counts are those of the last call, and
    none after a call without a video. ``compile_seconds`` are those of the passes and of Inductor for the graphs of
    this model; not in it are Dynamo's tracing, graphs that were left unchanged, Triton kernels compiled at their first
    launch, captured CUDA graphs, and decoding that transformers compiles. Compilations are those since ``compile()``
    last changed the options; ``graph_breaks`` counts every backend of this process. Raises
    :class:`EarlyTomConfigError` for what nobody could have compiled, or has.
    """
    if not isinstance(model, torch.nn.Module):
        raise EarlyTomConfigError(
            f"report() got {_name_of(model)}: give the model that earlytom_compile.compile() returned, or one compiled "
            'with torch.compile(model, backend="earlytom").'
        )
    # Among the modules, so that torch.compile(model) and wrappers such as PEFT's show what is inside.
    inside = list(model.modules())
    handle = next((module.__dict__["_earlytom"] for module in inside if "_earlytom" in module.__dict__), None)
    records = tuple(records_of(model))
    if handle is not None:
        return _report_in_place(handle, records)
    options = backend_options(model)
    if records or options is not None:
        return _report_of_backend(records, options)
    if any(module in _RESTORED for module in inside):
        return Report((), state=RESTORED)
    if has_family(inside):
        return Report((), state=NEVER_COMPILED)
    raise EarlyTomConfigError(
        f"report() got {_name_of(model)}, of which nothing is known: it has not been given to "
        'earlytom_compile.compile(), and no call of torch.compile(model, backend="earlytom") has compiled it.'
    )


def _name_of(given: Any) -> str:
    return f"the class {given.__name__}" if isinstance(given, type) else f"an object of type {type(given).__name__}"


def _report_in_place(handle: Any, records: tuple[GraphRecord, ...]) -> Report:
    called = COMPRESSING if handle.compressed else NOTHING_YET
    state = NOT_CALLED if handle.last_call is None else called
    left_alone = handle.prefill.left_alone if handle.prefill is not None else None
    notes = (*handle.notes, left_alone) if left_alone else tuple(handle.notes)
    # Weights that are loaded for each call (accelerate) are other ones every time, and own no records.
    records += tuple(record for record in handle.records() if all(record is not known for known in records))
    last = tuple(handle.videos), handle.prompt, tuple(handle.inside)
    return Report(records, *last, notes, state, handle.config, handle.last_call)


def _report_of_backend(records: tuple[GraphRecord, ...], options: Any) -> Report:
    """What the graphs that were compiled tell; which of them ran last tells what the last call was."""
    config = next((record.config for record in reversed(records) if record.config is not None), None)
    if config is None and options is not None:
        config = EarlyTomConfig.from_options(options)
    if not records:
        return Report((), state=NOT_CALLED, config=config)
    last = max((record for record in records if record.compressed), key=lambda record: record.last_call, default=None)
    if last is None:
        return Report(records, state=NOTHING_YET, config=config, last_call="uncompressed")
    # The same function compiled for another kind of call: one call runs one of the two. Other functions of the same
    # call, behind a graph break, have other numbers.
    others = [record for record in records if record.function == last.function and not record.compressed]
    if last.last_counts is None or any(record.last_call > last.last_call for record in others):
        return Report(records, state=COMPRESSING, config=config, last_call="uncompressed")
    return Report(records, state=COMPRESSING, config=config, last_call="compressed")


def backend_options(model: torch.nn.Module) -> dict[str, Any] | None:
    """The options of ``torch.compile(model, backend="earlytom")`` or ``model.compile(backend="earlytom")``, which
    Dynamo keeps where nobody looks; None for a model that was compiled otherwise, or not."""
    context, function = model.__dict__.get("dynamo_ctx"), model.__dict__.get("_compiled_call_impl")
    if context is None and function is not None:
        context = inspect.getclosurevars(function).nonlocals.get("self")
    backend = getattr(context, "callback", None)
    while backend is not None:
        if getattr(backend, "compiler_name", None) == "earlytom":
            keywords = getattr(backend, "kwargs", {})
            mode = {"mode": keywords["mode"]} if keywords.get("mode") else {}
            return {**(keywords.get("options") or {}), **mode}
        backend = getattr(backend, "_torchdynamo_orig_backend", None)
    return None
