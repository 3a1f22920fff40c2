"""The language model's pass over the prompt, compiled once for prompts of every length.

    prefill = CompiledPrefill(model.model.language_model)   # its forward() is replaced ...
    with prefill.active(attention_mask):                    # ... and compiles prompts here, in this thread only
        model.generate(...)
    prefill.remove()

One compilation serves all decoder layers (passes/split_stages.py), unless one graph of everything is asked for.
Decoding is left to transformers, which compiles it itself for static caches; its trace of the model goes straight
through to the model's own code.
"""

import copy
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule

from ..reporting import GraphRecord, add_record, progress
from ..stages import inductor_options, lower_stages, lower_whole
from .attention_choice import COMPILES, attention_of
from .caches import given_cache
from .placement import own_code_because
from .tracing import FirstCallAlone, with_its_own_code

FEWEST_POSITIONS_ON_CPU = 128
"""A CPU gains a few milliseconds from compiled code in a shorter prompt, and has nothing to launch; compiling takes ten
seconds and more."""


class CompiledPrefill:
    """Stands in for the ``forward`` of a language model; ``lowering`` is ``"staged"`` or ``"whole"``, ``mode``
    Inductor's, ``without`` are modules in it that prompts do not go through, such as a vision tower. Prompts that are
    too short to gain from it run as they are."""

    def __init__(
        self,
        language_model: torch.nn.Module,
        lowering: str = "staged",
        mode: str | None = None,
        without: Sequence[torch.nn.Module] = (),
    ) -> None:
        self._module = language_model
        self._without = without
        self._before = language_model.__dict__.get("forward")
        self._own = language_model.forward
        self._lowering = lowering
        self._mode = mode
        self._reset()
        functools.update_wrapper(self, self._own)
        self.install()

    def _reset(self) -> None:
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._padded: ContextVar[bool | None] = ContextVar("earlytom_prefill", default=None)  # None = not active

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompiledPrefill":
        # A copy of the model compiles for itself: compiled code belongs to the weights it was traced with.
        twin = memo[id(self)] = type(self).__new__(type(self))
        state = {name: value for name, value in self.__dict__.items() if name not in ("_compiled", "_padded")}
        twin.__dict__.update(copy.deepcopy(state, memo))
        twin._reset()
        return twin

    def install(self) -> None:
        """Put this in the place of the language model's ``forward``, where it is from the start."""
        self._module.__dict__["forward"] = self

    def remove(self) -> None:
        """Put the language model's own ``forward`` back, unless somebody has replaced ours since."""
        if self._module.__dict__.get("forward") is self:
            del self._module.__dict__["forward"]
            if self._before is not None:
                self._module.__dict__["forward"] = self._before

    @contextmanager
    def active(self, attention_mask: torch.Tensor | None) -> Iterator[None]:
        """Compile prompts inside this context; other threads and other calls run the model's own code.

        ``attention_mask`` [R, S] is that of the prompts to come. It is read here, on the host or where the device
        has nothing to finish, since their own mask comes behind the encoder; None stands for one not known.
        """
        token = self._padded.set(attention_mask is None or not bool(attention_mask.all()))
        try:
            yield
        finally:
            self._padded.reset(token)

    @property
    def left_alone(self) -> str | None:
        """Why prompts run as they are, whatever their length; None if they are compiled."""
        attention = attention_of(self._module)
        fine = attention is None or attention in COMPILES
        reason = own_code_because(self._module, self._without) if fine else f"its attention is {attention}"
        return f"the language model's pass over the prompt is not compiled: {reason}" if reason else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() or torch.is_grad_enabled():
            return self._own(*args, **kwargs)
        padded, embeds = self._padded.get(), kwargs.get("inputs_embeds")
        if padded is None or embeds is None or embeds.shape[1] < _fewest_positions(embeds.device) or self.left_alone:
            return self._own(*args, **kwargs)
        mask = kwargs.get("attention_mask")
        if not padded and isinstance(mask, torch.Tensor) and mask.dim() == 2:
            kwargs["attention_mask"] = None  # causal attention needs no mask then, and traced code cannot look
        return self._compiled_for(kwargs)(self._own, args, kwargs)

    def _compiled_for(self, kwargs: dict[str, Any]) -> Callable[..., Any]:
        """The compiled code for prompts of this kind: one row or several, masked or not, its sort of cache."""
        tensors = dict(_tensors(kwargs))
        for tensor in tensors.values():
            for axis in range(min(tensor.dim(), 2) if tensor.is_floating_point() else tensor.dim()):
                torch._dynamo.maybe_mark_dynamic(tensor, axis)
        several = kwargs["inputs_embeds"].shape[0] > 1
        shapes = tuple((name, tensor.dim()) for name, tensor in tensors.items())
        kind = (several, shapes, type(given_cache(kwargs)))
        if kind not in self._compiled:
            masked = "attention_mask" in tensors or bool(self._padded.get())
            cause = f"prompts of {'several rows' if several else 'one row'}{', padded' if masked else ''}"
            backend = partial(_compile_prompt, self._lowering, self._mode, cause)
            compiled = FirstCallAlone(torch.compile(with_its_own_code(_call), backend=backend))
            self._compiled.setdefault(kind, compiled)  # another thread may have come first
        return self._compiled[kind]


def _fewest_positions(device: torch.device) -> int:
    """Those of a prompt that is compiled; a single one is a step of decoding."""
    return FEWEST_POSITIONS_ON_CPU if device.type == "cpu" else 2


def _tensors(kwargs: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors among the arguments; a mask may be a dict, one for each kind of attention."""
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, dict):
            yield from _tensors(value)


def _call(own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return own(*args, **kwargs)


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
