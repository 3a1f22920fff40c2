"""The attention of a vision tower while its video path is traced.

Most people load a model with ``flash_attention_2``, which breaks every graph; with ``flex_attention``, a kernel from
the hub or an attention of their own, the encoder is not found. Every place in transformers that depends on the choice
reads ``config._attn_implementation``, masks among them. So once :func:`prepare` has run, that property answers
``"sdpa"`` to who asks in the call of a compiled video path, Dynamo above all (own_trace.py). Nothing is switched
back and forth: images, the language model, other threads and other users of ``torch.compile`` see what the user has
chosen.
"""

import sys
from typing import Any

from .own_trace import is_video_path

COMPILES = ("sdpa", "eager")
"""What Dynamo traces to one graph for every length, and what our passes know."""


def attention_of(module: Any) -> str | None:
    """The attention that a module of transformers is set to, None if it does not say."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def prepare() -> None:
    """Make transformers' configurations ask which attention to trace; does nothing the second time, nor where there is
    no transformers."""
    configurations = sys.modules.get("transformers.configuration_utils")
    if configurations is None:
        return
    kind = configurations.PretrainedConfig
    chosen = kind.__dict__.get("_attn_implementation")
    if not isinstance(chosen, property) or chosen.fget is None or hasattr(chosen.fget, "earlytom_original"):
        return
    original = chosen.fget

    def _attn_implementation(self: Any) -> Any:
        name = original(self)
        if name is None or name in COMPILES:
            return name
        # Also in eager code: torch 2.11 does not trace into a configuration, and asks it again for every guard.
        return "sdpa" if is_video_path(f"with sdpa in place of {name}") else name

    _attn_implementation.earlytom_original = original  # type: ignore[attr-defined]
    kind._attn_implementation = property(_attn_implementation, chosen.fset, chosen.fdel, chosen.__doc__)
