"""``earlytom flops``: what a prefill costs with each method, and how far that is from the paper's tables.

earlytom flops --shape llava-onevision-7b --protocol paper

VisionZip  25%   41.8   -   8.7   50.5   61.2%   50.5
EarlyTom   25%   ...

``--frames`` are pictures of the video. What merges is a frame of the encoder: a picture, or the two of a temporal
patch of Qwen; ``--schedule`` and everything that is printed mean these.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from ..config import EarlyTomConfig
from ..errors import EarlyTomConfigError
from ..flops import Flops, Protocol, Reuse, count, implied_encoder, implied_frames, merged_inside
from ..methods.registry import EARLYTOM
from ..shapes import ModelShape, QwenShape, shape_of, sized
from .outputs import output_console, write_text

INNER_LAYER = 18
"""Where HoliTom merges inside the language model, and EarlyTom after it (Table 8, "w. Inner LLM")."""
FASTV_LAYERS, FASTV_RATIO = 2, 0.2
STAGE_1_RETENTION = 0.739
"""Table 5: average share of the frames left after stage 1."""
_TABLE_7_SHAPE, TABLE_7_TOKENS = "qwen2.5-vl-7b", 23_000
"""Of the paper's Table 7: "a 23k-token context length". 768 pictures of 168x280 are 40 more."""

_FULL, _FASTV, _DYCOKE, _VISIONZIP, _HOLITOM = "full", "FastV", "DyCoke", "VisionZip", "HoliTom"
_PLAIN = "pooling, subsampling"
_EARLYTOM, _EARLYTOM_INNER, _EARLYTOM_REUSE = "EarlyTom", "EarlyTom + inner", "EarlyTom plus"

# Tables 1, 2, 6 and 7: T of (method, retain ratio). Everything else they list needs settings the paper does not give.
PUBLISHED: dict[str, dict[tuple[str, float], float]] = {
    "llava-onevision-7b": {
        (_FULL, 1.0): 82.6,
        (_FASTV, 1.0): 51.1,
        (_DYCOKE, 0.25): 50.5,
        **{(_VISIONZIP, r): t for r, t in ((0.25, 50.5), (0.2, 48.7), (0.15, 46.9), (0.1, 45.2))},
        **{(_HOLITOM, r): t for r, t in ((0.25, 49.0), (0.2, 47.5), (0.15, 46.0), (0.1, 44.6))},
        **{(_EARLYTOM_INNER, r): t for r, t in ((0.25, 36.5), (0.2, 35.1), (0.15, 33.6), (0.1, 32.2))},
    },
    "llava-onevision-0.5b": {
        (_FULL, 1.0): 45.3,
        **{(_VISIONZIP, r): t for r, t in ((0.25, 42.4), (0.2, 42.3), (0.15, 42.1), (0.1, 42.0))},
        **{(_HOLITOM, r): t for r, t in ((0.25, 42.3), (0.2, 42.2), (0.15, 42.1), (0.1, 42.0))},
        **{(_EARLYTOM_INNER, r): t for r, t in ((0.25, 29.9), (0.2, 29.8), (0.15, 29.7), (0.1, 29.6))},
    },
    "llava-video-7b": {
        (_FULL, 1.0): 246.2,
        (_FASTV, 1.0): 158.2,
        (_VISIONZIP, 0.15): 159.4,
        (_HOLITOM, 0.15): 156.6,
        (_EARLYTOM_INNER, 0.15): 86.4,
    },
    _TABLE_7_SHAPE: {
        (_FULL, 1.0): 554.7,
        (_PLAIN, 0.15): 91.9,
        (_EARLYTOM_INNER, 0.15): 67.7,
    },
}


@dataclass(frozen=True)
class Row:
    """One method: share of the video tokens before the language model, work, and the paper's total in T."""

    method: str
    retain_ratio: float
    flops: Flops
    published: float | None


