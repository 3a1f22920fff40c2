"""The cache of keys and values by the name it has: ``cache`` since transformers 5.24, ``past_key_values`` before.

    model(input_ids, **{cache_name(model.forward): cache_of(output)})

From 5.24 on the old name still works but warns, so our own code never uses it there.
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import EarlyTomConfigError

_NEW, _OLD = "cache", "past_key_values"


def cache_name(function: Callable[..., Any]) -> str:
    """The name of the argument by which ``function`` takes a cache."""
    return _NEW if _NEW in inspect.signature(function).parameters else _OLD


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among a caller's arguments, by either name; None if there is none."""
    return arguments.get(_OLD) if arguments.get(_NEW) is None else arguments[_NEW]


def cache_of(output: Any) -> Any:
    """The cache that a model or ``generate`` returns with its output; None if it returns none."""
    return getattr(output, _NEW if hasattr(output, _NEW) else _OLD, None)


def cache_to_make(function: Callable[..., Any], arguments: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """The cache that the language model ``function`` would make for itself, where Dynamo cannot follow it or it would
    be returned as tuples: one of transformers before 4.56, none of which knows a configuration."""
    wanted = arguments.get("use_cache")
    wanted = getattr(config, "use_cache", False) if wanted is None else wanted
    kind = getattr(sys.modules.get("transformers.cache_utils"), "DynamicCache", None)
    if not wanted or given_cache(arguments) is not None or kind is None:
        return {}
    return {} if "config" in inspect.signature(kind).parameters else {cache_name(function): kind()}


def counts_first_layer(cache: Any) -> bool:
    """Whether ``cache`` has a number for how many keys its first layer holds, as those of transformers before 4.54."""
    return hasattr(cache, "_seen_tokens")


_CUT = "_earlytom_compressed"


def mark_cache(*caches: Any) -> None:
    """Remember that these caches hold a cut prompt, which the caller's ids no longer describe."""
    for cache in caches:
        if cache is not None and hasattr(cache, "__dict__"):
            setattr(cache, _CUT, True)


def refuse_compressed_cache(cache: Any, ids: Any, video_token: int) -> None:
    """Raise where ``ids`` [R, S] have the placeholders of videos that were cut from the prompt in ``cache``."""
    if getattr(cache, _CUT, False) and isinstance(ids, torch.Tensor) and bool((ids == video_token).any()):
        raise EarlyTomConfigError(
            "the cache holds a prompt whose video tokens were cut, and input_ids still have all of them. Start the "
            "next turn without a cache, with the whole conversation and its video; earlytom_compile.encode_videos() "
            "saves encoding it again."
        )
