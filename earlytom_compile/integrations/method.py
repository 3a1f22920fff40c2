"""What stands in the place of a model's ``generate`` and ``forward``."""

import functools
from collections.abc import Callable
from typing import Any


class Method:
    """Stands in for the method ``name`` of the model, with its signature; copies along with the model."""

    def __init__(self, handle: Any, name: str, own: Callable[..., Any]) -> None:
        functools.update_wrapper(self, own)
        self._handle = handle
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        handle = self._handle
        if handle.model.__dict__.get("_earlytom") is not handle:  # restored, and somebody had wrapped this method
            return handle.own[self._name](*args, **kwargs)
        return getattr(handle, handle.methods[self._name])(*args, **kwargs)
