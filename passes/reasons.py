"""Why a graph cannot be rewritten, said once for all passes.

A pass that cannot do its job completely changes nothing and raises; the backend turns that into a warning
(or, with ``strict=True``, into an error)::

    raise NotApplicable("torch.roll (roll_3) shifts the frame axis", "Remove the shift, or ...")
    # EarlyTomFallbackWarning: torch.roll (roll_3) shifts the frame axis. Remove the shift, or ...
"""

from __future__ import annotations

import torch
from torch.fx import Node

from earlytom_compile.passes.patterns import module_path


class NotApplicable(Exception):
    """A pass leaves the graph as it was.

    Args:
        reason: what stands in the way, with the names of the nodes and modules it is about.
        cure: what the reader can do about it.
    """

    def __init__(self, reason: str, cure: str) -> None:
        self.reason = reason.strip().rstrip(".")
        self.cure = cure.strip().rstrip(".")
        super().__init__(f"{self.reason}. {self.cure}.")


class NothingToCompress(NotApplicable):
    """A graph without anything that could be a video, such as a step of decoding: no loss, and no news."""


class NotReusable(NotApplicable):
    """Patches of this encoder cannot be reused, but its frames may merge."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, "Merge frames instead: reuse=False")


def describe(node: Node) -> str:
    """Names a node for a reader: ``torch.nn.functional.softmax (weights_3) in model.layers.3.self_attn``."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    code = [line for line in lines if line.strip("^~ ")]  # Python 3.11 underlines what it means
    place = module_path(node) or (code[-1] if code else "")
    return f"{_target_name(node)} ({node.name})" + (f" in {place}" if place else "")


def _target_name(node: Node) -> str:
    target = node.target
    if isinstance(target, str):
        return {"call_method": f"Tensor.{target}", "placeholder": "graph input"}.get(node.op, target)
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return str(target._qualified_op_name)
    module = (getattr(target, "__module__", None) or "").lstrip("_")
    name = getattr(target, "__name__", str(target))
    return f"{module}.{name}" if module else name
