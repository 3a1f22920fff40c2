"""The language model's pass over the prompt, compiled once for prompts of every length.

    with prefill.installed():          # model.language_model.forward -> compiled for a whole prompt,
        model.generate(...)            #                                 the model's own for one token at a time

One compilation serves all decoder layers (passes/split_stages.py). Decoding is left to transformers, which compiles
it itself for static caches; its trace of the model goes straight through to the model's own code.
"""

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import GraphModule

from ..stages import lower_stages


class CompiledPrefill:
    """Stands in for the ``forward`` of a language model while a prompt is processed."""

    def __init__(self, language_model: torch.nn.Module) -> None:
        self._module = language_model
        self._own = language_model.forward
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._forward = self._make_forward()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Compile prompts inside this context."""
        before = self._module.__dict__.get("forward")
        self.install()
        try:
            yield
        finally:
            if before is None:
                del self._module.__dict__["forward"]
            else:
                self._module.__dict__["forward"] = before

    def install(self) -> None:
        """Compile prompts from now on."""
        self._module.__dict__["forward"] = self._forward

    def _make_forward(self) -> Callable[..., Any]:
        own = self._own

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            embeds = kwargs.get("inputs_embeds")
            if torch.compiler.is_compiling() or torch.is_grad_enabled() or embeds is None or embeds.shape[1] < 2:
                return own(*args, **kwargs)
            mask = kwargs.get("attention_mask")
            if isinstance(mask, torch.Tensor) and mask.dim() == 2 and bool(mask.all()):
                kwargs["attention_mask"] = None  # causal attention needs no mask then, and traced code cannot look
            return self._compiled_for(kwargs)(own, args, kwargs)

        return forward

    def _compiled_for(self, kwargs: dict[str, Any]) -> Callable[..., Any]:
        """The compiled code for prompts of this kind: one row or several, masked or not, its sort of cache."""
        tensors = dict(_tensors(kwargs))
        for tensor in tensors.values():
            for axis in range(min(tensor.dim(), 2) if tensor.is_floating_point() else tensor.dim()):
                torch._dynamo.maybe_mark_dynamic(tensor, axis)
        several = kwargs["inputs_embeds"].shape[0] > 1
        shapes = tuple((name, tensor.dim()) for name, tensor in tensors.items())
        kind = (several, shapes, type(kwargs.get("past_key_values")))
        if kind not in self._compiled:
            # Dynamo's recompile limit counts per code object; every kind gets one of its own.
            code = _call.__code__.replace(co_name=f"prefill_{id(self)}_{len(self._compiled)}")
            function = types.FunctionType(code, globals(), code.co_name)
            self._compiled[kind] = torch.compile(function, backend=_compile_layers)
        return self._compiled[kind]


def _tensors(kwargs: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors among the arguments; a mask may be a dict, one for each kind of attention."""
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, dict):
            yield from _tensors(value)


def _call(own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return own(*args, **kwargs)


def _compile_layers(graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    return lower_stages(graph_module).run
