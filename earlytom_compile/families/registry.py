"""Which family a model belongs to, by the names of its classes: nothing is imported to find out.

    family_of(model).rows(model, pixels)

Families of other packages come from the entry-point group ``earlytom_compile.families``, and are loaded when a model is
none of ours:

    [project.entry-points."earlytom_compile.families"]
    my_model = "my_package.earlytom:MyModel"         # a subclass of Family
"""

import difflib
import importlib.metadata
import warnings
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..errors import EarlyTomConfigError, EarlyTomFallbackWarning
from ..integrations.tracing import prepare_peft
from .base import Family
from .llava import Llava
from .llava_next_video import LlavaNextVideo
from .llava_onevision import LlavaOnevision
from .qwen_vl import Qwen2_5_VL, Qwen3_5, Qwen3_VL
from .video_llava import VideoLlava

GROUP = "earlytom_compile.families"
BUILT_IN: tuple[Family, ...] = (
    LlavaOnevision(),
    LlavaNextVideo(),
    VideoLlava(),
    Llava(),
    Qwen2_5_VL(),
    Qwen3_VL(),
    Qwen3_5(),
)


def family_of(model: Any) -> Family:
    """The family of ``model``; that of its own class goes before that of a class it is derived from, and ours before
    one of another package. Raises :class:`EarlyTomConfigError` for a model of no family."""
    found = _of_class(type(model), BUILT_IN, own_class=True)
    if not found:
        families = all_families()
        found = _of_class(type(model), families)
        if not found:
            raise EarlyTomConfigError(_unknown(type(model), families) + _hint_for_wrapper(model, families))
        _warn_of_several(type(model), found)
    return found[0]


def has_family(modules: Iterable[nn.Module]) -> bool:
    """Whether one of ``modules`` is a model of a known family."""
    families = all_families()
    return any(_of_class(kind, families) for kind in {type(module) for module in modules})


def all_families() -> list[Family]:
    """Ours, then those of other packages. One that cannot be loaded is left out, with a warning."""
    return [*BUILT_IN, *_of_other_packages()]


def family_of_checkpoint(checkpoint: str, model_type: Any) -> Family:
    """The family whose models are saved as ``model_type``; raises :class:`EarlyTomConfigError` where there is none.
    ``checkpoint`` is what the user called it."""
    known = {family.model_type: family for family in reversed(all_families()) if family.model_type is not None}
    if model_type not in known:
        names = " or ".join(f"{name!r}" for name in known)
        raise EarlyTomConfigError(
            f"{checkpoint!r} is a checkpoint of the family {model_type!r}: only {names} is supported, such as "
            f"{next(iter(known.values())).checkpoint}."
        )
    return known[model_type]


def make_traceable() -> None:
    """Prepare what we know of for Dynamo, which must come before it first traces a model: what is installed, and new
    enough. Families of other packages are prepared by ``compile()``."""
    for family in BUILT_IN:
        try:
            family.require_versions()
        except EarlyTomConfigError:
            continue  # said by compile(), to those who have such a model
        family.prepare()
    prepare_peft()


def _of_class(kind: type, families: Iterable[Family], *, own_class: bool = False) -> list[Family]:
    """All that name the same class, the first that any names; [] if none does."""
    for each in kind.__mro__[:1] if own_class else kind.__mro__:
        name = f"{each.__module__}.{each.__qualname__}"
        if found := [family for family in families if any(fnmatchcase(name, known) for known in family.classes)]:
            return found
    return []


def _warn_of_several(kind: type, found: list[Family]) -> None:
    first, *others = found
    if others and first not in BUILT_IN:
        names = " and ".join(f"{family.name} ({type(family).__module__})" for family in found)
        warnings.warn(
            f"{kind.__name__} is claimed by several model families, {names}: the first is used. Uninstall the package "
            "of the others.",
            EarlyTomFallbackWarning,
            stacklevel=3,
        )


def _of_other_packages() -> Iterator[Family]:
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            if entry.pattern.match(entry.value) is None:
                raise ValueError(f"{entry.value!r} is no entry point: must be 'package.module:Class'")
            made = entry.load()
            family = made() if isinstance(made, type) else made
            if not isinstance(family, Family):
                raise TypeError(f"{entry.value} is no subclass of earlytom_compile.families.base.Family")
            if not all(getattr(family, name, None) for name in ("name", "classes")):
                raise TypeError(f"{entry.value} does not say its name and classes")
            if not isinstance(family.classes, tuple) or not all(isinstance(each, str) for each in family.classes):
                raise TypeError(
                    f"classes={family.classes!r} of {entry.value}: must be a tuple of str, ('module.Class',)"
                )
        except (Exception, SystemExit) as error:  # whatever the import of another package meets
            package = entry.dist.name if entry.dist is not None else "unknown"
            warnings.warn(
                f"the model family {entry.name!r} of the package {package!r} cannot be loaded, and its models are not "
                f"known: {type(error).__name__}: {error}. Mend or uninstall that package.",
                EarlyTomFallbackWarning,
                stacklevel=2,
            )
        else:
            yield family


def _hint_for_wrapper(given: Any, families: Iterable[Family]) -> str:
    """What to do where a model comes inside another module; nothing where it does not."""
    for name in ("module", "_orig_mod"):  # DataParallel and its like; torch.compile
        if _of_class(type(getattr(given, name, None)), families):
            return f" Give it the model inside (.{name}), and where there are several devices a model for each."
    if hasattr(given, "get_base_model") and _of_class(type(given.get_base_model()), families):  # PEFT
        return " Give it the model inside (.get_base_model()), and go on with the one around it."
    return ""


def _unknown(kind: type, families: Iterable[Family]) -> str:
    classes = {name: family.name for family in families for name in family.classes}
    short = {name: name.rpartition(".")[2] for name in classes}
    # Where the short names are equal, it is the modules that differ.
    told = {name: name if last == kind.__name__ else last for name, last in short.items()}
    known = ", ".join(f"{told[name]} ({family})" for name, family in classes.items())
    near = difflib.get_close_matches(kind.__name__, short.values(), n=1, cutoff=0.5)
    nearest = (
        f", to which {next(told[name] for name in classes if short[name] == near[0])} is the nearest" if near else ""
    )
    return (
        f"earlytom_compile.compile() knows {known}; got {kind.__name__} (of {kind.__module__}){nearest}. "
        'For other models try torch.compile(model, backend="earlytom"), or add a family as docs/adding-a-model.md says.'
    )
