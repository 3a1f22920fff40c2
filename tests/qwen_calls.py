"""What tests of compressed Qwen models share: models and their twins, prompts of all kinds, and both sides of a
comparison."""

from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from generating import NEW, compiled, new_tokens
from oracle_qwen import compressed_generate, compressed_rows, compressed_videos
from tiny_qwen import Clip, Still, qwen_inputs, tiny_qwen
from torch import Tensor
from torch.testing import assert_close
from torch.torch_version import TorchVersion

from earlytom_compile import report

OPTIONS = {"variant": "paper", "merge_layers": (0, 2), "reuse": False, "tau_seg": 0.3, "retain_ratio": 0.2}
"""Behind layers that attend within windows, in Qwen2.5-VL; between and behind those of DeepStack, in Qwen3-VL."""
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


takes_features = pytest.mark.skipif(
    TorchVersion(transformers.__version__) < "5.18", reason="Qwen3-VL takes no features from outside"
)


def supported(kinds: Iterable[str], *, long: Iterable[str] = ()) -> list[Any]:
    """Those that can be compressed with the transformers there is, as parameters; those of ``long`` in the long tests
    alone."""
    marks = {kind: [takes_features] * ("qwen3_vl" in kind) + [pytest.mark.long] * (kind in long) for kind in kinds}
    return [pytest.param(kind, marks=marks[kind]) for kind in kinds]


@cache
def model_of(kind: str, use: str = "compressed") -> Any:
    """One of four vision layers for each use. Made once, and no argument of a test that draws its inputs, which would
    print all of it. What is compiled stays so, as long as the options do: tests of the same ones are next to each
    other."""
    return tiny_qwen(kind, vision_layers=4, full=(1, 3), deepstack=(0, 1, 2))


def twin_of(kind: str) -> Any:
    """The same weights once more: what is never compiled, for the oracle."""
    return model_of(kind, "twin")


def prompt_of(model: Any, kind: str, *, seed: int = 1) -> dict[str, Any]:
    """One of PROMPTS."""
    return qwen_inputs(model, PROMPTS[kind], seed=seed)


def compressing(model: Any, **options: Any) -> Any:
    """The model, compiled in place, nothing of it by Inductor."""
    return compiled(model, **{**OPTIONS, **options})


def oracle_options(**options: Any) -> dict[str, Any]:
    """Those of the model that :func:`compressing` gives."""
    return {"variant": "paper", **OPTIONS, **options}


def oracle_tokens(twin: Any, inputs: dict[str, Any], **options: Any) -> Tensor:
    """What ``new_tokens(compressing(model, **options), inputs)`` must be."""
    return compressed_generate(twin, inputs, NEW, **oracle_options(**options))


def counts_of(model: Any) -> list[tuple[list[int], list[int]]]:
    """Of each video of the last call: frames at first and behind each merge, tokens before and after."""
    return [(video["frames"], video["tokens"]) for video in report(model).to_dict()["videos"]]


def assert_as_the_oracle(model: Any, twin: Any, inputs: dict[str, Any], *, tokens: bool = True, **options: Any) -> None:
    """Counts, logits of ``forward()`` and (``tokens``) those that ``generate()`` chooses, of a model that is compiled
    with ``options``, row by row. ``forward()`` has a column for each position that some row keeps, padding included."""
    with torch.no_grad():
        logits = model(**inputs).logits
    videos = compressed_videos(twin, inputs, **oracle_options(**options))
    frames = inputs["video_grid_thw"][:, 0].tolist()
    assert counts_of(model) == [
        ([count, *video.frames_after], [video.placeholders, len(video.kept)])
        for count, video in zip(frames, videos, strict=True)
    ]
    expected = [row for _, row in compressed_rows(twin, inputs, **oracle_options(**options))]
    length, uncut = inputs["input_ids"].shape[1], inputs["attention_mask"].sum(1).tolist()
    assert logits.shape[1] == max(length - own + len(row) for own, row in zip(uncut, expected, strict=True))
    for got, row in zip(logits, expected, strict=True):
        assert_close(got[len(got) - len(row) :], row, atol=1e-4, rtol=1e-4)
    if tokens:
        assert torch.equal(new_tokens(model, inputs), oracle_tokens(twin, inputs, **options))
