"""Weights, a video and what is left of it in transformers' LLaVA-OneVision, for a test of LLaVA's own code.

    python tests/llava/onevision_rows.py      # with transformers 5.17 or newer; writes build/onevision_rows.safetensors

No environment holds both models, since LLaVA's code needs transformers older than 4.56. The file has ``weights.*`` by
LLaVA's names, ``pixels`` [F, 3, 54, 54], ``ids`` [1, S] with one -200, and for each variant ``rows.*`` [K + 1, C] and
``logits.*`` [vocabulary] of the last position.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

TESTS = Path(__file__).resolve().parents[1]
FILE = TESTS.parent / "build" / "onevision_rows.safetensors"
OPTIONS = {"variant": "paper", "merge_layers": (0, 2), "reuse": False, "tau_seg": 0.3, "retain_ratio": 0.2}
VARIANTS = ("paper", "released", "plus")

# What transformers calls a part of the model, and LLaVA.
_NAMES = {
    "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "model.language_model.": "model.",
}


def name_in_llava(name: str) -> str:
    """LLaVA's name of a weight of transformers' LLaVA-OneVision."""
    for theirs, llavas in _NAMES.items():
        if name.startswith(theirs):
            return llavas + name.removeprefix(theirs)
    return name  # lm_head and image_newline


@torch.no_grad()
def write(file: Path) -> None:
    """Make the model, compress the video, write all of it."""
    sys.path.insert(0, str(TESTS))
    from scenes import video
    from tiny_models import tiny_llava_onevision

    import earlytom_compile

    model = tiny_llava_onevision(
        vision_layers=4, vision_heads=2, image_size=54, patch_size=2, text_layers=1, text_hidden=48, vocab=120
    )
    tensors = {f"weights.{name_in_llava(name)}": weight.clone() for name, weight in model.state_dict().items()}
    pixels = video(8, 54, scenes=3, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[5, 6, 7, -200, 9, 11]])
    for variant in VARIANTS:
        earlytom_compile.compile(model, lowering="eager", strict=True, **{**OPTIONS, "variant": variant})
        (rows,) = earlytom_compile.encode_videos(model, pixels[None])
        prompt = torch.where(ids == -200, model.config.video_token_id, ids)
        logits = model(input_ids=prompt, pixel_values_videos=[rows]).logits[0, -1]
        tensors |= {f"rows.{variant}": rows, f"logits.{variant}": logits}
    file.parent.mkdir(exist_ok=True)
    save_file({**tensors, "pixels": pixels, "ids": ids}, file)


if __name__ == "__main__":
    write(FILE)
