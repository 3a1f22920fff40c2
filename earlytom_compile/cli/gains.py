"""What a user gains from a compressed call: tokens, work, time and memory, beside those of all tokens.

    gains = gains_of(model, comparison, options)
    gains_table(gains)

Tokens are those of the call, and times were measured in it. Work is counted as :mod:`earlytom_compile.flops` counts it
(``protocol="exact"``). Memory is what the sizes say, in bytes of the model's dtype:

    keys and values    2 · key heads · head width · prompt tokens, summed over the layers; linear ones have a state
    widest activation  prompt tokens · MLP width in the language model, frames · patches · MLP width in the encoder

The encoder's is the same with and without compression, since its first layers, or those in full, see all frames.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from ..config import EarlyTomConfig
from ..errors import EarlyTomConfigError
from ..flops import Reuse, count, reuse_of
from ..flops_inside import layer_lengths, operations_inside
from ..methods.registry import EARLYTOM
from ..shapes import ModelShape, QwenShape
from .comparison import Comparison
from .quality import faster

_LITTLE, _AS_FAST = 0.1, 1.05
"""Seconds below which a first token is mostly what each call costs, and what is not shown as faster."""
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


@dataclass(frozen=True)
class Cost:
    """One prompt up to its first token; memory in bytes, time in seconds, work in floating-point operations."""

    video_tokens: int
    prompt_tokens: int
    flops: float | None
    seconds: float
    cache_bytes: int
    language_bytes: int
    """The widest activation of a layer of the language model."""
    encoder_bytes: int
    """The widest activation of a layer of the vision encoder."""


@dataclass(frozen=True)
class Gains:
    """With all tokens, and with those that are left."""

    full: Cost
    compressed: Cost


def gains_of(
    model: Any, comparison: Comparison, options: dict[str, Any], grid: tuple[int, int] | None = None
) -> Gains | None:
    """What one prompt with its videos cost; None if the call ran uncompressed. ``grid``: patches of a picture, height x
    width, where the model takes any."""
    report, config = comparison.report, EarlyTomConfig.from_options(options)
    videos, prompt = report["videos"], report["prompt"]
    if not videos or not prompt:
        return None
    size, text = model.dtype.itemsize, model.config.text_config
    shape = _shape_of(model, grid)
    frames, reuse = [video["frames"] for video in videos], reuse_of(report)
    none: list[Reuse | None] = [None] * len(videos)

    def cost(place: int, schedules: list[list[int]], reused: Sequence[Reuse | None], seconds: float) -> Cost:
        vision, lengths = model.config.vision_config, layer_lengths(_lengths(report, place), text.num_hidden_layers)
        if shape is None:
            patches = (vision.image_size // vision.patch_size) ** 2
            head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
            cached: float = 2 * text.num_key_value_heads * head * sum(lengths)
        else:
            patches = shape.frame_tokens
            cached = sum(shape.cache_numbers(layer, length) for layer, length in enumerate(lengths))
        return Cost(
            video_tokens=sum(video["tokens"][place] for video in videos),
            prompt_tokens=prompt[place],
            flops=_flops(shape, report, schedules, reused, place, config) if shape else None,
            seconds=seconds,
            cache_bytes=round(cached) * size,
            language_bytes=prompt[place] * text.intermediate_size * size,
            encoder_bytes=max(schedule[0] for schedule in schedules) * patches * vision.intermediate_size * size,
        )

    return Gains(
        cost(0, [schedule[:1] for schedule in frames], none, comparison.full.ttft_seconds),
        cost(1, frames, reuse, comparison.compressed.ttft_seconds),
    )


def _shape_of(model: Any, grid: tuple[int, int] | None) -> ModelShape | None:
    """None where nobody knows how to count its work."""
    try:
        shape = ModelShape.from_config(model.config)
    except EarlyTomConfigError:
        return None
    return shape.of_grid(*grid) if isinstance(shape, QwenShape) and grid is not None else shape


def _flops(
    shape: ModelShape,
    report: Mapping[str, Any],
    schedules: list[list[int]],
    reuse: Sequence[Reuse | None],
    place: int,
    config: EarlyTomConfig,
) -> float:
    """Work of a prompt with some videos, each of which the encoder sees by itself; ``place`` is 0 for that with all
    tokens, 1 for that with fewer."""
    method = config.method if place else EARLYTOM  # with all tokens, nobody keeps any
    lengths = _lengths(report, place)
    steps = config.steps_inside(shape.llm_layers) if len(lengths) > 1 else ()
    counts = [
        count(
            shape,
            protocol="exact",
            frames_schedule=schedule,
            llm_tokens=lengths,
            merge_layers=report["merge_layers"] if len(schedule) > 1 else None,
            variant=config.variant,
            method=method,
            kept=video["tokens"][place],
            reuse=each,
        )
        for schedule, each, video in zip(schedules, reuse, report["videos"], strict=True)
    ]
    others = sum(other.total - other.llm - other.lm_head for other in counts[1:])
    return counts[0].total + others + operations_inside(shape, lengths, steps)


def _lengths(report: Mapping[str, Any], place: int) -> dict[int, int]:
    """Of the prompt, from each layer of the language model on."""
    inside = {step["layer"]: step["prompt"] for step in report["inside"]} if place else {}
    return {0: report["prompt"][place], **inside}


def gains_table(gains: Gains) -> Table:
    """All tokens, fewer, and by how much."""
    full, less = gains.full, gains.compressed
    table = Table(title="What you gain", title_justify="left", caption_justify="left")
    for heading in ("", "all tokens", "compressed", ""):
        table.add_column(heading, overflow="fold")
    for name in ("video_tokens", "prompt_tokens"):
        cells = [str(getattr(cost, name)) for cost in (full, less)]
        table.add_row(name.replace("_", " "), *cells, _fewer(full, less, name))
    if full.flops is not None and less.flops is not None:
        cells = [f"{_scaled(cost.flops)}FLOPs" for cost in (full, less)]
        table.add_row("work of a prompt", *cells, _fewer(full, less, "flops"))
    seconds = [f"{1000 * cost.seconds:.0f} ms" for cost in (full, less)]
    table.add_row("time to first token", *seconds, faster(full.seconds / less.seconds))
    for name, text in (
        ("cache_bytes", "memory, keys and values"),
        ("language_bytes", "memory, language model"),
        ("encoder_bytes", "memory, vision encoder"),
    ):
        cells = [f"{_scaled(getattr(cost, name))}B" for cost in (full, less)]
        table.add_row(text, *cells, _fewer(full, less, name))
    table.caption = (
        "The time was measured here: vision encoder, prompt and first token, both in turn, median, without "
        "compilation. Work and memory are counted from the sizes: keys and values of the prompt, and the widest "
        "activation of a layer (in the encoder, of one that sees all frames)."
    )
    if full.seconds < _LITTLE and full.seconds < _AS_FAST * less.seconds:
        table.caption += (
            f"\nA call of {1000 * full.seconds:.0f} ms has no time to gain: the model and its video are so small that "
            "most of it is what any call takes. earlytom demo measures a larger model, and earlytom bench --shape "
            "cpu-medium one that is larger still."
        )
    return table


def _fewer(full: Cost, less: Cost, name: str) -> str:
    before, after = getattr(full, name), getattr(less, name)
    return "the same" if before == after else f"{before / after:.1f}x less"


def _scaled(value: float | None) -> str:
    """``"119.6 T"``."""
    assert value is not None
    factor, prefix = next((unit for unit in _UNITS if value >= unit[0]), _UNITS[-1])
    return f"{value / factor:.1f} {prefix}"
