"""The sizes of Qwen2.5-VL, Qwen3-VL and Qwen3.5, and how much work their parts are.

    shape = QwenShape.of_config(model.config).of_size(168, 280)      # pixels, as the processor resizes a picture
    shape.pictures, shape.frame_tokens, shape.pooled_tokens          # 2, 240, 60

A frame is a temporal patch: two pictures, whose h x w patches (a grid of any size, here 12 x 20) attend to each other,
or in most layers of Qwen2.5-VL to those of their window; 2x2 of them make a token. Where they differ:

==================  ===================  =================================  ==========================
\\                   Qwen2.5-VL           Qwen3-VL                           Qwen3.5
==================  ===================  =================================  ==========================
encoder attention   windows, some full   full                               full
encoder MLP         gated, 3 matrices    2 matrices                         2 matrices
merger              once                 and for each layer of DeepStack    once
language model      attention            attention                          3 of 4 layers are linear
==================  ===================  =================================  ==========================

In a mixture of experts each position goes through some of them.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .errors import EarlyTomConfigError
from .model_shape import PIXEL_CHANNELS, ModelShape

_MODEL_TYPES = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
STAMP_TOKENS = 7
"""Of a time stamp such as ``<12.5 seconds>``, whose digits are a token each."""
_CHUNK = 64  # positions that the gated delta rule takes at once
_TABLE_7_WINDOW = 64  # places, however large the picture is


def is_qwen(config: Any) -> bool:
    """Whether this is the configuration of a model that :class:`QwenShape` can be."""
    return getattr(config, "model_type", None) in _MODEL_TYPES


@dataclass(frozen=True, kw_only=True)
class LinearAttention:
    """Layers of the language model that keep a state in place of keys and values (gated delta rule)."""

    key_heads: int
    key_width: int
    value_heads: int
    value_width: int
    kernel: int
    full_layers: tuple[int, ...]
    """0-based layers with attention of the usual kind."""

    def products(self, tokens: float, width: int) -> float:
        """Multiply-adds of a layer: projections, a short convolution, and the delta rule chunk by chunk."""
        keys, values = self.key_heads * self.key_width, self.value_heads * self.value_width
        mixed = 2 * keys + values
        projections = width * (mixed + 2 * values + 2 * self.value_heads)  # gate and output; two numbers a head
        chunks = -(-tokens // _CHUNK)
        # Keys with keys, queries with keys, the triangle solved for values and keys, the result with new values; and
        # three products with the state.
        within = _CHUNK**2 * (2 * self.key_width + (self.key_width + self.value_width) / 2 + self.value_width)
        state = 3 * _CHUNK * self.key_width * self.value_width
        return tokens * (projections + mixed * self.kernel) + chunks * self.value_heads * (within + state)

    @property
    def state(self) -> int:
        """Numbers that a layer keeps, however long the prompt is."""
        keys, values = self.key_heads * self.key_width, self.value_heads * self.value_width
        return self.value_heads * self.key_width * self.value_width + (2 * keys + values) * self.kernel


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Layers of the language model whose MLP is a choice."""

    count: int
    chosen: int
    mlp: int
    shared_mlp: int = 0
    dense_layers: tuple[int, ...] = ()
    """0-based layers with an MLP of the usual kind."""

    def products(self, width: int) -> int:
        """Multiply-adds for one position: the choice, those chosen, and the one that is shared, with its gate."""
        shared = 3 * width * self.shared_mlp + width if self.shared_mlp else 0
        return width * self.count + self.chosen * 3 * width * self.mlp + shared


