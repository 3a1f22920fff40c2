"""What the eager oracle knows of a model's vision path: which layers run, and how patches become tokens.

layers_in_use(model)                     # those that feed the hidden states the model selects
tokens_of(model, hidden)                 # [N, S, D] -> [N, P, C], by the model's own projector and pooling
pool_importance(model, importance)       # [N, S] -> [N, P], likewise
"""

import math
from typing import Any

import torch
from oracle_reuse import ReusingEncoder
from torch import Tensor, nn
from torch.nn import functional as F


def tower_of(model) -> nn.Module:
    """The vision tower of videos; Video-LLaVA has another for images."""
    inner = model.model
    return inner.video_tower if hasattr(inner, "video_tower") else inner.vision_tower


def first_taken(model) -> int:
    """The first of a frame's places that goes on: that behind the class token, but for Video-LLaVA's videos."""
    return int(model.config.vision_feature_select_strategy == "default" and not hasattr(model.model, "video_tower"))


def _layers(model) -> nn.ModuleList:
    """The layers of the vision tower, which are called ``layer`` in DINOv2."""
    lists = (getattr(module, name, None) for module in tower_of(model).modules() for name in ("layers", "layer"))
    return next(layers for layers in lists if isinstance(layers, nn.ModuleList))


def layers_behind(model) -> list[int]:
    """How many layers each of the hidden states that the model selects has gone through."""
    selected, total = model.config.vision_feature_layer, len(_layers(model))
    chosen = [selected] if isinstance(selected, int) else list(selected)
    return [count if count >= 0 else total + 1 + count for count in chosen]


def tokens_of(model, hidden: Tensor) -> Tensor:
    """``[N, S, D] -> [N, P, C]``: projector and pooling, in the order of the model."""
    inner = model.model
    if hasattr(inner, "vision_resampler"):
        return inner.multi_modal_projector(inner.vision_resampler(hidden))
    if hasattr(inner, "video_tower"):
        return inner.multi_modal_projector(hidden)
    return inner.apply_pooling(inner.multi_modal_projector(hidden))


def layers_in_use(model) -> nn.ModuleList:
    """The encoder layers that feed the hidden states the model selects; hidden state k leaves layer k - 1."""
    return _layers(model)[: max(layers_behind(model))]


def pool_importance(model, importance: Tensor) -> Tensor:
    """``[N, S] -> [N, P]``, as the model pools its features: LLaVA-OneVision's are bilinear to half the side (rounded
    up); where a convolution pools, importance is the mean of what makes a token; Video-LLaVA's are not pooled."""
    if hasattr(model.model, "video_tower"):
        return importance
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    half = math.ceil(side / 2)
    grid = importance.view(len(importance), 1, side, side)
    if hasattr(model.model, "vision_resampler"):
        pool = F.max_pool2d if model.config.spatial_pool_mode == "max" else F.avg_pool2d
        return pool(grid, model.config.spatial_pool_stride).flatten(1)
    return F.interpolate(grid, size=(half, half), mode="bilinear").flatten(1)


def features_and_importance(model, encoder: Any) -> tuple[Tensor, Tensor]:
    """Of an encoder that has run: features ``[N, P, C]``, and the importance ``[N, S]`` of the places that go on."""
    hidden = torch.cat([encoder.outputs[count - 1] for count in layers_behind(model)], dim=-1)
    return tokens_of(model, hidden[:, first_taken(model) :]), encoder.importance[:, first_taken(model) :]


def seen_by_method(model, pixels: Tensor, options: Any) -> tuple[ReusingEncoder, Tensor, Tensor, Tensor]:
    """Of one video ``[F, C, H, W]``, where no frames merge: the encoder, features ``[F, P, C]``, and of its
    ``scored_layer`` the attention received ``[F, P]`` and the keys ``[F, P, d]``. ``options``: those of the oracle."""
    layers = layers_in_use(model)
    encoder = ReusingEncoder(
        layers,
        pixels,
        model.config.vision_config.patch_size,
        tau_reuse=options.tau_reuse,
        full_layers=options.full_layers if options.reuse else range(len(layers)),
        encode_ratio=options.encode_ratio if options.reuse else None,
        importance_layer=range(len(layers))[options.scored_layer],
    )
    with encoder.hooked():
        tower_of(model)(pixels)
    features, importance = features_and_importance(model, encoder)
    channels = encoder.keys[:, first_taken(model) :].unbind(-1)
    keys = torch.stack([pool_importance(model, channel.contiguous()) for channel in channels], dim=-1)
    return encoder, features, pool_importance(model, importance.contiguous()), keys
