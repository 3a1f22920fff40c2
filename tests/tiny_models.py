"""A LLaVA-OneVision, a LLaVA-NeXT-Video and a Video-LLaVA small enough to run in milliseconds, and videos they can
tell apart.

The weights are random but scaled so that what is in the video reaches the logits: with transformers' own tiny
initialisation every video gives nearly the same ones, and a test comparing logits would compare nothing.

    model = tiny_llava_onevision(vision_layers=6)
    logits = model(**video_inputs(model, frames=16)).logits
"""

from collections.abc import Sequence
from inspect import signature

import torch
from scenes import spread, standing_camera, video
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

TinyModel = (
    LlavaOnevisionForConditionalGeneration | LlavaNextVideoForConditionalGeneration | VideoLlavaForConditionalGeneration
)
PAD = 0
FIRST_TEXT_TOKEN = 3  # smaller ids are left for padding and the like; the last two are the placeholders


def tiny_llava_onevision(
    vision_layers: int = 6,
    vision_hidden: int = 32,
    vision_heads: int = 4,
    image_size: int = 24,
    patch_size: int = 4,
    text_layers: int = 2,
    text_hidden: int = 48,
    text_heads: int = 4,
    text_kv_heads: int = 2,
    vocab: int = 120,
    seed: int = 0,
    attn_implementation: str = "sdpa",
    vision_feature_layer: int | list[int] = -1,
    vision_intermediate: int | None = None,
    text_intermediate: int | None = None,
    dtype: torch.dtype = torch.float32,
    tower: PreTrainedConfig | None = None,
) -> LlavaOnevisionForConditionalGeneration:
    """A fresh model in eval mode; the same seed gives the same weights. Global generators stay put.

    ``tower``: of a vision tower with a class token, which goes no further, in the place of SigLIP."""
    vision = tower or SiglipVisionConfig(
        hidden_size=vision_hidden,
        intermediate_size=vision_intermediate or 2 * vision_hidden,
        num_hidden_layers=vision_layers,
        num_attention_heads=vision_heads,
        image_size=image_size,
        patch_size=patch_size,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=vocab,
        hidden_size=text_hidden,
        intermediate_size=text_intermediate or 2 * text_hidden,
        num_hidden_layers=text_layers,
        num_attention_heads=text_heads,
        num_key_value_heads=text_kv_heads,
        max_position_embeddings=8192,
    )
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=vocab - 2,
        video_token_index=vocab - 1,
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy="default" if tower else "full",
        image_grid_pinpoints=[
            [image_size, image_size],
            [image_size, 2 * image_size],
            [2 * image_size, image_size],
        ],
        attn_implementation=attn_implementation,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaOnevisionForConditionalGeneration(config).eval()
        spread(model)
    return model.to(dtype)


def tiny_llava_next_video(
    vision_layers: int = 5,
    image_size: int = 24,
    patch_size: int = 4,
    pooling: str = "average",
    stride: int = 2,
    text_layers: int = 1,
    vocab: int = 120,
    seed: int = 0,
) -> LlavaNextVideoForConditionalGeneration:
    """The same for LLaVA-NeXT-Video: a CLIP tower, of which the last layer and the class token are not used."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    vision = CLIPVisionConfig(
        num_hidden_layers=vision_layers, image_size=image_size, patch_size=patch_size, projection_dim=32, **sizes
    )
    ends = {"bos_token_id": None, "eos_token_id": None}
    text = LlamaConfig(vocab_size=vocab, num_hidden_layers=text_layers, num_key_value_heads=2, **sizes, **ends)
    config = LlavaNextVideoConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=vocab - 2,
        video_token_index=vocab - 1,
        spatial_pool_mode=pooling,
        spatial_pool_stride=stride,
        image_grid_pinpoints=[[image_size, image_size], [image_size, 2 * image_size], [2 * image_size, image_size]],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaNextVideoForConditionalGeneration(config).eval()
        spread(model)
    return model


def tiny_video_llava(
    vision_layers: int = 5,
    image_size: int = 24,
    patch_size: int = 4,
    text_layers: int = 1,
    vocab: int = 120,
    vision_feature_layer: int | list[int] = -2,
    seed: int = 0,
) -> VideoLlavaForConditionalGeneration:
    """The same for Video-LLaVA: two CLIP towers, of whose features those of videos keep the class token."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    vision = CLIPVisionConfig(
        num_hidden_layers=vision_layers, image_size=image_size, patch_size=patch_size, projection_dim=32, **sizes
    )
    ends = {"bos_token_id": None, "eos_token_id": None}
    text = LlamaConfig(
        vocab_size=vocab,
        num_hidden_layers=text_layers,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        **{**sizes, "hidden_size": 64},
        **ends,
    )
    config = VideoLlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=vocab - 2,
        video_token_index=vocab - 1,
        vision_feature_layer=vision_feature_layer,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VideoLlavaForConditionalGeneration(config).eval()
        spread(model)
    return model


