"""What tests of compressed Qwen models share: prompts of all kinds, and the two sides of a comparison."""

from typing import Any

import torch
from generating import NEW, compiled
from oracle_qwen import compressed_generate, compressed_rows
from tiny_qwen import Clip, Still, qwen_inputs
from torch.testing import assert_close

import earlytom_compile

OPTIONS = {"merge_layers": (1, 4), "reuse": False, "tau_seg": 0.3, "retain_ratio": 0.2}
"""Behind layers that attend within windows, in Qwen2.5-VL."""
EVERYTHING = {"retain_ratio": 1.0, "tau_seg": -1.0, "tau_merge": 1.0}
"""No frame merges, no token goes."""
SMALL, WIDE = (4, 6), (10, 6)
"""Patches of a frame: with windows of 4 x 4, those at the border are smaller."""

PROMPTS = {
    "one video": [[3, Clip(9, *SMALL), 4]],
    "two sizes": [[2, Clip(9, *SMALL), 1, Clip(5, *WIDE), 4]],
    "padding": [[3, Clip(9, *SMALL), 4], [7, Clip(6, *SMALL), 1], [2, Clip(5, *WIDE), 3]],
    "an image beside": [[1, Still(4, 4), Clip(9, *SMALL), 3]],
    "everything": [
        [3, Clip(9, *SMALL), 4],
        [1, Still(4, 8), Clip(5, *WIDE), 2, Clip(4, *SMALL), 5],
        [6],
        [2, Still(4, 4)],
    ],
}
"""Rows without a video are among them."""


def compressing(model: Any, **options: Any) -> Any:
    """The model, compiled in place, nothing of it by Inductor."""
    return compiled(model, **{**OPTIONS, **options})


def oracle_options(**options: Any) -> dict[str, Any]:
    """Those of the model that :func:`compressing` gives."""
    return {"variant": "paper", **OPTIONS, **options}


def oracle_tokens(model: Any, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    """What ``new_tokens(compressing(model, **options), inputs)`` must be."""
    earlytom_compile.restore(model)
    return compressed_generate(model, inputs, NEW, **oracle_options(**options))


def assert_rows_of_the_oracle(model: Any, inputs: dict[str, Any], **options: Any) -> None:
    """Logits of ``forward()``, row by row; shorter ones are padded on the left. Restores the model."""
    with torch.no_grad():
        logits = compressing(model, **options)(**inputs).logits
    earlytom_compile.restore(model)
    expected = compressed_rows(model, inputs, **oracle_options(**options))
    assert logits.shape[1] == max(len(row) for _, row in expected)
    for got, (_, row) in zip(logits, expected, strict=True):
        assert_close(got[len(got) - len(row) :], row, atol=1e-4, rtol=1e-4)


def prompt_of(model: Any, kind: str, *, seed: int = 1) -> dict[str, Any]:
    """One of PROMPTS."""
    return qwen_inputs(model, PROMPTS[kind], seed=seed)
