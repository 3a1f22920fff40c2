"""A model with the seams of LLaVA's own code, written from a description of them, for where that code is not.

    model = handwritten_llava(newline="grid", pool="average")
    model.generate(ids, images=[pixels [F, 3, 28, 28]], modalities=["video"])

Same are: the names and signatures of methods, the order of arguments and of what is returned, how ``images`` and
``modalities`` belong together, one placeholder (-200) for each, newlines, padding, labels. The module that the class
says it is of is LLaVA's, by which its family knows it; it runs on the transformers that is installed.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace

import torch
from scenes import spread
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model

SIDE, PATCH, WIDTH = 28, 4, 32
PLACEHOLDER, IGNORED = -200, -100


class Attention(nn.Module):
    """Two matrix products and a softmax between them, as SigLIP has it there."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, WIDTH // heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        frames, tokens, _ = x.size()
        query, key, value = (
            project(x).view(frames, tokens, self.num_heads, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        weights = torch.matmul(query, key.transpose(2, 3)) * self.head_dim**-0.5
        weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
        return self.out_proj(torch.matmul(weights, value).transpose(1, 2).reshape(frames, tokens, WIDTH))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.self_attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Tower(nn.Module):
    """[N, 3, 28, 28] -> [N, 49, C]: seven patches a side, which is odd as LLaVA's 27."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(image_size=SIDE, patch_size=PATCH, hidden_size=WIDTH)
        self.patch_embedding = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.position_embedding = nn.Parameter(torch.empty((SIDE // PATCH) ** 2, WIDTH))
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.is_loaded = True
        self.image_size = SIDE
        self.num_patches_per_side = SIDE // PATCH
        self.num_patches = self.num_patches_per_side**2

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embedding(images).flatten(2).transpose(1, 2) + self.position_embedding
        for layer in self.layers:
            x = layer(x)
        return x


class WithTower(Qwen2Model):
    """The language model, which has the vision tower among its modules."""

    def __init__(self, config: Qwen2Config, layers: int) -> None:
        super().__init__(config)
        self.vision_tower = Tower(layers)
        self.mm_projector = nn.Sequential(
            nn.Linear(WIDTH, config.hidden_size), nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)
        )
        if "unpad" in config.mm_patch_merge_type:
            self.image_newline = nn.Parameter(torch.empty(config.hidden_size))

    def get_vision_tower(self) -> Tower:
        return self.vision_tower


class LlavaQwenForCausalLM(Qwen2ForCausalLM):
    __module__ = "llava.model.language_model.llava_qwen"

    def __init__(self, config: Qwen2Config, layers: int) -> None:
        super().__init__(config)
        self.model = WithTower(config, layers)

    def get_model(self) -> WithTower:
        return self.model

    def get_vision_tower(self) -> Tower:
        return self.get_model().get_vision_tower()

    def encode_images(self, images: Tensor) -> Tensor:
        return self.get_model().mm_projector(self.get_vision_tower()(images))

    def get_2dPool(self, image_feature: Tensor, stride: int = 2) -> Tensor:
        """[N, P, C] -> [N, P', C]"""
        side, mode = self.get_vision_tower().num_patches_per_side, self.config.mm_spatial_pool_mode
        grid = image_feature.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        if mode == "bilinear":
            grid = F.interpolate(grid, size=(math.ceil(side / stride),) * 2, mode="bilinear")
        elif mode in ("average", "max"):
            grid = (F.avg_pool2d if mode == "average" else F.max_pool2d)(grid, stride)
        else:
            raise ValueError(f"Unexpected mm_spatial_pool_mode: {mode}")
        return grid.flatten(2).transpose(1, 2)

    def _video_rows(self, features: Tensor) -> Tensor:
        """[F, P, C] -> [N, C], newlines included."""
        merge, position = self.config.mm_patch_merge_type, self.config.mm_newline_position
        if merge == "flat":
            return features.flatten(0, 1)
        if position not in ("one_token", "no_token", "frame", "grid"):
            raise ValueError(f"Unexpected mm_newline_position: {position}")
        if position == "no_token" or (position == "one_token" and "unpad" not in merge):
            return features.flatten(0, 1)
        side = math.isqrt(features.shape[1])
        lines = {"one_token": 1, "frame": len(features), "grid": len(features) * side}[position]
        lined = features.reshape(lines, -1, features.shape[-1])
        newline = self.get_model().image_newline.expand(lines, 1, -1)
        return torch.cat((lined, newline), dim=1).flatten(0, 1)

    def _picture_rows(self, features: Tensor) -> Tensor:
        """[n, P, C] -> [N, C]: an overview and crops, or a picture alone."""
        rows = features.flatten(0, 1)
        if "unpad" in self.config.mm_patch_merge_type:
            rows = torch.cat((rows, self.get_model().image_newline[None]))
        return rows

    def _rows(self, images, modalities) -> list[Tensor]:
        """Of each of ``images``; those without a modality are pictures."""
        rows = []
        for place, image in enumerate(images):
            features = self.encode_images(image[None] if image.dim() == 3 else image)
            if place < len(modalities) and modalities[place] == "video":
                rows.append(self._video_rows(self.get_2dPool(features)))
            else:
                rows.append(self._picture_rows(features))
        return rows

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids,
        position_ids,
        attention_mask,
        past_key_values,
        labels,
        images,
        modalities=("image",),
        image_sizes=None,
    ):
        """(None, positions, mask, cache, embeddings, labels); what came in where there is nothing to put in."""
        if images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        modalities = [modalities] if isinstance(modalities, str) else modalities
        several = isinstance(images, list) or images.dim() == 5
        waiting = iter(self._rows(images, modalities) if several else self.encode_images(images))
        limit = self.config.tokenizer_model_max_length
        rows, new_labels = [], []
        for row in range(len(input_ids)):
            seen = slice(None) if attention_mask is None else attention_mask[row].bool()
            known = torch.full_like(input_ids[row], IGNORED) if labels is None else labels[row]
            embeds, told = _put_in(self.get_model().embed_tokens, input_ids[row][seen], known[seen], waiting)
            rows.append(embeds[:limit].to(self.device))
            new_labels.append(told[:limit])
        left = self.config.tokenizer_padding_side == "left"
        counted = [torch.arange(len(row), device=self.device) for row in rows]
        ones = [torch.ones_like(each) for each in counted]
        return (
            None,
            None if position_ids is None else _pad(counted, 0, left),
            None if attention_mask is None else _pad(ones, 0, left).to(attention_mask.dtype),
            past_key_values,
            _pad(rows, 0, left),
            None if labels is None else _pad(new_labels, IGNORED, left),
        )

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        images=None,
        image_sizes=None,
        modalities=("image",),
        **kwargs,
    ):
        if inputs_embeds is None:
            input_ids, position_ids, attention_mask, _, inputs_embeds, labels = (
                self.prepare_inputs_labels_for_multimodal(
                    input_ids, position_ids, attention_mask, None, labels, images, modalities, image_sizes
                )
            )
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            **kwargs,
        )

    @torch.no_grad()
    def generate(self, inputs=None, images=None, image_sizes=None, modalities=("image",), **kwargs):
        """New tokens alone."""
        if "inputs_embeds" in kwargs:
            raise NotImplementedError("`inputs_embeds` is not supported")
        positions, mask = kwargs.pop("position_ids", None), kwargs.pop("attention_mask", None)
        if images is None:
            embeds = self.get_model().embed_tokens(inputs)
        else:
            _, positions, mask, _, embeds, _ = self.prepare_inputs_labels_for_multimodal(
                inputs, positions, mask, None, None, images, modalities, image_sizes=image_sizes
            )
        return super().generate(position_ids=positions, attention_mask=mask, inputs_embeds=embeds, **kwargs)


