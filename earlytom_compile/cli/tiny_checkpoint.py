"""A LLaVA-OneVision small enough to build on the spot, saved in the layout of a real checkpoint.

    write_checkpoint("tiny")
    -> tiny/config.json, model.safetensors, generation_config.json, tokenizer.json, tokenizer_config.json,
       chat_template.jinja, processor_config.json, preprocessor_config.json, video_preprocessor_config.json

Every class is transformers' own and every file is read back by the code that reads a real one; only the
weights are random (always the same ones), so its answers mean nothing.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

# In order of their ids, from 0 on.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")

# One turn per message: visual placeholders first, then the text.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% for part in message.content if part.type in ("image", "video") %}<{{ part.type }}>
{% endfor %}
{%- for part in message.content if part.type == "text" %}{{ part.text }}{% endfor %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""

# What the tokenizer learns its merges from. Bytes it has never seen stay bytes, so any prompt can be encoded.
_CORPUS = (
    "the square moves right and the circle moves left across the dark screen",
    "a red square , a green circle and a blue bar stand still for two seconds",
    "then the scene is cut to a bright screen where the bar falls slowly",
    "what happens in the video ? first the circle grows , then it stops",
    "describe the shapes , their colours and how they move before and after the cut",
)


@dataclass(frozen=True)
class TinySize:
    """What decides how much work the model is: image and patch in pixels, the rest in layers and channels.

    Ten vision layers are the fewest that get three merge layers by default. With 32 frames a quarter of the
    multiply-adds is the vision encoder's: between the 7B checkpoint (a sixth) and the 0.5B (three quarters).
    """

    image: int = 224
    patch: int = 16
    vision_layers: int = 10
    vision_width: int = 128
    text_layers: int = 8
    text_width: int = 384
    initializer_range: float = 0.08  # with the usual 0.02 every video would get the same answer


def write_checkpoint(folder: str | Path, size: TinySize | None = None, *, seed: int = 0) -> Path:
    """Build the model and its tokenizer and save both in ``folder``, which is made when missing."""
    tokenizer = build_tokenizer()
    model = build_model(size or TinySize(), tokenizer, seed=seed)
    model.generation_config.suppress_tokens = _not_words(tokenizer)
    return save_checkpoint(folder, model, tokenizer, CHAT_TEMPLATE)


def save_checkpoint(
    folder: str | Path,
    model: LlavaOnevisionForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    chat_template: str,
) -> Path:
    """Save a model, its tokenizer and the settings of its processor in ``folder``, which is made when missing."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    vision: Any = model.config.vision_config
    for name, settings in _processor_files(vision.image_size, vision.patch_size).items():
        (folder / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return folder


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with LLaVA-OneVision's special tokens, trained on a handful of sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<image>", "<video>"],
        padding_side="left",
    )


def _not_words(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids of bytes, parts of words and special tokens, which random weights would say as readily as words."""
    words = {"\u0120" + word for sentence in _CORPUS for word in sentence.split()}  # U+0120: a space
    return [i for token, i in tokenizer.get_vocab().items() if token not in words]


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
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=size.text_width,
        intermediate_size=4 * size.text_width,
        num_hidden_layers=size.text_layers,
        num_attention_heads=size.text_width // 32,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        initializer_range=size.initializer_range,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=SPECIAL_TOKENS.index("<image>"),
        video_token_index=SPECIAL_TOKENS.index("<video>"),
        image_grid_pinpoints=[[size.image, size.image], [size.image, 2 * size.image]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaOnevisionForConditionalGeneration(config).eval()


def _processor_files(image: int, patch: int) -> dict[str, dict[str, Any]]:
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
        },
    }