@dataclass(frozen=True, kw_only=True)
class QwenShape(ModelShape):
    """What decides how much work a video model of Qwen is, for pictures of one size."""

    model_type: str
    """``"qwen2_5_vl"``, ``"qwen3_vl"``, ``"qwen3_5"`` or the ``_moe`` of one of them."""
    frames: int = 768
    """Pictures, unless somebody says otherwise."""
    grid: tuple[int, int] = (12, 20)
    """Patches of a picture, height x width: 16:9 as 768 pictures in 24,576 tokens allow. No configuration says it."""
    merge: int = 2
    window: int | None = None
    """Places on a side of a window; None: all layers look at the whole frame."""
    gated: bool = False
    """Whether the encoder's MLP has three matrices."""
    deepstack: tuple[int, ...] = ()
    """0-based encoder layers whose features are merged too, for the first layers of the language model."""
    temporal: int = 2
    llm_head: int
    """Channels of a head of the language model; heads need not fill the width."""
    gated_queries: bool = False
    """Whether what attention gives is multiplied with as many numbers, made beside the queries."""
    linear: LinearAttention | None = None
    experts: Experts | None = None

    def of_size(self, height: int, width: int) -> "QwenShape":
        """For pictures of so many pixels; raises :class:`EarlyTomConfigError` where they are not whole tokens."""
        side = self.patch_size * self.merge
        if height % side or width % side or min(height, width) < side:
            raise EarlyTomConfigError(
                f"frame_size={height}x{width}: height and width must be multiples of {side} pixels, a token's side, as "
                "the model's processor resizes pictures."
            )
        return self.of_grid(height // self.patch_size, width // self.patch_size)

    def of_grid(self, height: int, width: int) -> "QwenShape":
        """For pictures of so many patches."""
        return dataclasses.replace(self, grid=(height, width))

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.grid[0] * self.patch_size, self.grid[1] * self.patch_size

    # --- What a frame is --------------------------------------------------------------------------------

    @property
    def pictures(self) -> int:
        """Of a temporal patch."""
        return self.temporal

    @property
    def frame_tokens(self) -> int:
        """S: patches of a temporal patch."""
        return self.grid[0] * self.grid[1]

    @property
    def pooled_tokens(self) -> int:
        """P: tokens of a temporal patch behind the merger."""
        return self.frame_tokens // self.merge**2

    def tokens_beside(self, frames: int) -> int:
        """Two marks around a video; or, for Qwen3 and later, around each frame, with a time stamp before it."""
        return 2 if self.model_type == "qwen2_5_vl" else (2 + STAMP_TOKENS) * frames

    # --- Multiply-adds that are done (protocol exact) -----------------------------------------------------

    def places_seen(self, layer: int) -> float:
        """All of the frame, or those of the window: smaller ones at the right and at the bottom look at fewer."""
        if self.window is None or layer in self.full_layers:
            return self.frame_tokens
        return _mean_window(self.grid[0], self.window) * _mean_window(self.grid[1], self.window)

    @property
    def vision_matrices(self) -> int:
        """Four square matrices, and an MLP of two or three."""
        return 4 * self.vision_width**2 + (3 if self.gated else 2) * self.vision_width * self.vision_mlp

    def projector(self, frames: Sequence[float]) -> float:
        """The merger, once for what leaves the encoder and once for each layer of DeepStack, whose features merge along
        with their frames before."""
        merged, tokens = self.vision_width * self.merge**2, frames[-1] * self.pooled_tokens
        return (1 + len(self.deepstack)) * tokens * merged * (merged + self.llm_width)

    def projector_moves(self, frames: float) -> float:
        """Patches in, tokens out, for each merger."""
        moved = self.frame_tokens * self.vision_width + self.pooled_tokens * self.llm_width
        return (1 + len(self.deepstack)) * frames * moved

    @property
    def head_width(self) -> int:
        """As the configuration says."""
        return self.llm_head

    def llm_layer(self, layer: int, tokens: float) -> float:
        """Attention of one of two kinds, and an MLP of one of two kinds."""
        if self.experts is None or layer in self.experts.dense_layers:
            mlp = 3 * self.llm_width * self.llm_mlp
        else:
            mlp = self.experts.products(self.llm_width)
        if self._is_linear(layer):
            assert self.linear is not None
            return self.linear.products(tokens, self.llm_width) + tokens * mlp
        heads, keys = self.llm_head * self.llm_heads, self.llm_head * self.llm_kv_heads
        matrices = (3 if self.gated_queries else 2) * self.llm_width * heads + 2 * self.llm_width * keys
        return tokens * (matrices + mlp) + 2 * tokens**2 * heads

    def above_diagonal(self, layer: int, tokens: float) -> float:
        """None where attention is linear."""
        return 0 if self._is_linear(layer) else super().above_diagonal(layer, tokens)

    def cache_numbers(self, layer: int, tokens: float) -> float:
        """Keys and values, or a state."""
        if self._is_linear(layer):
            assert self.linear is not None
            return self.linear.state
        return super().cache_numbers(layer, tokens)

    def _is_linear(self, layer: int) -> bool:
        return self.linear is not None and layer not in self.linear.full_layers

    # --- As the paper's Table 7 counts (protocol paper) ---------------------------------------------------

    def paper_encoder(self, computed: Sequence[float], frames: Sequence[float]) -> float:
        """The encoder with as many patches as there are tokens, a fourth of what there are; full layers look at those
        of all frames, windows have 64; and the merger once for each of these patches."""
        share = self.merge**2
        tokens = [places / share for places in computed]
        layers = 0.0
        for layer, (n, entering) in enumerate(zip(tokens, frames, strict=False)):
            windows = self.window is not None and layer not in self.full_layers
            seen = _TABLE_7_WINDOW if windows else entering * self.pooled_tokens
            layers += n * (self.vision_matrices + 2 * seen * self.vision_width)
        values = PIXEL_CHANNELS * self.pictures * self.patch_size**2
        embedding = frames[0] * self.pooled_tokens * values * self.vision_width
        return 2 * (embedding + layers + self.projector(frames))

    def paper_llm_layer(self, layer: int, tokens: float) -> float:
        """What is done, a multiply-add counted as two."""
        return 2 * self.llm_layer(layer, tokens)

    @classmethod
    def of_config(cls, config: Any) -> "QwenShape":
        """The sizes in the configuration of one of these models."""
        vision, text = config.vision_config, config.text_config
        patch = vision.patch_size
        window = getattr(vision, "window_size", None)
        return cls(
            model_type=config.model_type,
            vision_layers=vision.depth,
            vision_width=vision.hidden_size,
            vision_heads=vision.num_heads,
            vision_mlp=vision.intermediate_size,
            patch_size=patch,
            merge=vision.spatial_merge_size,
            temporal=vision.temporal_patch_size,
            window=None if window is None else window // vision.spatial_merge_size // patch * vision.spatial_merge_size,
            full_layers=tuple(getattr(vision, "fullatt_block_indexes", None) or ()),
            gated=vision.hidden_act == "silu",
            deepstack=tuple(getattr(vision, "deepstack_visual_indexes", None) or ()),
            llm_layers=text.num_hidden_layers,
            llm_width=text.hidden_size,
            llm_heads=text.num_attention_heads,
            llm_kv_heads=text.num_key_value_heads,
            llm_head=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            llm_mlp=getattr(text, "intermediate_size", 0),
            vocab=text.vocab_size,
            tied_embeddings=bool(config.tie_word_embeddings),
            gated_queries=config.model_type.startswith("qwen3_5"),
            linear=_linear_of(text),
            experts=_experts_of(text),
        )


def _mean_window(places: int, window: int) -> float:
    """Places along one axis that a place's window has, on average: 12 in windows of 8 -> (8*8 + 4*4) / 12."""
    whole, rest = divmod(places, window)
    return (whole * window**2 + rest**2) / places


def _linear_of(text: Any) -> LinearAttention | None:
    if not hasattr(text, "linear_num_value_heads"):
        return None
    return LinearAttention(
        key_heads=text.linear_num_key_heads,
        key_width=text.linear_key_head_dim,
        value_heads=text.linear_num_value_heads,
        value_width=text.linear_value_head_dim,
        kernel=text.linear_conv_kernel_dim,
        full_layers=tuple(layer for layer, kind in enumerate(text.layer_types) if kind == "full_attention"),
    )


def _experts_of(text: Any) -> Experts | None:
    if not getattr(text, "num_experts", 0):
        return None
    step, dense = getattr(text, "decoder_sparse_step", 1), getattr(text, "mlp_only_layers", None) or ()
    return Experts(
        count=text.num_experts,
        chosen=text.num_experts_per_tok,
        mlp=text.moe_intermediate_size,
        shared_mlp=getattr(text, "shared_expert_intermediate_size", 0),
        dense_layers=tuple(
            layer for layer in range(text.num_hidden_layers) if layer in dense or (layer + 1) % step != 0
        ),
    )
