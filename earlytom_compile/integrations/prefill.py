"""The language model's pass over the prompt, compiled once for prompts of every length.

    prefill = CompiledPrefill(model.model.language_model)   # its forward() is replaced ...
    with prefill.active(attention_mask):                    # ... and compiles prompts here, in this thread only
        model.generate(...)
    prefill.remove()

One compilation serves all decoder layers (passes/split_stages.py), unless one graph of everything is asked for.
Decoding is left to transformers, which compiles it itself for static caches; its trace of the model goes straight
through to the model's own code. Where tokens go inside the language model (inner_steps.py), every prompt with a video
is traced for that, and compiled or not as ``lowering`` says.
"""

import copy
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..methods.base import Step
from ..passes.reasons import NotApplicable
from ..reporting import GraphRecord, add_record, progress
from ..stages import inductor_options, lower_stages, lower_whole
from .attention_choice import COMPILES, attention_of
from .caches import cache_of, cache_to_make, counts_first_layer, given_cache
from .inner_steps import InnerPrompt, erase_mark, find_mark, shorten
from .placement import own_code_because
from .shorter_caches import ShorterLayer, forget_if_empty, grows, keep_in_mind
from .tracing import FirstCallAlone, spread_deepstack, with_its_own_code

FEWEST_POSITIONS_ON_CPU = 128
"""A CPU gains a few milliseconds from compiled code in a shorter prompt, and has nothing to launch; compiling takes ten
seconds and more."""


@dataclass
class Prompt:
    """The prompt whose pass is to come."""

    padded: bool
    """Whether some position of it is not attended to, or nobody knows."""
    inner: InnerPrompt | None = None
    """Where its videos are, if tokens of theirs go inside the language model; None once that is done."""
    kept: Sequence[Tensor] = ()
    """int64 [R, S'] for each step: which positions were left."""

    def take_inner(self, embeds: Tensor) -> InnerPrompt | None:
        """The first time, if ``embeds`` [R, S, C] are the prompt's."""
        inner = self.inner
        if inner is None or embeds.shape[1] != inner.length or embeds.shape[0] % len(inner.video_of):
            return None
        self.inner = None
        return inner.for_rows(embeds.shape[0]).on_device(embeds.device)


