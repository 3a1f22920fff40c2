"""Which methods there are.

    method_named("visionzip").keep(tokens, budget)

Methods of other packages come from the entry-point group ``earlytom_compile.methods``, or from ``register_method``:

    [project.entry-points."earlytom_compile.methods"]
    my_method = "my_package.my_method:METHOD"
"""

import importlib.metadata
import warnings

from ..errors import EarlyTomConfigError, EarlyTomFallbackWarning
from .base import Method

GROUP = "earlytom_compile.methods"
EARLYTOM = "earlytom"
"""The method that this package is named after; ``variant`` says which form of it."""
BUILT_IN: tuple[Method, ...] = ()
_registered: dict[str, Method] = {}


def register_method(method: Method) -> Method:
    """Make ``method`` known in this process, and return it. Raises :class:`EarlyTomConfigError` for a name that another
    method has."""
    if method.name in method_names() and _registered.get(method.name) != method:
        raise EarlyTomConfigError(f"a method named {method.name!r} exists already: give yours another name.")
    _registered[method.name] = method
    return method


def method_names() -> list[str]:
    """All names that ``method=`` may have."""
    return [EARLYTOM, *_all_methods()]


def method_named(name: str) -> Method | None:
    """The method of that name; None for ``"earlytom"``, which has passes of its own. Raises KeyError for a name that no
    method has."""
    return None if name == EARLYTOM else _all_methods()[name]


def _all_methods() -> dict[str, Method]:
    built_in = {method.name: method for method in BUILT_IN}
    return {**_of_other_packages(), **_registered, **built_in}


def _of_other_packages() -> dict[str, Method]:
    """One that cannot be loaded is left out, with a warning."""
    found = {}
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            method = entry.load()
            if not isinstance(method, Method):
                raise TypeError(f"{entry.value} is no earlytom_compile.methods.base.Method")
        except (Exception, SystemExit) as error:  # whatever the import of another package meets
            warnings.warn(
                f"the method {entry.name!r} of another package cannot be loaded, and is not known: "
                f"{type(error).__name__}: {error}. Mend or uninstall that package.",
                EarlyTomFallbackWarning,
                stacklevel=2,
            )
        else:
            found[method.name] = method
    return found
