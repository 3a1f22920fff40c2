"""What the compiler did to a model: what matched, what was inserted, what was left alone and why.

>>> print(earlytom_compile.report(model))
vision encoder  model.vision_tower.encoder.layers (26 layers), merges after 6, 21, 23
last call       frames 32 -> 27 -> 22 -> 19, video tokens 6272 -> 627, prompt 6310 -> 665
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class GraphRecord:
    """One compiled graph; what a call did is kept as device tensors and read only when somebody asks."""

    compile_id: str
    recompile: bool
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
    parameters: list[weakref.ref[torch.Tensor]] = field(default_factory=list)

    @property
    def compressed(self) -> bool:
        """True if this graph compresses a video."""
        return bool(self.encoder) and bool(self.inserted)

    def note(self, reason: str) -> None:
        """Remember a reason, once."""
        if reason not in self.reasons:
            self.reasons.append(reason)

    def describe(self, counts: "Counts") -> list[dict[str, list[int]]]:
        """Frames and tokens of each video of a call."""
        videos = torch.stack(list(counts.frames), dim=1).tolist()
        if self.budget is not None:
            kept = [self.budget(frames[0], self.tokens_per_frame) for frames in videos]
        else:
            assert counts.tokens is not None
            kept = counts.tokens.tolist()
        return [
            {"frames": frames, "tokens": [frames[0] * self.tokens_per_frame, tokens]}
            for frames, tokens in zip(videos, kept, strict=True)
        ]


@dataclass(frozen=True)
class Counts:
    """What one call kept, as device tensors: nobody waits for them until somebody asks."""

    frames: Sequence[torch.Tensor]  # int64 [V] each: at first, then after each merge layer
    tokens: torch.Tensor | None  # int64 [V] where it depends on the content, else the record's budget tells


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


@dataclass(frozen=True)
class Report:
    """What is known about one model; ``str()`` for people, ``to_dict()`` for programs."""

    records: tuple[GraphRecord, ...]
    calls: tuple[tuple[GraphRecord, Counts], ...] | None = None
    prompt: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All of the report as plain values."""
        compressed = [record for record in self.records if record.compressed]
        last = max(compressed, key=lambda record: record.last_call, default=None)
        reasons = [*self.notes, *(reason for record in self.records for reason in record.reasons)]
        prompt = self.prompt if self.calls is not None else last.prompt if last else None
        calls = self.calls
        if calls is None:
            calls = ((last, last.last_counts),) if last is not None and last.last_counts is not None else ()
        return {
            "encoder": {"layers": last.layers, "module": last.encoder} if last else None,
            "merge_layers": list(last.merge_layers) if last else [],
            "inserted": dict(last.inserted) if last else {},
            "providers": dict(last.providers) if last else {},
            "lowering": last.lowering if last else None,
            "stages": list(last.stages) if last and last.stages else None,
            "cuda_graphs": [graph.to_dict() for record in self.records for graph in record.cuda_graphs],
            "videos": [video for record, counts in calls for video in record.describe(counts)],
            "prompt": list(prompt) if prompt else None,
            "reasons": list(dict.fromkeys(reasons)),
            "compile_seconds": round(sum(sum(record.seconds.values()) for record in self.records), 3),
            "graphs": len(self.records),
            "recompiles": sum(record.recompile for record in self.records),
            "graph_breaks": sum(torch._dynamo.utils.counters["graph_break"].values()),
        }

    def __str__(self) -> str:
        content = self.to_dict()
        encoder = content["encoder"]
        if encoder is None:
            lines = ["nothing compressed so far"]
        else:
            layers = ", ".join(map(str, content["merge_layers"])) or "none"
            operators = ", ".join(f"{count} {name}" for name, count in content["inserted"].items())
            providers = _describe_providers(content["providers"])
            lines = [
                f"vision encoder   {encoder['module']} ({encoder['layers']} layers), merges after {layers}",
                f"inserted         {operators}",
                f"computed by      {providers}",
                f"lowering         {content['lowering']}{_describe_stages(content['stages'])}",
            ]
        if graphs := content["cuda_graphs"]:
            lines.append(f"CUDA graphs      {sum(graph['used'] for graph in graphs)} of {len(graphs)} measured faster")
        for index, video in enumerate(content["videos"]):
            frames = " -> ".join(map(str, video["frames"]))
            before, after = video["tokens"]
            lines.append(f"video {index}          frames {frames}, tokens {before} -> {after}")
        if content["prompt"]:
            lines.append("prompt           {} -> {} tokens".format(*content["prompt"]))
        lines.append(
            f"compiled         {content['graphs']} graphs in {content['compile_seconds']} s, "
            f"{content['recompiles']} recompiles, {content['graph_breaks']} graph breaks in this process"
        )
        lines += [f"left alone       {reason}" for reason in content["reasons"]]
        return "\n".join(lines)


def _describe_providers(providers: dict[str, str]) -> str:
    operators: dict[str, list[str]] = {}
    for operator, provider in providers.items():
        operators.setdefault(provider, []).append(operator)
    if len(operators) == 1:
        return next(iter(operators))
    return "; ".join(f"{provider}: {', '.join(names)}" for provider, names in operators.items())


def _describe_stages(stages: list[int] | None) -> str:
    return f", {stages[0]} pieces of which {stages[1]} kinds are compiled" if stages else ""


def report(model: torch.nn.Module) -> Report:
    """The report of a model compiled by :func:`earlytom_compile.compile` or with ``backend="earlytom"``.

    Frame and token counts are those of the last call. ``compile_seconds`` are those of the passes and of Inductor for
    the graphs of this model; not in it are Dynamo's tracing, graphs that were left unchanged, Triton kernels compiled
    at their first launch, captured CUDA graphs, and decoding that transformers compiles. ``graph_breaks`` counts every
    backend of this process.
    """
    records = tuple(records_of(model))
    handle = model.__dict__.get("_earlytom")
    if handle is None:
        return Report(records)
    return Report(records, tuple(handle.videos), handle.prompt, tuple(handle.notes))
