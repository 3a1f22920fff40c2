"""Which methods there are.

    method_named("visionzip").keep(tokens, budget)

Methods of other packages come from the entry-point group ``earlytom_compile.methods``, or from ``register_method``:

    [project.entry-points."earlytom_compile.methods"]
    my_method = "my_package.my_method:METHOD"        # by the name that the method has
"""

import importlib
import importlib.metadata
from importlib.metadata import EntryPoint

from ..errors import EarlyTomConfigError
from .base import Method

GROUP = "earlytom_compile.methods"
EARLYTOM = "earlytom"
"""The method that this package is named after; ``variant`` says which form of it."""
BUILT_IN: tuple[str, ...] = ("visionzip", "fastv", "pyramiddrop", "dycoke", "prunevid", "fastvid", "holitom")
"""Names of ours, each in a file of that name here, which is imported when it is asked for."""
_registered: dict[str, Method] = {}
_of_packages: dict[str, Method] = {}  # what has been loaded, since every call of a compressed model asks


def register_method(method: Method) -> Method:
    """Make ``method`` known in this process, and return it. Raises :class:`EarlyTomConfigError` for a name that another
    method has."""
    if method.name in method_names() and _registered.get(method.name) != method:
        raise EarlyTomConfigError(f"a method named {method.name!r} exists already: give yours another name.")
    _registered[method.name] = method
    return method


def method_names() -> list[str]:
    """All names that ``method=`` may have; nothing is imported for them."""
    return list(dict.fromkeys((EARLYTOM, *BUILT_IN, *_registered, *(entry.name for entry in _entry_points()))))


def method_named(name: str) -> Method | None:
    """The method of that name; None for ``"earlytom"``, which has passes of its own. Raises
    :class:`EarlyTomConfigError` for a name that no method has, and for one whose package cannot be loaded."""
    if name == EARLYTOM:
        return None
    if name in BUILT_IN:
        method: Method = importlib.import_module(f".{name}", __package__).METHOD
        return method
    known = _registered.get(name) or _of_packages.get(name)
    if known is not None:
        return known
    for entry in _entry_points():
        if entry.name == name:
            return _of_packages.setdefault(name, _loaded(entry))
    raise EarlyTomConfigError(f"method={name!r}: must be one of {', '.join(map(repr, method_names()))}.")


def _entry_points() -> tuple[EntryPoint, ...]:
    return tuple(importlib.metadata.entry_points(group=GROUP))


def _loaded(entry: EntryPoint) -> Method:
    try:
        method = entry.load()
    except (Exception, SystemExit) as error:  # whatever the import of another package meets
        raise EarlyTomConfigError(
            f"method={entry.name!r} of another package cannot be loaded: {type(error).__name__}: {error}. Mend or "
            "uninstall that package."
        ) from error
    if not isinstance(method, Method) or method.name != entry.name:
        raise EarlyTomConfigError(
            f"method={entry.name!r}: {entry.value} is no earlytom_compile.methods.base.Method of that name."
        )
    return method
