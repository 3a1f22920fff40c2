"""The ways to the first token that are compared; all share one set of weights.

transformers            eager, all tokens
inductor                torch.compile, all tokens
earlytom r              earlytom_compile.compile(model), generate()
earlytom r (backend)    torch.compile(model, backend="earlytom"), forward()
earlytom merging r      as earlytom r with reuse=False: frames merge where the others reuse unchanged patches
earlytom reuse r        the other way round: variant="plus" with reuse, where the options let the others merge frames
subsampling r           inductor, every 1/r-th frame
average pooling r       inductor, means of 1/r neighbouring frames
visionzip r, ...        as earlytom r, method="visionzip" and so on: those of other papers, where they are asked for

All compiled ones get the same ``mode``, so that CUDA graphs or autotuning are no advantage of one of them. Subsampling
and average pooling keep whole frames, as many as come nearest to the tokens that EarlyTom keeps.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import earlytom_compile
from earlytom_compile.benchmarks.model_parts import LLM, TOKENS, VISION
from earlytom_compile.benchmarks.workload import Inputs, frames_of_inputs, tokens_beside, with_other_frames
from earlytom_compile.config import OF_EARLYTOM, EarlyTomConfig
from earlytom_compile.errors import EarlyTomConfigError
from earlytom_compile.integrations.caches import cache_of
from earlytom_compile.methods.registry import EARLYTOM, method_named, method_names
from earlytom_compile.qwen_shape import is_qwen

First = tuple[Tensor, Any]
"""The first token [R, 1] and the cache behind it."""
_OF_REUSE, _OF_MERGING = ("tau_reuse", "full_layers", "encode_ratio"), ("merge_layers", "tau_merge")
"""Options that have an effect where unchanged patches are reused, and where frames merge instead."""
_OF_INNER = ("inner_layer", "inner_drop_ratio")
_REUSE = "reuse"
EVERY = "all"
"""In the place of an arm's beginning: those that are measured anyhow, and other papers' methods."""


@dataclass(frozen=True)
class Arm:
    """A way to the first token."""

    name: str
    first_token: Callable[[], First]
    retain_ratio: float = 1.0
    model: Any = None
    frames: int = 0  # of each video, as the model gets it
    beside: int = 0  # positions of a prompt that are no tokens of its video's frames
    compresses: bool = False  # then the report of the last call belongs to ``model``
    called: tuple[str, ...] = ()  # stages whose modules Python calls, so that hooks on them fire
    options: dict[str, Any] = field(default_factory=dict)  # EarlyTom's, where it compresses


def make_arms(
    model: Any, inputs: Inputs, ratios: Sequence[float], options: dict[str, Any], methods: Sequence[str] = ()
) -> Iterator[Arm]:
    """Every arm for ``inputs``, and those of ``methods``; nothing is compiled before its first call."""
    videos = frames_of_inputs(model, inputs)
    frames, beside = videos.shape[1], tokens_beside(model, inputs)
    eager = partial(_forward, model, inputs)
    yield Arm("transformers", eager, 1.0, model, frames, beside, called=(VISION, TOKENS, LLM))
    inductor = torch.compile(model, dynamic=False, mode=options.get("mode"))
    yield Arm("inductor", partial(_forward, inductor, inputs), 1.0, model, frames, beside)
    for ratio in ratios:
        chosen = {**options, "retain_ratio": ratio}
        yield _in_place(model, inputs, chosen)
        yield _backend(model, inputs, chosen)
        if _has_another_way(options, model.config):
            name, others = _other_way(chosen)
            yield replace(_in_place(model, inputs, others), name=f"earlytom {name} {ratio:g}")
    for ratio in ratios:
        few = max(1, round(ratio * frames))
        for name, fewer in (("subsampling", _subsampled), ("average pooling", _averaged)):
            shorter = with_other_frames(model, inputs, fewer(videos, few))
            first_token, fewer_beside = partial(_forward, inductor, shorter), tokens_beside(model, shorter)
            yield Arm(f"{name} {ratio:g}", first_token, ratio, model, few, fewer_beside)
    for method in methods:
        for ratio in ratios:
            chosen = {**of_method(method, options), "retain_ratio": ratio}
            yield replace(_in_place(model, inputs, chosen), name=f"{method} {ratio:g}")


def other_methods() -> tuple[str, ...]:
    """The methods of other papers."""
    return tuple(name for name in method_names() if name != EARLYTOM)


def asked_methods(ratios: Sequence[float], beginnings: Sequence[str]) -> list[str]:
    """Those of :func:`other_methods` whose arms somebody asks for; none without ``beginnings``."""
    meant = _meant(beginnings)
    return [
        method
        for method in other_methods()
        if EVERY in beginnings or any(f"{method} {ratio:g}".startswith(meant) for ratio in ratios)
    ]


def of_method(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """Those of EarlyTom's ``options`` that mean something to another paper's method, and its name."""
    found = method_named(method)
    inside = found is not None and found.inside is not None
    reused = () if options.get("reuse") else _OF_REUSE
    without = (*OF_EARLYTOM, *reused, *(_OF_INNER if inside else ()))
    return {**{name: value for name, value in options.items() if name not in without}, "method": method}


def is_ours(name: str) -> bool:
    """Whether this package compresses in the arm, or the server, of that name."""
    return name.startswith(tuple(method_names()))


def arm_names(
    ratios: Sequence[float], options: dict[str, Any], methods: Sequence[str] = (), config: Any = None
) -> list[str]:
    """Names of :func:`make_arms`, before there is a model; ``config`` is its configuration."""
    names = ["transformers", "inductor"]
    other = [_other_way(options)[0]] if _has_another_way(options, config) else []
    for ratio in ratios:
        names += [f"earlytom {ratio:g}", f"earlytom {ratio:g} (backend)"]
        names += [f"earlytom {way} {ratio:g}" for way in other]
    names += [f"{name} {ratio:g}" for ratio in ratios for name in ("subsampling", "average pooling")]
    return names + [f"{method} {ratio:g}" for method in methods for ratio in ratios]


def _has_another_way(options: dict[str, Any], config: Any) -> bool:
    """The towers of Qwen reuse no patches: frames merge with any variant, unless ``reuse=True`` says otherwise."""
    return bool(options.get("reuse")) or not is_qwen(config)


def _other_way(options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What the other way to fewer patches in the encoder is called, and its options."""
    reuses = EarlyTomConfig.from_options(options).reuses()
    without = _OF_REUSE if reuses else _OF_MERGING
    others = {name: value for name, value in options.items() if name not in without}
    if reuses:
        return "merging", {**others, "reuse": False}
    return _REUSE, {**others, "variant": "plus", "reuse": True}


