"""LLaVA's own model, small enough to run in a second, with random weights that tell videos apart.

    model = tiny_llava(newline="grid", pool="average")
    model.generate(prompt(3, 1, 4), images=[clip(8)], modalities=["video"])

A test module that imports this is skipped, with the reason, where LLaVA's code is not: it is looked for as an
installed package, and in the folder ``LLAVA_SRC`` (a clone of LLaVA-VL/LLaVA-NeXT).
"""

import contextlib
import importlib.util
import io
import os
import sys

import pytest
import torch
import transformers
from scenes import spread
from torch import nn
from torch.torch_version import TorchVersion

OLDEST, FIRST_THAT_FAILS = "4.46", "4.56"
SIDE, PATCH = 54, 2
"""27 patches a side, since the tower asserts 729 tokens."""
VOCABULARY = 120


def _why_not() -> str | None:
    """Why LLaVA's code cannot run here; None if it can."""
    if not OLDEST <= TorchVersion(transformers.__version__) < FIRST_THAT_FAILS:
        installed = transformers.__version__
        return f"llava needs transformers >={OLDEST},<{FIRST_THAT_FAILS}; {installed} is installed (make test-llava)"
    source = os.environ.get("LLAVA_SRC")
    if source and source not in sys.path:
        sys.path.append(source)
    found = importlib.util.find_spec("llava")
    # The folder of these tests has the same name, and passes for a namespace package.
    if found is None or found.origin is None:
        return "llava is not installed: clone LLaVA-VL/LLaVA-NeXT and say where, LLAVA_SRC=path (make test-llava)"
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # its __init__ prints what it could not import, and goes on
        try:
            importlib.import_module("llava.model.language_model.llava_qwen")
        except ImportError as error:
            return f"llava cannot be imported: {error}. {said.getvalue()}"
    return None


if reason := _why_not():
    pytest.skip(reason, allow_module_level=True)

from llava.model import llava_arch  # noqa: E402, F401
from llava.model.language_model import llava_qwen  # noqa: E402
from llava.model.multimodal_encoder.siglip_encoder import SigLipVisionConfig, SigLipVisionModel  # noqa: E402


def tiny_llava(
    *,
    newline: str = "one_token",
    pool: str = "bilinear",
    merge: str = "spatial_unpad",
    vision_layers: int = 4,
    vision_hidden: int = 32,
    text_layers: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **config,
) -> llava_qwen.LlavaQwenForCausalLM:
    """A fresh model in eval mode; the same seed gives the same weights, whatever the options of newlines and pooling.

    ``vision_layers``: those that are left when the tower has dropped its last. ``config``: more of LLaVA's options."""
    text = llava_config(
        vision_hidden,
        mm_patch_merge_type=merge,
        mm_spatial_pool_mode=pool,
        mm_newline_position=newline,
        num_hidden_layers=text_layers,
        **config,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = llava_qwen.LlavaQwenForCausalLM(text).eval()
        load_tower(model.get_vision_tower(), tower_config(vision_layers, vision_hidden))
        spread(model)
    return model.to(dtype)


def llava_config(vision_hidden: int, **config) -> llava_qwen.LlavaQwenConfig:
    """A small Qwen2 and LLaVA's options; ``config`` goes before them."""
    options = {
        "mm_vision_tower": "tiny/siglip-54-patch2",  # "siglip" decides which tower it is, and no such path may exist
        "delay_load": True,
        "mm_hidden_size": vision_hidden,
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_spatial_pool_mode": "bilinear",
        "mm_newline_position": "one_token",
        "image_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]],
        "add_faster_video": False,
        "tokenizer_model_max_length": 8192,
        "tokenizer_padding_side": "right",
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
    }
    return llava_qwen.LlavaQwenConfig(**{**options, **config})


def tower_config(layers: int, hidden: int, side: int = SIDE, patch: int = PATCH) -> SigLipVisionConfig:
    """``layers`` are left when the last one has been dropped."""
    return SigLipVisionConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers + 1,
        num_attention_heads=2,
        image_size=side,
        patch_size=patch,
    )


def load_tower(tower: nn.Module, config: SigLipVisionConfig) -> None:
    """What its ``load_model()`` does, with random weights."""
    tower.config = config
    tower.vision_tower = SigLipVisionModel(tower.config).eval()
    del tower.vision_tower.vision_model.encoder.layers[-1:]
    tower.vision_tower.vision_model.head = nn.Identity()
    tower.vision_tower.requires_grad_(False)
    tower.is_loaded = True