class CompiledPrefill:
    """Stands in for the ``forward`` of a language model.

    ``lowering`` is ``"staged"``, ``"whole"``, or ``"eager"``, which compiles nothing, ``mode`` Inductor's, ``without``
    are modules in it that prompts do not go through, such as a vision tower. Prompts that are too short to gain from
    it run as they are. ``steps`` are where tokens of videos go, and ``fall_back`` is told (reason, cure) where they
    cannot."""

    def __init__(
        self,
        language_model: torch.nn.Module,
        lowering: str = "staged",
        mode: str | None = None,
        without: Sequence[torch.nn.Module] = (),
        steps: Sequence[Step] = (),
        fall_back: Callable[[str, str], None] | None = None,
    ) -> None:
        self._module = language_model
        self._without = without
        self._before = language_model.__dict__.get("forward")
        self._own = language_model.forward
        self._lowering = lowering
        self._mode = mode
        self.steps = tuple(steps)
        self._fall_back = fall_back
        self._shorter: list[ShorterLayer] = []
        self._reset()
        functools.update_wrapper(self, self._own)
        self.install()

    def _reset(self) -> None:
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._prompt: ContextVar[Prompt | None] = ContextVar("earlytom_prefill", default=None)  # None = not active

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompiledPrefill":
        # A copy of the model compiles for itself: compiled code belongs to the weights it was traced with.
        twin = memo[id(self)] = type(self).__new__(type(self))
        state = {name: value for name, value in self.__dict__.items() if name not in ("_compiled", "_prompt")}
        twin.__dict__.update(copy.deepcopy(state, memo))
        twin._reset()
        return twin

    def install(self) -> None:
        """Put this in the place of the language model's ``forward``, where it is from the start."""
        self._module.__dict__["forward"] = self
        self._cover_layers()

    def _cover_layers(self) -> None:
        """Stand in for every layer before which tokens may have gone, those that came since included."""
        for index, layer in enumerate(decoder_layers(self._module) if self.steps else ()):
            covered = any(shorter.layer is layer for shorter in self._shorter)
            if index >= self.steps[0].layer and not covered:
                own = layer.__dict__.get("forward")  # a copy of a layer brings a copy of what stood in for it
                self._shorter.append(own if isinstance(own, ShorterLayer) else ShorterLayer(layer, index))

    def remove(self) -> None:
        """Put the language model's own ``forward`` back, unless somebody has replaced ours since."""
        for layer in self._shorter:
            layer.remove()
        self._shorter = []
        if self._module.__dict__.get("forward") is self:
            del self._module.__dict__["forward"]
            if self._before is not None:
                self._module.__dict__["forward"] = self._before

    @contextmanager
    def active(self, attention_mask: torch.Tensor | None, inner: InnerPrompt | None = None) -> Iterator[Prompt]:
        """Compile prompts inside this context; other threads and other calls run the model's own code.

        ``attention_mask`` [R, S] is that of the prompts to come. It is read here, on the host or where the device
        has nothing to finish, since their own mask comes behind the encoder; None stands for one not known. ``inner``
        says where the videos are whose tokens go inside."""
        prompt = Prompt(attention_mask is None or not bool(attention_mask.all()), inner)
        token = self._prompt.set(prompt)
        try:
            yield prompt
        finally:
            self._prompt.reset(token)

    @property
    def left_alone(self) -> str | None:
        """Why prompts run as they are, whatever their length; None if they are compiled."""
        reason = self._why_own_code
        return f"the language model's pass over the prompt is not compiled: {reason}" if reason else None

    @property
    def _why_own_code(self) -> str | None:
        attention = attention_of(self._module)
        fine = attention is None or attention in COMPILES
        return own_code_because(self._module, self._without) if fine else f"its attention is {attention}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return self._own(*args, **kwargs)
        if self.steps:
            forget_if_empty(given_cache(kwargs))
        prompt, embeds = self._prompt.get(), kwargs.get("inputs_embeds")
        if prompt is None or embeds is None:
            return self._own(*args, **kwargs)
        inner = self._inner_of(prompt, kwargs)
        gains = self._lowering != "eager" and embeds.shape[1] >= _fewest_positions(embeds.device)
        if torch.is_grad_enabled() or (inner is None and (not gains or self.left_alone)):
            return self._own(*args, **kwargs)
        mask = kwargs.get("attention_mask")
        if not prompt.padded and isinstance(mask, torch.Tensor) and mask.dim() == 2:
            kwargs["attention_mask"] = None  # causal attention needs no mask then, and traced code cannot look
        if inner is not None:
            kwargs |= cache_to_make(self._own, kwargs, getattr(self._module, "config", None))
        lowering = self._lowering if gains else "eager"
        output = self._compiled_for(kwargs, prompt, inner, lowering)(self._own, args, kwargs, inner)
        if inner is not None and prompt.kept:
            cache = given_cache(kwargs)
            keep_in_mind(cache_of(output) if cache is None else cache, inner, self.steps, prompt.kept)
        return output

    def _inner_of(self, prompt: Prompt, kwargs: dict[str, Any]) -> InnerPrompt | None:
        """Where the videos of this call are; None where no tokens go."""
        inner = prompt.take_inner(kwargs["inputs_embeds"])
        if inner is None:
            return None
        cache = given_cache(kwargs)
        why, cure = None, "Call in torch.inference_mode()"
        if torch.is_grad_enabled():
            why = "gradients are enabled"
        elif cache is not None and int(cache.get_seq_length()) > 0:
            why, cure = "its cache holds a prompt already", "Start without a cache"
        elif cache is not None and not grows(cache):
            why, cure = "its cache is static, as long in all layers", "Leave cache_implementation out"
        elif kwargs.get("output_attentions"):
            why, cure = "output_attentions asks for all attention over the prompt", "Leave output_attentions out"
        elif _has_layers_of(self._module, "sliding"):
            why, cure = "some of its layers see a window of the prompt only", "Take a model whose layers see all of it"
        elif _has_layers_of(self._module, "linear"):
            why = "some of its layers have linear attention, which pays no token more than another"
            cure = "Leave tokens in the language model as they are (no inner_layer)"
        elif self._why_own_code:
            why, cure = self._why_own_code, "Load it with attn_implementation='sdpa' on one device, without hooks"
        if why is None:
            self._cover_layers()
            return inner
        self._tell(f"no tokens go inside the language model: {why}", cure)
        return None

    def _tell(self, reason: str, cure: str) -> None:
        if self._fall_back is not None:
            self._fall_back(reason, cure)

    def _compiled_for(
        self, kwargs: dict[str, Any], prompt: Prompt, inner: InnerPrompt | None, lowering: str
    ) -> Callable[..., Any]:
        """The compiled code for prompts of this kind: one row or several, masked or not, its sort of cache."""
        tensors = dict(_tensors(kwargs))
        plan = () if inner is None else (inner.video_of, *inner.last, *inner.slots)
        for tensor in (*tensors.values(), *plan):
            for axis in range(min(tensor.dim(), 2) if tensor.is_floating_point() else tensor.dim()):
                torch._dynamo.maybe_mark_dynamic(tensor, axis)
        several = kwargs["inputs_embeds"].shape[0] > 1
        shapes = tuple((name, tensor.dim()) for name, tensor in tensors.items())
        inside = None if inner is None else inner.padded
        kind = (several, shapes, type(given_cache(kwargs)), inside, lowering)
        if kind not in self._compiled:
            masked = "attention_mask" in tensors or prompt.padded
            cause = f"prompts of {'several rows' if several else 'one row'}{', padded' if masked else ''}"
            backend = partial(self._compile, lowering, cause, bool(inside), counts_first_layer(given_cache(kwargs)))
            function = with_its_own_code(_call if inner is None else _call_marked)
            compiled = FirstCallAlone(torch.compile(function, backend=backend))
            self._compiled.setdefault(kind, compiled)  # another thread may have come first
        return self._compiled[kind]

    def _compile(
        self,
        lowering: str,
        cause: str,
        padded: bool,
        counted: bool,
        graph_module: GraphModule,
        example_inputs: Sequence[Any],
    ) -> Callable[..., Any]:
        mark, own_outputs, not_shorter = find_mark(graph_module), None, None
        if mark is not None:
            original = GraphModule(graph_module, copy.deepcopy(graph_module.graph))
            try:
                own_outputs = shorten(graph_module, mark, self.steps, padded, counted)
            except NotApplicable as found:
                graph_module, not_shorter = original, found
                erase_mark(graph_module, find_mark(graph_module))  # type: ignore[arg-type]
        run = _compile_prompt(lowering, self._mode, cause, graph_module, example_inputs)
        if not_shorter is not None:
            return partial(self._run_as_long, run, not_shorter)
        return run if own_outputs is None else partial(self._run_shorter, run, own_outputs)

    def _run_as_long(self, run: Callable[..., Any], found: NotApplicable, *args: Any) -> Any:
        self._tell(f"no tokens go inside the language model: {found.reason}", found.cure)
        return run(*args)

    def _run_shorter(self, run: Callable[..., Any], own_outputs: int, *args: Any) -> Any:
        outputs, prompt = run(*args), self._prompt.get()
        if prompt is not None:
            prompt.kept = outputs[own_outputs:]
        return outputs[:own_outputs]


