"""Every option in one frozen dataclass, checked the moment it is built.

>>> EarlyTomConfig.from_options({"retain_ratio": 0.1})
EarlyTomConfig(retain_ratio=0.1, variant='plus', ...)
>>> EarlyTomConfig.from_options({"retain": 0.1})
EarlyTomConfigError: unknown option 'retain'; did you mean 'retain_ratio'? Valid options: ...
"""

import copy
import dataclasses
import difflib
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .errors import EarlyTomConfigError
from .methods.base import Step
from .methods.registry import EARLYTOM, method_named, method_names
from .presets import preset_row

DEFAULT_MAX_WINDOW = 128
"""Most frames of a segment where ``max_window`` is left None: each is compared with those of its segment alone, so that
memory and work grow with the frames, and not with their square."""
RELEASED_MAX_WINDOW = 8
"""Window of the released code where ``max_window`` is left None (algorithm.md, stage 1)."""

DEFAULT_MERGE_LAYERS = (6, 21, 23)
"""Where frames merge in an encoder of 26 layers: 7, 22 and 24 of them are done."""
DEFAULT_FULL_LAYERS = 3
"""How many of the last layers compute every place, so that what stands still sees what is new around it."""

OF_EARLYTOM = (
    "preset",  # first: it sets some of the others
    "variant",
    "merge_layers",
    "tau_seg",
    "alpha",
    "max_window",
    "tau_merge",
    "static_selection",
)
"""Options that have no effect with another ``method``."""
Variant = Literal["paper", "released", "plus"]
_OF_SEGMENTS = ("tau_seg", "alpha", "max_window")
"""What says which frames are of one segment: to merge them, and to select by attention."""
_OF_REUSE = ("tau_reuse", "full_layers", "encode_ratio")
"""What says which patches are computed again."""
NOT_EXPORTED = (
    "method", "encode_ratio", "lowering", "mode", "compile_llm", "static_selection", "inner_layer", "inner_drop_ratio",
    "strict",
)  # fmt: skip
"""Options that have no place in ``export()``: methods of other papers and the search for a budget's threshold read
values on the host; the others say how something is compiled, or what happens in the language model."""
_LARGEST_CHANGE = 1e6  # beyond any difference of normalised pixels, and far from overflow
_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class EarlyTomConfig:
    """The options of ``compile()``, of ``torch.compile(..., options=...)`` and of the command line.

    Symbols as in the paper: r = ``retain_ratio``, F frames a video, P tokens a frame after pooling.
    Raises :class:`EarlyTomConfigError` for a value outside its range.
    """

    retain_ratio: float = 0.2
    """r in (0, 1]: share of the video tokens that reach the language model (Eq. 5)."""
    variant: Variant | None = None
    """``"plus"``: patches that did not change are not computed again, in the place of merging frames, and K tokens stay
    that represent all others, whatever attention they receive. ``"paper"``: Eq. 1-7, exactly K tokens a video.
    ``"released"``: what the authors' code computes. Left out, it is ``"plus"``, with a ``preset`` ``"paper"``, which
    the preset's numbers are for, and with another ``method`` None."""
    reuse: bool | None = None
    """Compute a patch once, and again only when its pixels change, instead of merging frames (docs/reuse.md), with any
    method; None: under ``variant="plus"`` alone, if the encoder allows it; otherwise frames merge, with a warning."""
    tau_reuse: float = 0.06
    """Largest change of a patch's normalised pixels, beside the video's own noise, that does not count: the largest
    difference of the means of its quarters, or a third of the mean absolute difference (docs/reuse.md)."""
    full_layers: tuple[int, ...] | None = None
    """0-based encoder layers that compute unchanged patches too, so that what is new around them reaches them; None =
    the last three, or the second half of fewer than six."""
    encode_ratio: float | None = None
    """An exact budget for ``reuse`` in (0, 1]: the share of a video's patches that is computed, those that changed
    most, one frame at least. None: as many as changed."""
    merge_layers: tuple[int, ...] | None = None
    """0-based encoder layers after which frames merge; None = (6, 21, 23) of 26, scaled to the depth. With ``reuse``
    none merge, and attention in the last of these layers is what ``paper`` and ``released`` select by."""
    tau_seg: float = 0.6
    """A segment ends where the smoothed frame similarity falls below this (Eq. 1)."""
    alpha: float = 0.9
    """Weight of the newest similarity in its moving average, in (0, 1] (Eq. 1)."""
    max_window: int | None = None
    """Longest segment in frames, at least 2; None = 128 (``released``: 8). A frame is compared with those that can lie
    in one segment with it, so work and memory grow with F times this."""
    tau_merge: float | Literal["segment"] = "segment"
    """Similarity needed to merge (Eq. 2): a number, or that of the segment's own head and tail."""
    lowering: Literal["staged", "whole", "eager"] = "staged"
    """``"staged"``: one compiled layer for all of a kind; ``"whole"``: one Inductor graph; ``"eager"``: the rewritten
    graph as it is, nothing compiled."""
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = None
    """That of ``torch.compile``. ``"reduce-overhead"`` and ``"max-autotune"`` ask for CUDA graphs, which replay the
    layers between two waits for the host where that measures faster, under ``lowering="staged"``."""
    compile_llm: bool = True
    """``compile()`` compiles the language model's pass over the prompt too, as ``lowering`` says, on a CPU for prompts
    of 128 positions and more; with ``torch.compile`` the language model is part of the graph in any case."""
    static_selection: Literal["auto", "device", "host"] = "auto"
    """Where static frames' tokens are selected on a GPU: ``"host"`` is the CPU, meanwhile; ``"auto"`` is what a
    measurement at the first call says. The result is the same; on the CPU all three are. Not for ``variant="plus"``,
    which selects on the device."""
    method: str = "earlytom"
    """``"earlytom"``, of which ``variant`` is a form, or the method of another paper in its place, such as
    ``"visionzip"`` (docs/methods.md)."""
    inner_layer: int | None = None
    """0-based layer of the language model, at least 1, before which video tokens merge once more: each that the
    prompt's last position attends to least in the layer before joins the kept one most like it. 18 in the paper's
    tables; None: none merge there."""
    inner_drop_ratio: float = 0.5
    """Share of each video's tokens that ``inner_layer`` merges into the others, in [0, 1)."""
    strict: bool = False
    """Raise :class:`EarlyTomCompileError` where a call would otherwise run uncompressed with a warning."""
    preset: str | None = None
    """A row of Table 8, such as ``"videomme"`` or ``"videomme-0.5b"``, its layers scaled to the depth, with
    ``variant="paper"``; explicit options win over it."""
    # No options, but where some are from:
    _preset_layers = False  # whether merge_layers are those of Table 8, which are meant for 26 layers
    _default_variant = False  # whether nobody chose it

    def __post_init__(self) -> None:
        _require_number("retain_ratio", self.retain_ratio, 0 < _float(self.retain_ratio) <= 1, "in (0, 1]")
        if self.variant is not None:
            _require_choice("variant", self.variant, get_args(Variant))
        _require_number("tau_seg", self.tau_seg, not math.isnan(_float(self.tau_seg)), "a number such as 0.6")
        _require_number("alpha", self.alpha, 0 < _float(self.alpha) <= 1, "in (0, 1]")
        if self.tau_merge != "segment":
            finite = math.isfinite(_float(self.tau_merge))
            _require_number("tau_merge", self.tau_merge, finite, '"segment" or a number such as 0.8')
        if self.max_window is not None and not (is_whole_number(self.max_window) and self.max_window >= 2):
            raise bad_option("max_window", self.max_window, "None or a whole number of frames, at least 2")
        _require_choice("lowering", self.lowering, ("staged", "whole", "eager"))
        if self.mode is not None:
            _require_choice("mode", self.mode, _MODES)
        _require_choice("static_selection", self.static_selection, ("auto", "device", "host"))
        for name in ("strict", "compile_llm"):
            if not isinstance(getattr(self, name), bool):
                raise bad_option(name, getattr(self, name), "True or False")
        for name in ("merge_layers", "full_layers"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _layers(name, getattr(self, name)))
        if self.preset is not None:
            row = preset_row(self.preset, self.retain_ratio)
            if self.tau_seg == type(self).tau_seg and self.merge_layers is None:
                for name, value in row.items():
                    object.__setattr__(self, name, value)
                object.__setattr__(self, "_preset_layers", True)
        self._check_method()
        if self.variant is None and self.method == EARLYTOM:
            object.__setattr__(self, "variant", variant_of({"preset": self.preset}))
            object.__setattr__(self, "_default_variant", True)
        self._check_reuse()
        self._check_default()
        self._check_inner()

    def _check_method(self) -> None:
        if self.method == EARLYTOM:
            return
        _require_choice("method", self.method, tuple(method_names()))
        method_named(self.method)  # which may not load
        given = [name for name in OF_EARLYTOM if getattr(self, name) != getattr(type(self), name)]
        if given:
            raise EarlyTomConfigError(
                f"{given[0]}={getattr(self, given[0])!r} with method={self.method!r}: it belongs to EarlyTom's own "
                f'method and would have no effect. Leave {given[0]} out, or say method="earlytom".'
            )

    def _check_inner(self) -> None:
        if self.inner_layer is not None:
            if not is_whole_number(self.inner_layer) or self.inner_layer < 1:
                raise bad_option("inner_layer", self.inner_layer, "None or a 0-based layer of at least 1, such as 18")
            method = method_named(self.method)
            if method is not None and method.inside is not None:
                raise EarlyTomConfigError(
                    f"inner_layer={self.inner_layer} with method={self.method!r}, which leaves tokens out inside the "
                    "language model by a rule of its own. Leave inner_layer out."
                )
        ratio = self.inner_drop_ratio
        _require_number("inner_drop_ratio", ratio, 0 <= _float(ratio) < 1, "in [0, 1), such as 0.5")
        if self.inner_layer is None and ratio != type(self).inner_drop_ratio:
            raise EarlyTomConfigError(
                f"inner_drop_ratio={ratio!r} without inner_layer, where no tokens merge inside the language model: it "
                "would have no effect. Say inner_layer=18, or leave it out."
            )

    def _check_reuse(self) -> None:
        if self.reuse is not None and not isinstance(self.reuse, bool):
            raise bad_option("reuse", self.reuse, "True, False or None")
        enough = 0 <= _float(self.tau_reuse) <= _LARGEST_CHANGE
        _require_number("tau_reuse", self.tau_reuse, enough, "a number from 0 to 1e6, such as 0.06")
        if self.encode_ratio is not None:
            ratio = self.encode_ratio
            _require_number("encode_ratio", ratio, 0 < _float(ratio) <= 1, "None or a number in (0, 1]")
            if self.tau_reuse != type(self).tau_reuse:
                raise EarlyTomConfigError(
                    f"tau_reuse={self.tau_reuse!r} with encode_ratio={ratio!r}: a budget finds a threshold of its own. "
                    "Leave one of them out."
                )
        if self.reuses():
            self._check_merging()
        else:
            self._check_no_reuse()

    def _check_merging(self) -> None:
        """Raise for options of merging where patches are reused instead."""
        plus = self.variant == "plus"
        by_default = plus and self._default_variant
        of_selection: tuple[str, ...] = ("merge_layers",) if plus else ()  # by which the others select
        of_selection += _OF_SEGMENTS if by_default else ()  # who says these means "paper", perhaps
        given = self._given(("tau_merge", *of_selection))
        if not given:
            return
        name, cure = given[0], f"Leave {given[0]} out, or merge frames instead with reuse=False."
        why = "no frames merge where unchanged patches are reused"
        on = "reuse=True" if self.reuse else 'variant="plus", which reuses patches'
        if by_default and name in of_selection and self.reuse:
            why += ', and the default, variant="plus", selects tokens by other means'
            cure = f'Leave {name} out, say variant="paper", or merge frames instead with reuse=False.'
        elif by_default and not self.reuse:
            on = 'variant="plus", the default, which reuses patches'
            cure = (
                f'Leave {name} out, or merge frames instead: by the paper with variant="paper", or before the default '
                "selects with reuse=False."
            )
        raise EarlyTomConfigError(f"{name}={getattr(self, name)!r} with {on}: {why}. {cure}")

    def _check_no_reuse(self) -> None:
        """Raise for options of reuse where there is none."""
        given = self._given(_OF_REUSE)
        if not given:
            return
        name, off = given[0], f"with {self.chosen()} unless asked for"
        if self.reuse is False:
            off = "with reuse=False"
        elif self._default_variant:  # "plus" would reuse
            off = f"with preset={self.preset!r}, which is for variant='paper', unless asked for"
        raise EarlyTomConfigError(
            f"{name}={getattr(self, name)!r} without reuse, which is off {off}: it would have no effect. Leave {name} "
            "out, or say reuse=True."
        )

    def _given(self, names: Sequence[str]) -> list[str]:
        """Those of ``names`` that are neither at their default nor at what the preset says."""
        row = {} if self.preset is None else preset_row(self.preset, self.retain_ratio)
        return [name for name in names if getattr(self, name) not in (getattr(type(self), name), row.get(name))]

    def _check_default(self) -> None:
        if self._default_variant and self.variant == "plus" and self.static_selection != "auto":
            raise EarlyTomConfigError(
                f'static_selection={self.static_selection!r} with variant="plus", the default, which selects on the '
                'device: it would have no effect. Leave static_selection out, or say variant="paper".'
            )

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> "EarlyTomConfig":
        """Build a config from ``options=``; unknown keys and bad values raise :class:`EarlyTomConfigError`."""
        options = {key: value for key, value in (options or {}).items() if value is not None}
        fields = [field.name for field in dataclasses.fields(cls)]
        for key in options:
            if key not in fields:
                raise unknown_option(key, fields)
        if "preset" not in options:
            return cls(**options)
        row = preset_row(options["preset"], options.get("retain_ratio", cls.retain_ratio))
        config = cls(**{**row, **options})
        object.__setattr__(config, "_preset_layers", "merge_layers" not in options)
        return config

    def resolve_merge_layers(self, num_layers: int, full: Sequence[int] = ()) -> tuple[int, ...]:
        """Layers of an encoder of ``num_layers`` layers after which frames merge: none with ``reuse`` or another
        method; raises if one does not exist. Where attention stays inside windows but in the layers ``full``, the
        default is the last of those at or before the same depth: behind them each token knows its whole frame."""
        layers = self._merge_layers_of(num_layers, full)
        return () if self.reuses() or self.method != EARLYTOM else layers

    def not_compiled(self) -> "EarlyTomConfig":
        """The same options with nothing compiled."""
        twin = copy.copy(self)  # replace() would forget that layers are those of a preset
        object.__setattr__(twin, "lowering", "eager")
        return twin

    def require_layers(self, num_layers: int) -> None:
        """Raise where an encoder of ``num_layers`` layers does not have those that the options name."""
        self._merge_layers_of(num_layers)
        self.scored_layer(num_layers)
        if self.reuses():
            self.resolve_full_layers(num_layers)

    def scored_layer(self, num_layers: int, full: Sequence[int] = ()) -> int:
        """The layer whose attention ranks tokens, and behind which frames are segmented to select them. Raises where an
        encoder of ``num_layers`` layers does not have that of the method."""
        method = method_named(self.method)
        if method is None:
            return max(self._merge_layers_of(num_layers, full), default=num_layers - 1)
        if not -1 <= method.scored_layer < num_layers:
            raise EarlyTomConfigError(
                f"method={self.method!r} looks at layer {method.scored_layer} of the vision encoder, which has layers "
                f"0 to {num_layers - 1}. Choose another method, or a model with more layers."
            )
        return method.scored_layer if method.scored_layer >= 0 else num_layers - 1

    def _merge_layers_of(self, num_layers: int, full: Sequence[int] = ()) -> tuple[int, ...]:
        if self.merge_layers is not None and not self._preset_layers:
            return _existing("merge_layers", self.merge_layers, num_layers)
        layers = self.merge_layers or DEFAULT_MERGE_LAYERS
        scaled = layers if num_layers in (26, 27) else _scaled(layers, num_layers)
        at_or_before = {max((each for each in full if each <= layer), default=layer) for layer in scaled}
        return tuple(sorted(at_or_before))

    def resolve_full_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers of an encoder of ``num_layers`` layers that compute every place although patches are reused; raises if
        one does not exist."""
        if self.full_layers is not None:
            return _existing("full_layers", self.full_layers, num_layers)
        last = max(1, min(DEFAULT_FULL_LAYERS, num_layers // 2))
        return tuple(range(num_layers - last, num_layers))

    def reuses(self) -> bool:
        """Whether unchanged patches are not computed again, and no frames merge."""
        return self.variant == "plus" if self.reuse is None else self.reuse

    def merging_instead(self) -> "EarlyTomConfig | None":
        """The same with frames that merge, for an encoder whose patches cannot be reused; None where none are, or where
        reuse or an option of it was asked for by name."""
        if not self.reuses() or self.reuse is not None or self._given(_OF_REUSE):
            return None
        merging = copy.copy(self)
        object.__setattr__(merging, "reuse", False)
        return merging

    def place_budget(self, frames: int, places: int, prefix: int = 0) -> int:
        """T, places of a video of F frames with S places each that are computed: ``encode_ratio`` of them, at least one
        frame and the ``prefix`` places, such as a class token, of all; 0 where their number depends on the content."""
        fewest = places + (frames - 1) * prefix
        return 0 if self.encode_ratio is None else max(fewest, round(self.encode_ratio * frames * places))

    def token_budget(self, frames: int, tokens: int) -> int:
        """K = max(1, round(r·F·P)): tokens of a video that reach the language model, except under ``released`` (Eq. 5,
        made exact); F·P with a method that leaves tokens out in the language model only."""
        return max(1, round(self.ratio_behind_encoder() * frames * tokens))

    def ratio_behind_encoder(self) -> float:
        """Share of a video's tokens that reach the language model: r, or 1 with a method that keeps all behind the
        encoder."""
        method = method_named(self.method)
        return 1.0 if method is not None and method.keep is None else self.retain_ratio

    def min_frames(self, frames: int) -> int:
        """Frames stage 1 leaves at least, so that stage 2 can fill its budget; ``released`` has no floor."""
        return math.ceil(self.retain_ratio * frames) if self.keeps_exactly() else 1

    def steps_inside(self, layers: int) -> tuple[Step, ...]:
        """Where a language model of so many layers goes on with fewer tokens: by ``inner_layer`` or by the method.
        Raises :class:`EarlyTomConfigError` where it does not have the layer."""
        if self.inner_layer is None:
            method = method_named(self.method)
            return () if method is None or method.inside is None else method.inside(self.retain_ratio, layers)
        if self.inner_layer >= layers:
            choice = f"Choose from 1 to {layers - 1}, or leave it out" if layers > 1 else "Leave it out"
            raise EarlyTomConfigError(
                f"inner_layer={self.inner_layer}: the language model has layers 0 to {layers - 1}. {choice}."
            )
        merge: Literal["mean", "sequential"] = "sequential" if self.variant == "released" else "mean"
        return (Step(self.inner_layer, 1 - self.inner_drop_ratio, merge),)

    def reduces_inside(self) -> bool:
        """Whether the language model's later layers get fewer tokens than its first."""
        method = method_named(self.method)
        return self.inner_layer is not None or (method is not None and method.inside is not None)

    def merge_variant(self) -> Literal["paper", "released"]:
        """The rules by which frames merge (algorithm.md, stage 1), if any do: ``plus`` has none of its own."""
        return "released" if self.variant == "released" else "paper"

    def keeps_exactly(self) -> bool:
        """Whether every video keeps K tokens; under ``released`` their number depends on the content."""
        return self.variant != "released"

    def selects_by_attention(self) -> bool:
        """Whether the attention that tokens receive decides which stay; under ``plus`` it does not, with another method
        it may."""
        method = method_named(self.method)
        return self.variant != "plus" if method is None else method.importance

    def selects_by_keys(self) -> bool:
        """Whether the keys of the vision encoder's attention decide which tokens stay."""
        method = method_named(self.method)
        return method is not None and method.keys

    def chosen(self) -> str:
        """What makes the selection, as a reader has said it: ``"variant='paper'"``, ``"method='visionzip'"``."""
        return f"variant={self.variant!r}" if self.method == EARLYTOM else f"method={self.method!r}"

    def window(self) -> int:
        """``max_window`` as the operators take it, that of the variant where it was left None."""
        default = RELEASED_MAX_WINDOW if self.variant == "released" else DEFAULT_MAX_WINDOW
        return default if self.max_window is None else self.max_window

    def similarity_band(self, frames: int) -> int:
        """How many frames back similarities are needed: no segment is longer than its window."""
        return max(1, min(self.window(), frames) - 1)


