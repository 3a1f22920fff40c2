"""``torch.compile(model, backend="earlytom").generate(...)`` runs no compiled code, and says so.

What ``torch.compile`` returns takes attributes it does not have from the original model, ``generate`` among them, with
every backend. Nothing of ours would ever be called. So what has our backend gets a ``generate`` that warns of a video
first; everything else keeps its own.
"""

import functools
from typing import Any

from torch._dynamo.eval_frame import OptimizedModule

from ..config import EarlyTomConfig
from ..reporting import GraphRecord, backend_options
from ..stages import fall_back

_REASON = "torch.compile(model).generate is the original model's generate, which no backend compiles"
_CURE = "Use earlytom_compile.compile(model, ...), which has the same options"


def warn_of_generate() -> None:
    """Watch ``generate`` of compiled models; does nothing the second time."""
    if "generate" not in OptimizedModule.__dict__:
        OptimizedModule.generate = property(_generate)  # type: ignore[attr-defined]


def _generate(compiled: Any) -> Any:
    original = compiled._orig_mod
    own, options = original.generate, backend_options(compiled)
    if options is None or "_earlytom" in original.__dict__:
        return own

    @functools.wraps(own)
    def generate(*args: Any, **kwargs: Any) -> Any:
        if any(name.startswith("pixel_values_videos") and value is not None for name, value in kwargs.items()):
            fall_back(_REASON, _CURE, EarlyTomConfig.from_options(options), GraphRecord("", False))
        return own(*args, **kwargs)

    return generate