def decoder_layers(language_model: torch.nn.Module) -> Sequence[torch.nn.Module]:
    """Its layers, as all language models of transformers hang them; [] where there are none."""
    return getattr(language_model, "layers", ())


def _has_layers_of(language_model: torch.nn.Module, attention: str) -> bool:
    """Whether the attention of some of its layers is "sliding", to the last positions alone, or "linear"."""
    kinds = getattr(getattr(language_model, "config", None), "layer_types", None)
    return any(attention in kind for kind in kinds or ())


def _fewest_positions(device: torch.device) -> int:
    """Those of a prompt that is compiled; a single one is a step of decoding."""
    return FEWEST_POSITIONS_ON_CPU if device.type == "cpu" else 2


def _tensors(kwargs: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors among the arguments; a mask may be a dict, one for each kind of attention, and DeepStack's features
    are a list, one for each layer that gets some."""
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, dict):
            yield from _tensors(value)
        elif isinstance(value, list):
            yield from _tensors({f"{name}[{place}]": each for place, each in enumerate(value)})


def _call(own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], inner: None) -> Any:
    return own(*args, **kwargs)


def _call_marked(own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], inner: InnerPrompt) -> Any:
    embeds = kwargs["inputs_embeds"]
    marked = torch.ops.earlytom.mark_videos(embeds, inner.video_of, list(inner.last), list(inner.slots))
    return own(*args, **{**spread_deepstack(embeds, kwargs), "inputs_embeds": marked})


def _compile_prompt(
    lowering: str, mode: str | None, cause: str, graph_module: GraphModule, example_inputs: Sequence[Any]
) -> Callable[..., Any]:
    compile_id = torch._guards.CompileContext.current_compile_id()
    record = GraphRecord(str(compile_id), bool(compile_id and compile_id.frame_compile_id), cause, lowering=lowering)
    start = time.perf_counter()
    lower = lower_stages if lowering == "staged" else lower_whole
    with progress("compiling the language model's pass over the prompt"):
        run = lower(graph_module, example_inputs, record, inductor_options(mode))
    record.seconds["language model"] = time.perf_counter() - start
    add_record(record, example_inputs)
    return run
