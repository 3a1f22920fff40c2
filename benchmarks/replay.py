"""What the operators of ours cost in a call of a model: noted while it runs, then called again by themselves.

    calls = record(first_token)     # one call of the model
    replay(calls)                   # frame_similarity, plan_merge, N, merge_frames, ..., select_tokens: nothing else

A replay includes the host's wait for N behind each plan. Nothing of the model runs between the calls that could hide
their launches, which therefore count in full.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from earlytom_compile.kernels import all_ops  # noqa: F401  (registers torch.ops.earlytom)

_PLAN = torch.ops.earlytom.plan_merge.default


@dataclass(frozen=True)
class Call:
    """A call of an operator of ours, with copies of its tensors."""

    operator: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """Such as ``"merge_frames"``."""
        return str(self.operator._schema.name).removeprefix("earlytom::")


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Dynamo skips what runs inside other modes, and a skipped model is not compressed."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "earlytom":
            copied_args, copied_kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
            self.calls.append(Call(func, copied_args, copied_kwargs))
        return func(*args, **kwargs)


def record(call: Callable[[], object]) -> list[Call]:
    """Every operator of ours that ``call`` calls, in order; call it once before, so that nothing is compiled here."""
    with _Recorder() as recorder:
        call()
    return recorder.calls


def replay(calls: Sequence[Call]) -> None:
    """The same calls again; the host waits for N as in the model."""
    for call in calls:
        result = call.operator(*call.args, **call.kwargs)
        if call.operator is _PLAN:
            result[2].sum().item()