@dataclass(frozen=True)
class Case:
    """What is counted: a shape, its frames, how they merge or what is reused of them, and which protocol."""

    shape: ModelShape
    protocol: Protocol
    frames: float
    """Of the encoder: broken where a number of tokens was asked for that whole ones do not make."""
    schedule: tuple[float, ...]
    merge_layers: tuple[int, ...]
    prompt_length: int
    reuse: Reuse | None = None
    """None: nobody asked."""

    @property
    def patches(self) -> int:
        """Of the video."""
        return round(self.frames * self.shape.frame_tokens)

    def budget(self, retain_ratio: float) -> int:
        """Tokens that are kept of the video."""
        return max(1, round(retain_ratio * self.frames * self.shape.pooled_tokens))

    @property
    def others(self) -> int:
        """Tokens in the language model that are not the video's: none in protocol ``paper``."""
        return 0 if self.protocol == "paper" else self.shape.tokens_beside(round(self.frames)) + self.prompt_length

    def tokens(self, retain_ratio: float) -> int:
        """Tokens in the language model."""
        return self.budget(retain_ratio) + self.others

    @property
    def size(self) -> str:
        """Of the video, for people."""
        if self.shape.pictures == 1:
            return f"{self.frames:g} frames"
        tokens = f"{round(self.frames * self.shape.pooled_tokens):,} video tokens"
        return f"{tokens}: {self.frames:.4g} temporal patches (two pictures each) of {self.shape.pooled_tokens}"

    def count(
        self,
        llm_tokens: int | Mapping[int, int],
        *,
        merge: bool = False,
        method: str = EARLYTOM,
        kept: int | None = None,
    ) -> Flops:
        """Work with these tokens, with or without merging frames, or where a ``method`` has ``kept`` so many."""
        schedule = self.schedule if merge else (self.frames,)
        return count(
            self.shape,
            protocol=self.protocol,
            frames_schedule=schedule,
            llm_tokens=llm_tokens,
            merge_layers=self.merge_layers,
            method=method,
            kept=kept,
        )

    def count_reused(self, llm_tokens: int) -> Flops:
        """Work with these tokens where unchanged patches are reused."""
        return count(
            self.shape,
            protocol=self.protocol,
            frames_schedule=(self.frames,),
            llm_tokens=llm_tokens,
            variant="plus",
            reuse=self.reuse,
        )


