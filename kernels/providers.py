"""Who computes an operator: the provider table.

An operator is declared once; its native PyTorch body is its meaning. A provider computes the same thing faster for
the inputs it says it supports::

    frame_similarity(cuda bfloat16 [32, 729, 1152])   ->   triton
    frame_similarity(cuda float64 ...)                ->   native     # not supported
    frame_similarity(cpu ...)                         ->   native     # always

Providers stay behind the operator's own schema, so that graphs hold one node for one meaning, and whatever reads a
graph (Inductor, a report, a test) need not know them. The Triton code lies in files of its own, imported when an
operator first meets a CUDA tensor: neither triton nor a driver is needed to import this package.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

NATIVE = "native"


@dataclass(frozen=True)
class Provider:
    """An implementation of one operator on CUDA tensors."""

    name: str
    module: str  # below this package; holds a function ``run`` with the operator's signature
    supports: Callable[..., bool]  # of the operator's arguments, fake tensors included

    def takes(self, *args: Any, **kwargs: Any) -> bool:
        """Whether it can compute these inputs here: Triton is not on every machine that has CUDA."""
        return find_spec("triton") is not None and self.supports(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = importlib.import_module(self.module, __package__).run
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        with torch.cuda.device_of(first):  # Triton launches on the current device, whatever its arguments say
            return run(*args, **kwargs)


_TABLE: dict[str, Provider] = {}


def provide(op: CustomOpDef, provider: Provider) -> None:
    """Register ``provider`` for CUDA inputs of ``op``; inputs it does not support take the native body."""
    name = op._qualname.split("::")[1]
    native = op._init_fn
    _TABLE[name] = provider

    def dispatch(*args: Any, **kwargs: Any) -> Any:
        return (provider if provider.takes(*args, **kwargs) else native)(*args, **kwargs)

    op.register_kernel("cuda")(dispatch)


def provider_of(name: str, device_type: str, *args: Any, **kwargs: Any) -> str:
    """Name of the provider that computes operator ``name`` for these arguments, real or fake, on ``device_type``."""
    provider = _TABLE.get(name)
    if device_type != "cuda" or provider is None or not provider.takes(*args, **kwargs):
        return NATIVE
    return provider.name
