"""A compressed video costs vLLM's scheduler what it costs the encoder, not what is left of it.

Each step of vLLM has a budget for encoders, counted in tokens of the prompt: with a tenth of its tokens a video would
cost a tenth of it, so that ten times as many were encoded in one step, and the first of them waited for the last. vLLM
has no seam for what an item costs, so the method of its scheduler that spends the budget spends more, in the process of
a server that compresses.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

from ...config import EarlyTomConfig
from .options import FIELD, unpacked

_MODULE = "vllm.v1.core.sched.scheduler"


def charge_in_full() -> None:
    """Where vLLM's scheduler is in this process; does nothing the second time."""
    scheduler = getattr(sys.modules.get(_MODULE), "Scheduler", None)
    if scheduler is not None and not hasattr(scheduler._try_schedule_encoder_inputs, "__wrapped__"):
        scheduler._try_schedule_encoder_inputs = charging(scheduler._try_schedule_encoder_inputs)


def charging(spend: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """``spend(scheduler, request, ...)``, which returns (items that are encoded, tokens, what is left of the budget,
    ...), with the tokens that the items would have had uncompressed taken off what is left."""

    @functools.wraps(spend)
    def in_full(scheduler: Any, request: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        encoded, tokens, left, *others = spend(scheduler, request, *args, **kwargs)
        return encoded, tokens, left - sum(_left_out(request.mm_features[item]) for item in encoded), *others

    return in_full


def _left_out(feature: Any) -> int:
    """Tokens of a video that are not in the prompt."""
    if feature.data is None or FIELD not in feature.data:
        return 0
    options = unpacked(feature.data[FIELD].data)
    if options is None:
        return 0
    kept, ratio = feature.mm_position.get_num_embeds(), options.get("retain_ratio", EarlyTomConfig.retain_ratio)
    return round(kept / ratio) - kept