def tokens_per_frame(model: TinyModel) -> int:
    """Tokens of one frame after the model's 2-D pooling; Video-LLaVA has none, and a class token."""
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    if isinstance(model, VideoLlavaForConditionalGeneration):
        return 1 + side**2
    stride = getattr(model.config, "spatial_pool_stride", None)
    return (-(-side // 2) if stride is None else side // stride) ** 2


def rows_of(model: TinyModel, frames: int) -> int:
    """Placeholders of one video: LLaVA-OneVision has a newline behind it."""
    return frames * tokens_per_frame(model) + isinstance(model, LlavaOnevisionForConditionalGeneration)


def video_inputs(
    model: TinyModel,
    frames: int,
    *,
    videos_per_row: Sequence[int] = (1,),
    before: int | Sequence[int] = 3,
    between: int = 1,
    after: int | Sequence[int] = 4,
    left_padding: int | Sequence[int] = 0,
    images_per_row: Sequence[int] | None = None,
    scenes: int | None = None,
    drift: float = 0.25,
    static: bool = False,
    changing: float | None = None,
    seed: int = 1,
) -> dict[str, Tensor]:
    """What a processor would give: ``input_ids``, ``attention_mask``, ``pixel_values_videos [V,F,3,H,W]``.

    A row is ``before`` text tokens, its images, its videos with ``between`` text tokens between two of them,
    and ``after`` text tokens. Shorter rows are padded on the left; ``left_padding`` adds more. ``before``,
    ``after`` and ``left_padding`` are one number, or one a row. With ``images_per_row`` come ``pixel_values``
    and, where the model takes them, ``image_sizes``. Rows may be without videos; without any video there are
    no ``pixel_values_videos``. With ``changing``, the camera stands, and this share of the patches changes from
    frame to frame.
    """
    config, rows = model.config, len(videos_per_row)
    size = config.vision_config.image_size
    generator = torch.Generator().manual_seed(seed)
    before, after, left_padding = (_per_row(n, rows) for n in (before, after, left_padding))
    images = _images(model, images_per_row or [0] * rows, generator)
    image_lengths = iter(images.pop("lengths", []))
    placeholders = [config.video_token_id] * rows_of(model, frames)

    def text(count: int) -> list[int]:
        high = config.text_config.vocab_size - 2
        return torch.randint(FIRST_TEXT_TOKEN, high, (count,), generator=generator).tolist()

    sequences = []
    for row in range(rows):
        ids = text(before[row])
        for _ in range((images_per_row or [0] * rows)[row]):
            ids += [config.image_token_id] * next(image_lengths)
        for nth in range(videos_per_row[row]):
            ids += (text(between) if nth else []) + placeholders
        sequences.append(ids + text(after[row]))
    length = max(pad + len(ids) for pad, ids in zip(left_padding, sequences, strict=True))
    inputs = {
        "input_ids": torch.tensor([[PAD] * (length - len(ids)) + ids for ids in sequences]),
        "attention_mask": torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in sequences]),
        **images,
    }
    if sum(videos_per_row):
        if changing is None:
            draw, kinds = video, {"scenes": scenes, "drift": drift, "static": static}
        else:
            draw, kinds = standing_camera, {"patch": config.vision_config.patch_size, "changing": changing}
        videos = [draw(frames, size, **kinds, generator=generator) for _ in range(sum(videos_per_row))]
        inputs["pixel_values_videos"] = torch.stack(videos).to(model.dtype)
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def _per_row(count: int | Sequence[int], rows: int) -> list[int]:
    return [count] * rows if isinstance(count, int) else list(count)


def image_argument(model: TinyModel) -> str:
    """What ``forward()`` calls the pixels of images; Video-LLaVA of transformers before 5.23 has a name of its own."""
    return next(n for n in ("pixel_values", "pixel_values_images") if n in signature(model.forward).parameters)


def _images(model, images_per_row: Sequence[int], generator: torch.Generator) -> dict:
    """Square pictures of one tile (and its overview), and how many placeholders the model wants for each."""
    count, size = sum(images_per_row), model.config.vision_config.image_size
    if not count:
        return {}
    if isinstance(model, VideoLlavaForConditionalGeneration):
        pixels = torch.randn(count, 3, size, size, generator=generator).to(model.dtype)
        return {image_argument(model): pixels, "lengths": [tokens_per_frame(model) - 1] * count}
    pixels = torch.randn(count, 2, 3, size, size, generator=generator).to(model.dtype)
    sizes = torch.tensor([[size, size]] * count)
    with torch.no_grad():
        features = model.model.get_image_features(
            pixels.to(model.device), sizes.to(model.device), return_dict=True
        ).pooler_output
    return {"pixel_values": pixels, "image_sizes": sizes, "lengths": [len(f) for f in features]}
