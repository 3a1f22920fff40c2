"""The toy world's trained checkpoint with the weight names of published ones, which vLLM's own tower wants."""

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

import earlytom_compile.toyworld

TRAINED = Path(earlytom_compile.toyworld.__path__[0]) / "weights"


def with_published_names(folder: Path) -> Path:
    """A copy of the trained checkpoint in ``folder``. transformers from 5.24 on saves vision_tower.x, published
    checkpoints have vision_tower.vision_model.x."""
    shutil.copytree(TRAINED, folder, dirs_exist_ok=True)
    weights = load_file(TRAINED / "model.safetensors")
    named = {_published(name): weight for name, weight in weights.items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _published(name: str) -> str:
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1) if name.startswith("vision_tower.") else name
