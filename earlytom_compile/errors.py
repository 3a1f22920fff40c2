"""What can go wrong, by name: one base class, so that ``except EarlyTomError`` catches everything of ours.

>>> torch.compile(model, backend="earlytom", options={"retain_ratio": 2})(**inputs)
EarlyTomConfigError: retain_ratio=2: must be in (0, 1] ...
"""


class EarlyTomError(Exception):
    """Base of every error this package raises on purpose."""


class EarlyTomConfigError(EarlyTomError, ValueError):
    """An option or an input has a value that cannot mean anything; the message names what is allowed."""


class EarlyTomCompileError(EarlyTomError, RuntimeError):
    """A graph could not be compressed and ``strict=True`` forbids running it uncompressed."""


class EarlyTomFallbackWarning(UserWarning):
    """A call runs without compression, or with less than was asked for; the message names the reason and the cure."""


class EarlyTomVideoWarning(UserWarning):
    """A video holds fewer frames than it says; the message has both numbers and what was done."""
