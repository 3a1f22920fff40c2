"""Make Video-LLMs compress their video tokens inside the vision encoder, as a ``torch.compile`` backend.

>>> earlytom_compile.compile(model, retain_ratio=0.1)      # in place, for generate()
>>> fast = torch.compile(model, backend="earlytom", options={"retain_ratio": 0.1})    # for forward()
"""

from typing import TYPE_CHECKING, Any

from .config import EarlyTomConfig
from .errors import (
    EarlyTomCompileError,
    EarlyTomConfigError,
    EarlyTomError,
    EarlyTomFallbackWarning,
    EarlyTomVideoWarning,
)

if TYPE_CHECKING:
    from .integrations.in_place import compile, encode_videos, restore
    from .integrations.observe import Observation, observe
    from .reporting import Report, report

__all__ = [
    "EarlyTomCompileError",
    "EarlyTomConfig",
    "EarlyTomConfigError",
    "EarlyTomError",
    "EarlyTomFallbackWarning",
    "EarlyTomVideoWarning",
    "Observation",
    "Report",
    "compile",
    "encode_videos",
    "observe",
    "report",
    "restore",
]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; options, errors and `earlytom --help` need neither.
    if name in ("compile", "encode_videos", "restore"):
        from .integrations import in_place

        return getattr(in_place, name)
    if name in ("Observation", "observe"):
        from .integrations import observe as observing

        return getattr(observing, name)
    if name in ("Report", "report"):
        from . import reporting

        return getattr(reporting, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
