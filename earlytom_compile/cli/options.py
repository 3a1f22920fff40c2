"""The fields of EarlyTomConfig as command line flags, made from the dataclass so that the two cannot differ.

    merge_layers: tuple[int, ...] | None = None   ->   --merge-layers 6,21,23
    strict: bool = False                          ->   --strict / --no-strict, and for bool | None alike

Values are only read here; whether they make sense is EarlyTomConfig's to say. A flag that is not given is not
passed on, so that ``--preset`` fills in what was left open.
"""

import argparse
import ast
import dataclasses
import functools
import inspect
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..config import EarlyTomConfig, unknown_option
from ..errors import EarlyTomConfigError
from ..methods.registry import EARLYTOM
from .parser import CommandParser

COMMON = ("retain_ratio", "variant", "method")
"""What ``--help`` shows; ``--help-all`` shows every field."""


def add_config_flags(parser: CommandParser, *, leave_out: Sequence[str] = (), **defaults: Any) -> None:
    """One flag for each field of :class:`EarlyTomConfig`; ``defaults`` replace those of its fields."""
    hints, meanings, built = typing.get_type_hints(EarlyTomConfig), _field_docstrings(), EarlyTomConfig()
    fields = [field for field in dataclasses.fields(EarlyTomConfig) if field.name not in leave_out]
    group: Any = parser
    if any(field.name in COMMON for field in fields):  # else --help would show the title and nothing below it
        group = parser.add_argument_group(
            "compression", "The options of earlytom_compile.compile(), by the same names."
        )
    for field in fields:
        name, hint = field.name, hints[field.name]
        text = f"{meanings[name]} (default: {defaults.get(name, getattr(built, name))})".replace("%", "%%")
        settings: dict[str, Any] = {
            "dest": name,
            "default": defaults.get(name, argparse.SUPPRESS),
            "help": text,
        }
        if bool in _members(hint):
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings |= {"type": reader(hint), "metavar": _metavar(hint)}
        flag = "--" + name.replace("_", "-")
        if name in COMMON:
            group.add_argument(flag, **settings)
        else:
            parser.add_rare(flag, to=group, **settings)
    parser.set_defaults(variant_open="variant" in leave_out)


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that were on the command line, checked; raises :class:`EarlyTomConfigError`.

    Also where one of them could do nothing beside the others. A command that chooses a variant, or several, itself
    checks its choice: here it is enough that there is one with which the options mean something.
    """
    names = [field.name for field in dataclasses.fields(EarlyTomConfig)]
    options = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    config = _of_any_variant(options) if _is_open(arguments, options) else EarlyTomConfig.from_options(options)
    if config.mode is not None and config.lowering == "eager":
        raise EarlyTomConfigError(f"mode={config.mode!r} with lowering='eager': nothing is compiled; leave one out.")
    if options.get("compile_llm") and config.lowering == "eager":
        raise EarlyTomConfigError("compile_llm=True with lowering='eager': nothing is compiled; leave one out.")
    if config.static_selection != "auto" and config.variant == "plus":
        raise EarlyTomConfigError(
            f"static_selection={config.static_selection!r} with variant='plus', which selects on the device: leave "
            "one out."
        )
    return options


def _is_open(arguments: argparse.Namespace, options: Mapping[str, Any]) -> bool:
    """Whether the command chooses a variant later."""
    ours = options.get("method", EARLYTOM) == EARLYTOM and "variant" not in options
    return ours and getattr(arguments, "variant_open", False)


def _of_any_variant(options: Mapping[str, Any]) -> EarlyTomConfig:
    """With the first variant that takes them."""
    try:
        return EarlyTomConfig.from_options({**options, "variant": "plus"})
    except EarlyTomConfigError:
        return EarlyTomConfig.from_options({**options, "variant": "paper"})


def read_settings(text: str) -> dict[str, Any]:
    """``"tau_reuse=0.06 full_layers=5,7"`` as the options they are; raises :class:`EarlyTomConfigError` for others."""
    hints = typing.get_type_hints(EarlyTomConfig)
    settings: dict[str, Any] = {}
    for word in text.split():
        name, equals, value = word.partition("=")
        if name not in hints:
            raise unknown_option(name, list(hints))
        if not equals or name in settings:
            raise EarlyTomConfigError(f"settings {text!r}: {name} must be there once, as {name}=VALUE.")
        settings[name] = {"true": True, "false": False}.get(value, reader(hints[name])(value))
    if not settings:
        raise EarlyTomConfigError("settings '': name at least one option, such as tau_reuse=0.06.")
    return settings


def require_effect(options: Mapping[str, Any], device: str) -> None:
    """Raise :class:`EarlyTomConfigError` for options that change nothing on that type of device."""
    config = EarlyTomConfig.from_options(options)
    if device == "cuda":
        return
    if config.static_selection != "auto":
        raise EarlyTomConfigError(
            f"static_selection={config.static_selection!r} on {device}: it says who works beside a GPU; leave it out."
        )
    if config.mode == "reduce-overhead":
        raise EarlyTomConfigError(f"mode={config.mode!r} on {device}: there are no CUDA graphs; leave it out.")


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def reader(hint: Any) -> Callable[[str], Any]:
    """Text -> the first member of ``hint`` that can be read from it; else the text itself."""

    def read(text: str) -> Any:
        for member in _members(hint):
            try:
                if member is type(None) and text.lower() == "none":
                    return None
                if member in (int, float):
                    return member(text)
                if typing.get_origin(member) is tuple:
                    return tuple(int(part) for part in text.split(",")) if text else ()
            except ValueError:
                continue
        return text

    return read


def _metavar(hint: Any) -> str:
    """What may stand there: ``{paper,released}``, ``FLOAT|segment``, ``INT,INT,...|none``."""
    words = []
    for member in _members(hint):
        if typing.get_origin(member) is typing.Literal:
            choices = typing.get_args(member)
            words.append("{" + ",".join(choices) + "}" if len(choices) > 1 else choices[0])
        elif typing.get_origin(member) is tuple:
            words.append("INT,INT,...")
        else:
            words.append({type(None): "none", str: "NAME"}.get(member, getattr(member, "__name__", "").upper()))
    return "|".join(words)


@functools.cache
def _field_docstrings() -> dict[str, str]:
    """The string under each field of the dataclass, which Python itself throws away."""
    source = textwrap.dedent(inspect.getsource(EarlyTomConfig))
    body = typing.cast(ast.ClassDef, ast.parse(source).body[0]).body
    found = {}
    for field, string in zip(body, body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(string, ast.Expr):
            name, value = (
                typing.cast(ast.Name, field.target).id,
                typing.cast(ast.Constant, string.value).value,
            )
            found[name] = " ".join(str(value).split()).replace("`", "").replace(":class:", "")
    return found