def choose(arms: Iterable[Any], beginnings: Sequence[str]) -> list[Any]:
    """Those of ``arms`` (anything with a name) whose names begin so, in their order; a whole method's name is the
    beginning of its own arms alone. Without beginnings, and for ``"all"``, all.

    Raises :class:`EarlyTomConfigError` for a beginning that no name has.
    """
    arms = list(arms)
    require_beginnings([arm.name for arm in arms], beginnings)
    if not beginnings or EVERY in beginnings:
        return arms
    meant = _meant(beginnings)
    return [arm for arm in arms if arm.name.startswith(meant)]


def require_beginnings(names: Sequence[str], beginnings: Sequence[str]) -> None:
    """Raise :class:`EarlyTomConfigError` for a beginning that none of ``names`` has."""
    for beginning, meant in zip(beginnings, _meant(beginnings), strict=True):
        if beginning != EVERY and not any(name.startswith(meant) for name in names):
            raise EarlyTomConfigError(f"arms={beginning!r}: no arm begins so; there are {', '.join(names)}.")


def _meant(beginnings: Sequence[str]) -> tuple[str, ...]:
    """``"fastv"`` is no beginning of ``"fastvid 0.1"``: it is the whole name of a method."""
    known = method_names()
    return tuple(f"{beginning} " if beginning in known else beginning for beginning in beginnings)


def twin_of(model: Any) -> Any:
    """A second model with the same parameters."""
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def _in_place(model: Any, inputs: Inputs, options: dict[str, Any]) -> Arm:
    twin: Any = earlytom_compile.compile(twin_of(model), **options)
    choices = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "pad_token_id": 0}

    def first_token() -> First:
        output = twin.generate(**inputs, **choices)
        return output.sequences[:, -1:], cache_of(output)

    # Tokens go inside the language model only where no hooks watch it.
    called = () if EarlyTomConfig.from_options(options).reduces_inside() else (LLM,)
    return Arm(
        f"earlytom {options['retain_ratio']:g}",
        first_token,
        options["retain_ratio"],
        twin,
        frames_of_inputs(model, inputs).shape[1],
        tokens_beside(model, inputs),
        compresses=True,
        called=called,
        options=options,
    )


def _backend(model: Any, inputs: Inputs, options: dict[str, Any]) -> Arm:
    twin = twin_of(model)
    fast = torch.compile(twin, backend="earlytom", options=options, dynamic=False)
    return Arm(
        f"earlytom {options['retain_ratio']:g} (backend)",
        partial(_forward, fast, inputs),
        options["retain_ratio"],
        twin,
        frames_of_inputs(model, inputs).shape[1],
        tokens_beside(model, inputs),
        compresses=True,
        options=options,
    )


def _forward(model: Any, inputs: Inputs) -> First:
    output = model(**inputs, logits_to_keep=1)
    return output.logits[:, -1:].argmax(-1), cache_of(output)


def _subsampled(videos: Tensor, frames: int) -> Tensor:
    """[R, frames, ...]: the middle frame of each of ``frames`` equal stretches."""
    steps = (torch.arange(frames) + 0.5) * (videos.shape[1] / frames)
    return videos[:, steps.long().to(videos.device)]


def _averaged(videos: Tensor, frames: int) -> Tensor:
    """[R, frames, ...]: the mean of each of ``frames`` near-equal stretches."""
    return torch.stack([part.mean(1) for part in videos.tensor_split(frames, dim=1)], dim=1)
