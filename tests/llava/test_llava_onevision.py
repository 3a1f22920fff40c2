"""The same weights as transformers' LLaVA-OneVision and as LLaVA's own model: the same rows, the same logits."""

import pytest
import torch
from llava_calls import CLOSE, CLOSE_LOGITS
from onevision_rows import FILE, OPTIONS, VARIANTS
from safetensors.torch import load_file
from tiny_llava import tiny_llava

import earlytom_compile

pytestmark = pytest.mark.skipif(
    not FILE.exists(), reason=f"no {FILE.name}: tests/llava/onevision_rows.py writes it (make test-llava)"
)


@pytest.fixture(scope="module")
def written():
    return load_file(FILE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_and_logits_are_those_of_transformers(written, variant):
    model = tiny_llava(newline="one_token", pool="bilinear", merge="spatial_unpad")
    weights = {name.removeprefix("weights."): each for name, each in written.items() if name.startswith("weights.")}
    model.load_state_dict(weights)
    earlytom_compile.compile(model, lowering="eager", strict=True, **{**OPTIONS, "variant": variant})
    (rows,) = earlytom_compile.encode_videos(model, [written["pixels"]])
    torch.testing.assert_close(rows, written[f"rows.{variant}"], **CLOSE)
    with torch.no_grad():
        logits = model(written["ids"], images=[written["pixels"]], modalities=["video"]).logits[0, -1]
    torch.testing.assert_close(logits, written[f"logits.{variant}"], **CLOSE_LOGITS)