def variant_of(options: Mapping[str, Any]) -> Any:
    """The ``variant`` among ``options``, or what it is where they leave it out."""
    if options.get("variant") is not None:
        return options["variant"]
    if options.get("method") not in (None, EARLYTOM):
        return None
    return "plus" if options.get("preset") is None else "paper"


def unknown_option(name: object, valid: Sequence[str]) -> EarlyTomConfigError:
    """The error for an option that is not among ``valid``, with the nearest of them."""
    near = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return EarlyTomConfigError(f"unknown option {name!r}{hint} Valid options: {', '.join(valid)}.")


def _scaled(layers: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """Layers of 26, moved to where the same share of the depth is done; never behind the last layer but one."""
    scaled = {round((layer + 1) * num_layers / 26) - 1 for layer in layers}
    return tuple(sorted({min(max(layer, 0), num_layers - 2) for layer in scaled if num_layers > 1}))


def is_whole_number(value: Any) -> bool:
    """Python's and numpy's integers, but not True and False."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _float(value: Any) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # of whole numbers beyond the largest float
        return math.nan


def bad_option(name: str, value: Any, allowed: str) -> EarlyTomConfigError:
    """The error for a value that is not ``allowed``."""
    return EarlyTomConfigError(f"{name}={value!r}: must be {allowed}.")


def _require_number(name: str, value: Any, ok: bool, allowed: str) -> None:
    if not ok:
        raise bad_option(name, value, allowed)


def _require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise bad_option(name, value, "one of " + ", ".join(map(repr, choices)))


def _layers(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        raise bad_option(name, value, "None or a sequence of layer numbers such as (6, 21, 23)")
    layers = tuple(value)
    if not all(is_whole_number(layer) and layer >= 0 for layer in layers) or len(set(layers)) < len(layers):
        raise bad_option(name, value, "distinct 0-based layer numbers such as (6, 21, 23)")
    return tuple(sorted(map(int, layers)))


def _existing(name: str, layers: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    missing = [layer for layer in layers if layer >= num_layers]
    if missing:
        raise EarlyTomConfigError(
            f"{name}={layers}: layer {missing[0]} does not exist; the vision encoder "
            f"has layers 0 to {num_layers - 1}. Choose from those, or leave {name}=None."
        )
    return layers
