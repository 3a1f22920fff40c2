"""Make Video-LLMs compress their video tokens inside the vision encoder, as a ``torch.compile`` backend.

>>> earlytom_compile.compile(model, retain_ratio=0.1)      # in place, for generate()
>>> fast = torch.compile(model, backend="earlytom", options={"retain_ratio": 0.1})    # for forward()
"""

import importlib
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
    from .integrations.export import export
    from .integrations.in_place import compile, encode_videos, restore
    from .integrations.observe import Observation, observe
    from .integrations.tower import MergedFrames, compile_tower
    from .methods.registry import register_method
    from .passes.attention_spellings import register_attention
    from .passes.opaque_operators import register_position_wise
    from .reporting import Report, report

__all__ = [
    "EarlyTomCompileError",
    "EarlyTomConfig",
    "EarlyTomConfigError",
    "EarlyTomError",
    "EarlyTomFallbackWarning",
    "EarlyTomVideoWarning",
    "MergedFrames",
    "Observation",
    "Report",
    "compile",
    "compile_tower",
    "encode_videos",
    "export",
    "observe",
    "register_attention",
    "register_method",
    "register_position_wise",
    "report",
    "restore",
]


_PLACES = {
    "MergedFrames": ".integrations.tower",
    "Observation": ".integrations.observe",
    "Report": ".reporting",
    "compile": ".integrations.in_place",
    "compile_tower": ".integrations.tower",
    "encode_videos": ".integrations.in_place",
    "export": ".integrations.export",
    "observe": ".integrations.observe",
    "register_attention": ".passes.attention_spellings",
    "register_method": ".methods.registry",
    "register_position_wise": ".passes.opaque_operators",
    "report": ".reporting",
    "restore": ".integrations.in_place",
}


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; options, errors and `earlytom --help` need neither.
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