def _put_in(words: Callable[[Tensor], Tensor], ids: Tensor, labels: Tensor, waiting) -> tuple[Tensor, Tensor]:
    """Words and rows of one prompt, and the labels of the words."""
    places = (ids == PLACEHOLDER).nonzero()[:, 0].tolist()
    if not places:
        next(waiting)  # a row without any passes over one
    embeds, told, start = [], [], 0
    for place in [*places, len(ids)]:
        embeds.append(words(ids[start:place]))
        told.append(labels[start:place])
        if place < len(ids):
            embeds.append(next(waiting))
            told.append(labels.new_full((len(embeds[-1]),), IGNORED))
        start = place + 1
    return torch.cat(embeds), torch.cat(told)


def _pad(rows: list[Tensor], value: int, left: bool) -> Tensor:
    length = max(len(row) for row in rows)
    gaps = [row.new_full((length - len(row), *row.shape[1:]), value) for row in rows]
    return torch.stack([torch.cat((gap, row) if left else (row, gap)) for gap, row in zip(gaps, rows, strict=True)])


def handwritten_llava(
    *,
    newline: str = "one_token",
    pool: str = "bilinear",
    merge: str = "spatial_unpad",
    layers: int = 4,
    text_layers: int = 1,
    seed: int = 0,
    **options,
) -> LlavaQwenForCausalLM:
    """A fresh model in eval mode; the same seed gives the same weights."""
    config = Qwen2Config(
        vocab_size=120,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=text_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    chosen = {"mm_newline_position": newline, "mm_spatial_pool_mode": pool, "mm_patch_merge_type": merge}
    chosen |= {"tokenizer_model_max_length": 8192, "tokenizer_padding_side": "right", "add_faster_video": False}
    for name, value in {**chosen, **options}.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaQwenForCausalLM(config, layers).eval()
        spread(model)
    return model
