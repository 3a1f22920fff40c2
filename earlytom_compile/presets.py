"""Settings by the name of a benchmark, from the paper's Table 8.

>>> preset_row("videomme", 0.1)
{'tau_seg': 0.3, 'merge_layers': (10, 21, 23), 'alpha': 0.9}
"""

from typing import Any

from .errors import EarlyTomConfigError

PRESET_RATIOS = (0.25, 0.20, 0.15, 0.10)
"""Retain ratios that presets have settings for."""
# tau_seg and merge layers for each of these ratios; every row has alpha = 0.9.
_TABLE_8: dict[str, tuple[tuple[float, tuple[int, ...]], ...]] = {
    "mvbench": ((0.8, (6, 14, 20)), (0.8, (6, 14, 20)), (0.8, (6, 14, 20)), (0.65, (8, 14, 20))),
    "egoschema": ((0.7, (10, 21, 23)), (0.6, (10, 21, 23)), (0.5, (10, 21, 23)), (0.3, (10, 21, 23))),
    "longvideobench": ((0.8, (6, 21, 23)), (0.6, (10, 21, 23)), (0.5, (10, 21, 23)), (0.3, (10, 21, 23))),
    "videomme": ((0.6, (10, 21, 23)), (0.5, (8, 21, 23)), (0.4, (8, 21, 23)), (0.3, (10, 21, 23))),
    "mvbench-0.5b": ((0.8, (8, 21, 23)), (0.8, (8, 21, 23)), (0.8, (8, 21, 23)), (0.65, (8, 21, 23))),
    "egoschema-0.5b": ((0.7, (10, 21, 23)), (0.6, (10, 21, 23)), (0.5, (10, 21, 23)), (0.3, (10, 21, 23))),
    "longvideobench-0.5b": (
        (0.8, (6, 21, 23)),
        (0.6, (10, 21, 23)),
        (0.5, (10, 21, 23)),
        (0.3, (10, 21, 23)),
    ),
    "videomme-0.5b": ((0.6, (8, 21, 23)), (0.5, (8, 21, 23)), (0.4, (8, 21, 23)), (0.3, (8, 21, 23))),
}
PRESETS = tuple(_TABLE_8)


def preset_row(name: Any, ratio: Any) -> dict[str, Any]:
    """The options of a row of Table 8; raises :class:`EarlyTomConfigError` where there is none."""
    if not isinstance(name, str) or name not in PRESETS:
        raise EarlyTomConfigError(f"preset={name!r}: must be one of {', '.join(map(repr, PRESETS))}.")
    if ratio not in PRESET_RATIOS:
        raise EarlyTomConfigError(
            f"preset={name!r} with retain_ratio={ratio!r}: Table 8 has rows for {', '.join(map(str, PRESET_RATIOS))}. "
            "Take one of those, or give tau_seg and merge_layers yourself without a preset."
        )
    tau_seg, merge_layers = _TABLE_8[name][PRESET_RATIOS.index(ratio)]
    return {"tau_seg": tau_seg, "merge_layers": merge_layers, "alpha": 0.9}
