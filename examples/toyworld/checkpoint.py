"""A LLaVA-OneVision of any size with random weights, and the folder layout of a real checkpoint.

    save_checkpoint("folder", build_model(TinySize(...), tokenizer), tokenizer, chat_template)
    -> folder/config.json, model.safetensors, generation_config.json, tokenizer.json, tokenizer_config.json,
       chat_template.jinja, processor_config.json, preprocessor_config.json, video_preprocessor_config.json

Every class is transformers' own, and every file is read back by the code that reads a real one.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)


@dataclass(frozen=True)
class TinySize:
    """What decides how much work the model is: image and patch in pixels, the rest in layers and channels."""

    image: int
    patch: int
    vision_layers: int
    vision_width: int
    text_layers: int
    text_width: int


def save_checkpoint(
    folder: str | Path,
    model: LlavaOnevisionForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    chat_template: str,
    *,
    frames: int | None = None,
) -> Path:
    """Save a model, its tokenizer and the settings of its processor in ``folder``, which is made when missing.

    ``frames``: how many the videos have that the model is made for, if the checkpoint is to say so.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    _name_as_published(folder / "model.safetensors")
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    vision: Any = model.config.vision_config
    for name, settings in _processor_files(vision.image_size, vision.patch_size, frames).items():
        (folder / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return folder


def _name_as_published(file: Path) -> None:
    """transformers from 5.24 on saves vision_tower.x and reads that and vision_tower.vision_model.x, which published
    checkpoints have; other readers, such as vLLM's, know the published names alone."""
    old, new = "vision_tower.", "vision_tower.vision_model."
    weights = load_file(file)
    named = {name if new in name else name.replace(old, new, 1): weight for name, weight in weights.items()}
    save_file(named, file, metadata={"format": "pt"})


def build_model(
    size: TinySize, tokenizer: PreTrainedTokenizerFast, *, seed: int = 0
) -> LlavaOnevisionForConditionalGeneration:
    """The model with random weights that are the same in every run."""
    vision = SiglipVisionConfig(
        hidden_size=size.vision_width,
        intermediate_size=4 * size.vision_width,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_width // 32,
        image_size=size.image,
        patch_size=size.patch,
        vision_use_head=False,
    )
    return random_model(vision, tokenizer, size.text_width, size.text_layers, seed)


def random_model(
    vision: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast, text_width: int, text_layers: int, seed: int
) -> LlavaOnevisionForConditionalGeneration:
    """A small Qwen2 behind any vision encoder, whose last layer it takes, without a class token."""
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=text_width,
        intermediate_size=4 * text_width,
        num_hidden_layers=text_layers,
        num_attention_heads=text_width // 32,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        initializer_range=0.08,  # the usual 0.02 is for models ten times as wide
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    ids = tokenizer.get_vocab()
    image: int = vision.image_size
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=[[image, image], [image, 2 * image]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full" if isinstance(vision, SiglipVisionConfig) else "default",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaOnevisionForConditionalGeneration(config).eval()


def _processor_files(image: int, patch: int, frames: int | None) -> dict[str, dict[str, Any]]:
    pixels: dict[str, Any] = {
        "do_resize": True,
        "size": {"height": image, "width": image},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    grid = [[image, image], [image, 2 * image]]
    return {
        "processor_config.json": {
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": (image // patch) ** 2,
            "vision_feature_select_strategy": "full",
            "image_token": "<image>",
            "video_token": "<video>",
        },
        "preprocessor_config.json": {
            "processor_class": "LlavaOnevisionProcessor",
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "image_grid_pinpoints": grid,
            **pixels,
        },
        "video_preprocessor_config.json": {
            "processor_class": "LlavaOnevisionProcessor",
            "video_processor_type": "LlavaOnevisionVideoProcessor",
            **pixels,
            **({} if frames is None else {"num_frames": frames}),
        },
    }
