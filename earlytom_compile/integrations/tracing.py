"""Make models of transformers trace to one graph in a fresh process, and compile what is traced in peace.

Three places in transformers break the graph, for reasons that have nothing to do with a model:

    maybe_install_capturing_hooks(model)      # installs forward hooks under a lock, once
    torch_compilable_check(n_tokens == ...)   # reads a tensor's value on the host
    signature.bind(self, *args, **kwargs)     # reads a mappingproxy, which Dynamo refuses (transformers 5.23)

and one in PEFT:

    type(weight).__module__.startswith("torchao.")   # asked by each layer with DoRA

Each is replaced by one that behaves as before in eager mode. While Dynamo traces, the first installs the hooks as
a constant-folded side effect; the second does nothing, since the backend compares placeholders with features
itself, on every call, before any compressed graph runs; the third reads a plain dict; the fourth asks only of
weights that are more than a parameter.
"""

import ctypes
import importlib
import inspect
import itertools
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch

log = logging.getLogger(__name__)

_CHECK = "torch_compilable_check"
_INSTALL = "maybe_install_capturing_hooks"
_CAPTURING = "transformers.utils.output_capturing"
_DORA = "peft.tuners.lora.dora"
_copies = itertools.count()


def with_its_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy that Dynamo takes for another function: it counts recompiles by code object, and what it has learned
    about sizes it keeps by name."""
    assert isinstance(function, FunctionType)
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_copies)}")
    return FunctionType(code, function.__globals__, code.co_name)


def mark_static(tensor: torch.Tensor, *axes: int) -> None:
    """These axes are of a fixed size to Dynamo. torch's function of this name does something else, and fails, while any
    other thread of the process compiles."""
    tensor._dynamo_static_indices = set(axes)  # type: ignore[attr-defined]
    tensor._has_dynamo_dim_marking = True  # type: ignore[attr-defined]


class FirstCallAlone:
    """A compiled function whose first call goes on alone: threads that meet there would each compile it."""

    def __init__(self, compiled: Callable[..., Any]) -> None:
        self._compiled = compiled
        self._lock = threading.RLock()
        self._done = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._done:
            with self._lock:
                result = self._compiled(*args, **kwargs)
                self._done = True
            return result
        return self._compiled(*args, **kwargs)


def prepare_transformers(modeling: str, *classes: str) -> None:
    """Prepare a modeling module of transformers, and the ``classes`` in it that are traced; may be called again.

    Must run before Dynamo first traces a model, and imports the module: one imported later would come unprepared.
    """
    try:
        module = importlib.import_module(modeling)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not fit its torch
        log.warning("%s cannot be imported, and its models will not trace: %s", modeling, error)
        return
    _replace(module, _CHECK, _check_unless_tracing)
    for name in classes:
        for cell in _signature_cells(getattr(module, name)):
            if type(cell.cell_contents) is inspect.Signature:
                cell.cell_contents = _PlainSignature(cell.cell_contents)
    if _CAPTURING in sys.modules:
        _replace(sys.modules[_CAPTURING], _INSTALL, _install_while_tracing)


def prepare_deepstack(modeling: str, text_model: str) -> None:
    """Let Dynamo trace how ``text_model`` of a modeling module of transformers adds features to the positions of
    pictures, which it picks by a mask; may be called again."""
    module = sys.modules.get(modeling)
    kind = getattr(module, text_model, None)
    if kind is not None and not hasattr(kind._deepstack_process, "earlytom_original"):
        own = kind._deepstack_process

        def _deepstack_process(self: Any, hidden: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            if not torch.compiler.is_dynamo_compiling():
                return own(self, hidden, mask, rows)
            mask = mask.to(hidden.device)
            rows = rows if rows.dim() == 3 else _spread(hidden, mask, rows)
            return torch.where(mask.unsqueeze(-1), hidden + rows, hidden)

        _deepstack_process.earlytom_original = own  # type: ignore[attr-defined]
        kind._deepstack_process = _deepstack_process


def spread_deepstack(embeds: torch.Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """``kwargs`` of a language model with DeepStack's features, [N, C] each, at their places in a prompt ``embeds``
    [R, S, C], where a graph may take some of them. While it is traced; the model's own code does not know them so."""
    rows, mask = kwargs.get("deepstack_visual_embeds"), kwargs.get("visual_pos_masks")
    if rows is None or mask is None:
        return kwargs
    mask = mask.to(embeds.device)
    return {**kwargs, "deepstack_visual_embeds": [_spread(embeds, mask, each) for each in rows]}


def _spread(hidden: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[R, S, C], like ``hidden``: ``rows`` [N, C] in turn where ``mask`` [R, S] is set, 0 elsewhere."""
    return torch.zeros_like(hidden).masked_scatter(mask.unsqueeze(-1), rows.to(hidden.device, hidden.dtype))


def prepare_peft() -> None:
    """Prepare PEFT, where somebody has imported it; may be called again."""
    if _DORA in sys.modules:
        _replace(sys.modules[_DORA], "dequantize_module_weight", _plain_weight_while_tracing)


def _replace(module: ModuleType, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(module, name, None)
    if original is not None and not hasattr(original, "earlytom_original"):
        replacement = make(original)
        replacement.earlytom_original = original  # type: ignore[attr-defined]
        setattr(module, name, replacement)


def _check_unless_tracing(original: Callable[..., Any]) -> Callable[..., Any]:
    def torch_compilable_check(cond: Any, msg: Any, error_type: type[Exception] = ValueError) -> None:
        if torch.compiler.is_dynamo_compiling():
            return
        original(cond, msg, error_type)

    return torch_compilable_check


def _install_while_tracing(original: Callable[..., Any]) -> Callable[..., Any]:
    def maybe_install_capturing_hooks(model: Any) -> None:
        if torch.compiler.is_dynamo_compiling():
            _install_hooks_now(id(model))
            return
        original(model)

    return maybe_install_capturing_hooks


def _plain_weight_while_tracing(original: Callable[..., Any]) -> Callable[..., Any]:
    def dequantize_module_weight(module: Any) -> Any:
        packed = hasattr(module, "W_q")  # HQQ's
        if torch.compiler.is_dynamo_compiling() and not packed and type(module.weight) is torch.nn.Parameter:
            return module.weight
        return original(module)

    return dequantize_module_weight


class _PlainSignature(inspect.Signature):
    """A signature whose parameters are a plain dict instead of a mappingproxy."""

    def __init__(self, signature: inspect.Signature) -> None:
        super().__init__(list(signature.parameters.values()), return_annotation=signature.return_annotation)
        self._plain = dict(signature.parameters)

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:  # type: ignore[override]
        return self._plain


def _signature_cells(model_class: type) -> Iterator[Any]:
    """The closure cells called ``signature`` in the decorators of the class' methods."""
    for function in vars(model_class).values():
        while inspect.isfunction(function):
            names = function.__code__.co_freevars
            if "signature" in names and function.__closure__ is not None:
                yield function.__closure__[names.index("signature")]
            function = getattr(function, "__wrapped__", None)


@torch._dynamo.assume_constant_result
def _install_hooks_now(model_id: int) -> bool:
    """Install the hooks of the model at this address, outside the trace; returns True.

    Takes the address because Dynamo on torch 2.11 cannot fold a call that gets a module. It must be this very
    model: hooks installed on a model above or below it would be installed once more by transformers itself.
    """
    model = ctypes.cast(model_id, ctypes.py_object).value  # alive: it is being traced
    getattr(sys.modules[_CAPTURING], _INSTALL).earlytom_original(model)
    return True
