"""A checkpoint of LLaVA's own code as its loader wants it: a folder, and the vision tower in a cache of the hub.

    HF_HUB_CACHE=hub HF_HUB_OFFLINE=1     # the tower's name must not be a path, so it is looked up

By hand, in the environment of ``make test-llava``, with LLAVA_SRC and PYTHONPATH=tests:tests/llava:
python -c 'from pathlib import Path; from llava_checkpoint import *; write_llava_checkpoint(Path("tiny"), Path("hub"))'
"""

from pathlib import Path

import torch
from scenes import spread
from tiny_checkpoint import build_tokenizer
from tiny_llava import SigLipVisionModel, llava_config, llava_qwen, load_tower, tower_config

TOWER, SIZE = "tiny/siglip-so400m-patch14-384", (384, 14)
"""The size that its image processor makes, and 27 patches a side."""


def write_llava_checkpoint(folder: Path, hub: Path, *, layers: int = 4, hidden: int = 32, **config: object) -> Path:
    """Random weights, tokenizer included; ``layers`` of the tower are left when its last one is dropped. ``config``:
    LLaVA's options."""
    tokenizer = build_tokenizer()
    tower = tower_config(layers, hidden, *SIZE)
    revision = hub / f"models--{TOWER.replace('/', '--')}" / "snapshots" / "0"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        SigLipVisionModel(tower).save_pretrained(revision)  # its weights come with the checkpoint once more
        options = {"mm_vision_tower": TOWER, **config, "vocab_size": len(tokenizer)}
        model = llava_qwen.LlavaQwenForCausalLM(llava_config(hidden, **options))
        load_tower(model.get_vision_tower(), tower)
        spread(model)
    (revision.parents[1] / "refs").mkdir()
    (revision.parents[1] / "refs" / "main").write_text("0")
    model.config.mm_tunable_parts = "mm_vision_tower,mm_mlp_adapter,mm_language_model"  # what real ones say
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
