"""``--model_args`` -> what to load and how to compress, every word of it understood or refused.

    pretrained=x,retain_ratio=0.2,preset=videomme,merge_layers=[6,21,23],max_frames_num=32
    -> Arguments(pretrained="x", retain_ratio=0.2, options={"preset": "videomme", ...}, max_frames=32)

``retain_ratio=full`` is the model as it is, by the same command: what else is said of compression is checked and does
nothing then.
"""

import argparse
import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...cli.options import given_options, reader
from ...config import EarlyTomConfig, bad_option, is_whole_number, unknown_option
from ...errors import EarlyTomConfigError

FULL = "full"
DTYPES = ("auto", "float32", "float16", "bfloat16")
_HINTS = typing.get_type_hints(EarlyTomConfig)
_OPTIONS = tuple(field.name for field in dataclasses.fields(EarlyTomConfig))
_OWN = ("pretrained", "device", "dtype", "torch_dtype", "max_frames_num", "batch_size")


@dataclass(frozen=True)
class Arguments:
    """What a model is made of; ``retain_ratio`` None is the full model."""

    pretrained: str
    device: str
    dtype: str
    max_frames: int | None
    """Frames a video at most; None leaves it to the checkpoint."""
    batch_size: int
    retain_ratio: float | None
    options: dict[str, Any]
    """Those of :class:`EarlyTomConfig` beside ``retain_ratio``."""
    own: dict[str, Any]
    """Arguments that only this kind of checkpoint has, as they came."""


def read_arguments(given: Mapping[str, Any], own: tuple[str, ...] = ()) -> Arguments:
    """Check ``given``, whose values may be text as on a command line.

    ``own``: names that a kind of checkpoint has beside those of all. Raises :class:`EarlyTomConfigError` for unknown
    names, with all that there are, and for bad values.
    """
    given = {name: value for name, value in given.items() if value is not None or name == "retain_ratio"}
    names = (*_OWN, *own, *_OPTIONS)
    for name in given:
        if name not in names:
            raise unknown_option(name, names)
    if not str(given.get("pretrained", "")):
        raise bad_option("pretrained", given.get("pretrained"), "a checkpoint folder or Hub id")
    if {"dtype", "torch_dtype"} <= given.keys():
        raise bad_option("torch_dtype", given["torch_dtype"], "left out beside dtype, which means the same")
    dtype = str(given.get("dtype", given.get("torch_dtype", "auto"))).removeprefix("torch.")
    if dtype not in DTYPES:
        raise bad_option("dtype", dtype, "one of " + ", ".join(map(repr, DTYPES)))
    ratio, options = read_options({name: given[name] for name in _OPTIONS if name in given})
    return Arguments(
        pretrained=str(given["pretrained"]),
        device=str(given.get("device", "auto")),
        dtype=dtype,
        max_frames=_count("max_frames_num", given["max_frames_num"]) if "max_frames_num" in given else None,
        batch_size=_count("batch_size", given.get("batch_size", 1)),
        retain_ratio=ratio,
        options=options,
        own={name: given[name] for name in own if name in given},
    )


def read_options(given: Mapping[str, Any]) -> tuple[float | None, dict[str, Any]]:
    """(retain ratio or None for the full model, the other options of compression as ``compile()`` takes them).

    ``strict`` is True unless it is given: a call that runs uncompressed would count as a compressed one, and
    lmms-eval shows no warnings. Raises :class:`EarlyTomConfigError`.
    """
    for name in given:
        if name not in _OPTIONS:
            raise unknown_option(name, _OPTIONS)
    options = {name: _read(name, value) for name, value in given.items()}
    ratio = options.pop("retain_ratio", EarlyTomConfig.retain_ratio)
    full = ratio is None or (isinstance(ratio, str) and ratio.lower() == FULL)
    if not full:
        _require_ratio(ratio)
    compared = {"retain_ratio": EarlyTomConfig.retain_ratio if full else ratio}
    given_options(argparse.Namespace(**{**options, **compared}))
    return None if full else float(ratio), {"strict": True, **options}


def require_once(said: Mapping[str, Any], by_command: Mapping[str, Any]) -> None:
    """Raise :class:`EarlyTomConfigError` for what ``--model_args`` say and lmms-eval hands over besides.

    ``by_command``: lmms-eval's own options for models; None is one that was not given.
    """
    twice = [name for name in said if by_command.get(name) is not None]
    if twice:
        name = twice[0]
        raise EarlyTomConfigError(
            f"{name} is given twice: {name}={said[name]} in --model_args, and {by_command[name]} by lmms-eval's own "
            f"--{name} (its default counts). Say it with --{name} alone."
        )


def _require_ratio(ratio: Any) -> None:
    try:
        EarlyTomConfig.from_options({"retain_ratio": ratio})
    except EarlyTomConfigError as error:
        raise bad_option("retain_ratio", ratio, f"in (0, 1], or {FULL} for the model as it is") from error


def _read(name: str, value: Any) -> Any:
    """Text as the command line reads it; lmms-eval has made numbers and truth values of some."""
    if name in ("merge_layers", "full_layers") and is_whole_number(value):
        return (value,)
    return reader(_HINTS[name])(value.strip("'\"[]() ")) if isinstance(value, str) else value


def _count(name: str, value: Any) -> int:
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if not is_whole_number(number) or number < 1:
        raise bad_option(name, value, "a whole number, at least 1")
    return int(number)
