"""Other ways to fewer video tokens, as their papers describe them: ``compile(model, method="visionzip")``.

    from earlytom_compile.methods import FrameTokens, Kept, Method, register_method

One file a method; ``base.py`` says what a method is, ``registry.py`` which there are, docs/adding-a-method.md how to
write one.
"""

from .base import FrameTokens, Kept, Method, Sizes, Step
from .registry import method_named, method_names, register_method

__all__ = ["FrameTokens", "Kept", "Method", "Sizes", "Step", "method_named", "method_names", "register_method"]