def execute(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Count, print, and write what was printed."""
    _check(arguments)
    case = _case(arguments, options)
    at_home = _asks_for_a_table(arguments) and case.frames == _usual_frames(arguments, case.shape)
    published = PUBLISHED.get(arguments.shape, {}) if at_home else {}
    rows = methods(case, arguments.retain_ratios, published)
    console = output_console(arguments)
    console.print(_table(case, rows, arguments.model or arguments.shape))
    implied = []
    try:
        implied = _implied(case, published)
    except EarlyTomConfigError as error:  # other merge layers than the paper's, perhaps: an answer too
        console.print(f"The paper's totals are out of reach with these merge layers: {error}", highlight=False)
    if implied:
        console.print(_implied_table(case, implied))
    if arguments.json:
        content = _to_dict(case, rows, implied, arguments.model or arguments.shape)
        write_text(arguments.json, json.dumps(content, indent=2) + "\n")


def _check(arguments: argparse.Namespace) -> None:
    if arguments.model and "shape" in arguments.given:
        raise EarlyTomConfigError(f"shape={arguments.shape!r} with --model: the checkpoint has a shape; give one.")
    if "prompt_length" in arguments.given and arguments.protocol == "paper":
        raise EarlyTomConfigError(
            f"prompt_length={arguments.prompt_length} with --protocol paper: it counts no text (Eq. 8); "
            "take --protocol exact."
        )


def methods(case: Case, retain_ratios: Sequence[float], published: Mapping[tuple[str, float], float]) -> list[Row]:
    """Every method whose tokens are known layer by layer.

    VisionZip and DyCoke shorten the sequence before the language model, FastV after its first two layers, HoliTom
    before it and once more inside; none of them touches the encoder. In protocol ``exact``, what VisionZip, DyCoke and
    HoliTom multiply to choose tokens behind the encoder is counted; what ranks tokens inside the language model is not.
    """
    whole = case.tokens(1.0)
    inside = case.shape.llm_layers > INNER_LAYER
    found = [
        (_FULL, 1.0, case.count(whole)),
        (_FASTV, 1.0, case.count({0: whole, FASTV_LAYERS: case.tokens(FASTV_RATIO)})),
        (_DYCOKE, 0.25, case.count(case.tokens(0.25), method="dycoke", kept=case.budget(0.25))),
    ]
    for ratio in retain_ratios:
        kept, budget = case.tokens(ratio), case.budget(ratio)
        merged = _merged_inside(case, ratio)
        if (_PLAIN, 0.15) in published:
            found.append((_PLAIN, ratio, case.count(kept)))
        found.append((_VISIONZIP, ratio, case.count(kept, method="visionzip", kept=budget)))
        if inside:
            found.append((_HOLITOM, ratio, case.count(merged, method="holitom", kept=budget)))
        found.append((_EARLYTOM, ratio, case.count(kept, merge=True)))
        if inside:
            found.append((_EARLYTOM_INNER, ratio, case.count(merged, merge=True)))
        if case.reuse is not None:
            found.append((_EARLYTOM_REUSE, ratio, case.count_reused(kept)))
    return [Row(method, ratio, flops, published.get((method, ratio))) for method, ratio, flops in found]


def _merged_inside(case: Case, ratio: float) -> dict[int, int]:
    """Only video tokens merge: the words and the newline stay."""
    inside = merged_inside(case.budget(ratio), layer=INNER_LAYER)
    return {layer: tokens + case.others for layer, tokens in inside.items()}


def _case(arguments: argparse.Namespace, options: dict[str, Any]) -> Case:
    shape = _shape_of_model(arguments.model) if arguments.model else shape_of(arguments.shape)
    shape = sized(shape, arguments.frame_size) or shape
    frames: float
    if arguments.frames is not None:
        frames = shape.frames_of(arguments.frames)
    else:
        frames = arguments.schedule[0] if arguments.schedule else _usual_frames(arguments, shape)
    for name, least in (("frames", 1), ("prompt_length", 0)):
        value = frames if name == "frames" else arguments.prompt_length
        if value < least:
            raise EarlyTomConfigError(f"{name}={value}: must be at least {least}.")
    bad = [ratio for ratio in arguments.retain_ratios if not 0 < ratio <= 1]
    if bad:
        raise EarlyTomConfigError(f"retain_ratio={bad[0]}: must be in (0, 1].")
    merges = shape.merges(options.get("merge_layers"))
    schedule = arguments.schedule or (frames, *[frames * STAGE_1_RETENTION] * len(merges))
    if schedule[0] != frames or len(schedule) != 1 + len(merges):
        raise EarlyTomConfigError(
            f"schedule {_arrows(schedule)}: must start with the {frames:g} frames and go on with one number for "
            f"each of the merge layers {', '.join(map(str, merges))}."
        )
    reuse = _reuse(arguments, shape, frames)
    return Case(shape, arguments.protocol, frames, tuple(schedule), merges, arguments.prompt_length, reuse)


def _asks_for_a_table(arguments: argparse.Namespace) -> bool:
    """Whether it may be one of the paper's."""
    return not arguments.model and arguments.protocol == "paper" and arguments.frame_size is None


def _usual_frames(arguments: argparse.Namespace, shape: ModelShape) -> float:
    """Those of a video that the shape is used with; of Table 7, which tells tokens, as many as make these."""
    if _asks_for_a_table(arguments) and arguments.shape == _TABLE_7_SHAPE:
        return TABLE_7_TOKENS / shape.pooled_tokens
    return shape.frames_of(shape.frames)


def _reuse(arguments: argparse.Namespace, shape: ModelShape, frames: float) -> Reuse | None:
    """What is computed where unchanged patches are reused; None where nobody says how many change."""
    share, computed, layers = arguments.share_computed, arguments.patches_computed, arguments.layers_in_full
    if share is not None and computed is not None:
        raise EarlyTomConfigError(f"encode_ratio={share} with --computed {computed}: both say the same; give one.")
    config = EarlyTomConfig(reuse=True, encode_ratio=share, full_layers=layers)
    if share is None and computed is None:
        if layers is not None:
            raise EarlyTomConfigError(
                f"full_layers={layers} without --encode-ratio or --computed: nobody says how many patches the other "
                "layers compute; give one of them."
            )
        return None
    known = computed if computed is not None else config.place_budget(round(frames), shape.frame_tokens)
    return Reuse(known, config.resolve_full_layers(shape.vision_layers))


def _shape_of_model(name: str) -> ModelShape:
    """The sizes in ``config.json``; weights are not read."""
    from .loading import checked_config  # which imports torch

    return ModelShape.from_config(checked_config(name)[1])


def _implied(case: Case, published: Mapping[tuple[str, float], float]) -> list[tuple[str, dict[str, Any]]]:
    """What each of EarlyTom's published totals says about its frames, and what all of them say together."""
    totals = {
        ratio: (1e12 * total, _merged_inside(case, ratio))
        for (method, ratio), total in published.items()
        if method == _EARLYTOM_INNER
    }
    sets = [(f"{ratio:.0%}", [total]) for ratio, total in totals.items()]
    if len(totals) > 1:
        sets.append(("all", list(totals.values())))
    result = []
    for label, constraints in sets:
        encoder = implied_encoder(case.shape, constraints)
        frames = implied_frames(case.shape, encoder, frames=case.frames, merge_layers=case.merge_layers)
        result.append((label, {"published": [total for total, _ in constraints], **asdict(frames)}))
    return result


def _table(case: Case, rows: Sequence[Row], name: str) -> Table:
    exact = case.protocol == "exact"
    table = Table(title=f"Prefill of {name}, {case.size}, protocol {case.protocol}", title_justify="left")
    table.add_column("method", overflow="fold")
    compared = any(row.published is not None for row in rows)
    headings = ["kept", "encoder", *(["projector"] if exact else []), "LLM", "total T", "of full"]
    for heading in headings + ["paper"] * compared:
        table.add_column(heading, justify="right", overflow="fold")
    full = rows[0].flops.total
    digits = max(1, 2 - math.floor(math.log10(full / 1e12)))  # one as in the paper, three significant ones at least
    for row in rows:
        flops = row.flops
        parts = [flops.encoder + flops.operators, *([flops.projector] if exact else []), flops.llm + flops.lm_head]
        cells = [f"{part / 1e12:.{digits}f}" for part in [*parts, flops.total]]
        paper = "" if row.published is None else f"{row.published:.1f}"
        table.add_row(
            row.method, f"{row.retain_ratio:.0%}", *cells, f"{flops.total / full:.1%}", *([paper] if compared else [])
        )
    merges = ", ".join(map(str, case.merge_layers))
    frames = f"EarlyTom: frames {_arrows(case.schedule)}, merged after encoder layers {merges}."
    note = _TABLE_7_NOTE if isinstance(case.shape, QwenShape) and not exact else _PROTOCOL_NOTES[case.protocol]
    table.caption = f"{note} {frames}"
    if any(row.method == _EARLYTOM_INNER for row in rows):
        table.caption += (
            " 'inner' adds what the paper does inside the LLM: half of the video tokens merge before its layer "
            f"{INNER_LAYER}."
        )
    if case.reuse is not None:
        table.caption += f" {_reuse_note(case.reuse, case.patches)}"
    table.caption_justify = "left"
    return table


_PROTOCOL_NOTES = {
    "paper": "A multiply-add is 1, all frames are one sequence in the encoder, and text is not counted (Eq. 8).",
    "exact": "A multiply-add is 2. Our operators are part of the encoder, lm_head for one position of the LLM.",
}


_TABLE_7_NOTE = (
    "As the paper's Table 7: a multiply-add is 2, text is not counted, and the encoder has a patch for each token, not "
    "four; full layers see those of all frames, and the merger is counted for each."
)


def _reuse_note(reuse: Reuse, patches: int) -> str:
    in_full = ", ".join(map(str, reuse.full_layers)) or "none"
    return (
        f"{_EARLYTOM_REUSE}: {reuse.computed:,} of {patches:,} patches ({reuse.computed / patches:.1%}) are computed, "
        f"all of them in encoder layers {in_full}; to find out which changed multiplies nothing and is not counted."
    )


def _implied_table(case: Case, implied: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    table = Table(title="Frames that EarlyTom's published totals imply", title_justify="left")
    table.add_column("kept", overflow="fold")
    for heading in ("paper", "encoder T", "even", *(f"after {layer}" for layer in case.merge_layers)):
        table.add_column(heading, justify="right", overflow="fold")
    for label, content in implied:
        least, most = content["encoder"]
        pairs = [content["every_layer"], *content["after_merge"]]
        table.add_row(
            label,
            ", ".join(f"{total / 1e12:.1f}" for total in content["published"]) if label != "all" else "",
            f"{least / 1e12:.2f}-{most / 1e12:.2f}",
            *(f"{low:.1f}-{high:.1f}" for low, high in pairs),
        )
    table.caption = (
        "With 'inner' merging, as in the paper's Table 8. even: as many frames in all layers would cost the same. One "
        "total does not fix several merges: the other columns are what each can be while frames never grow and a layer "
        "leaves at least half, and their ends do not go together."
    )
    table.caption_justify = "left"
    return table


def _to_dict(
    case: Case, rows: Sequence[Row], implied: Sequence[tuple[str, dict[str, Any]]], name: str
) -> dict[str, Any]:
    full = rows[0].flops.total
    return {
        "model": name,
        **asdict(case),
        "rows": [{**asdict(row), "total": row.flops.total, "share_of_full": row.flops.total / full} for row in rows],
        "implied": [{"retain_ratio": label, **content} for label, content in implied],
    }


def _arrows(schedule: Sequence[float]) -> str:
    return " -> ".join(f"{frames:.4g}" for frames in schedule)
