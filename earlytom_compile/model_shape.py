"""The sizes of a model, and the multiply-adds of its parts that follow from them.

    shape = ModelShape.from_config(model.config)
    shape.vision_layer(0, tokens=729)        # of the first layer of the encoder, for one frame

:class:`ModelShape` has what the models have in common; :class:`LlavaShape` is LLaVA-OneVision, and
:class:`~earlytom_compile.qwen_shape.QwenShape` the video models of Qwen. ``flops.count`` adds the parts up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .config import EarlyTomConfig
from .errors import EarlyTomConfigError

PIXEL_CHANNELS = 3


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What decides how much work a Video-LLM is: a vision encoder, a projector, a language model."""

    vision_layers: int
    vision_width: int
    vision_heads: int
    vision_mlp: int
    patch_size: int
    llm_layers: int
    llm_width: int
    llm_heads: int
    llm_kv_heads: int
    llm_mlp: int
    vocab: int
    tied_embeddings: bool = False
    """Whether ``lm_head`` is the embedding: the same work, fewer weights."""
    frames: int = 32
    """Pictures of a video the model is used with, unless somebody says otherwise."""
    full_layers: tuple[int, ...] = ()
    """0-based encoder layers that look at the whole frame, where the others have windows; empty where all do."""

    def merges(self, merge_layers: Sequence[int] | None) -> tuple[int, ...]:
        """Encoder layers after which frames merge; None: those of a call that does not say. Raises
        :class:`EarlyTomConfigError` for one that does not exist."""
        chosen = None if merge_layers is None else tuple(merge_layers)
        config = EarlyTomConfig(variant="paper", merge_layers=chosen)
        return config.resolve_merge_layers(self.vision_layers, self.full_layers)

    @staticmethod
    def from_config(config: Any) -> "ModelShape":
        """The sizes in the configuration of a model; raises :class:`EarlyTomConfigError` for what cannot be counted."""
        from .qwen_shape import QwenShape, is_qwen  # which is derived from this class

        return QwenShape.of_config(config) if is_qwen(config) else LlavaShape.of_config(config)

    # --- What a frame is --------------------------------------------------------------------------------

    @property
    def pictures(self) -> int:
        """Pictures of a video that make one frame: what the encoder sees as one, and merges as one."""
        return 1

    def frames_of(self, pictures: int) -> int:
        """Frames of a video of so many pictures; the last one is filled up."""
        return -(-pictures // self.pictures)

    @property
    def frame_tokens(self) -> int:
        """S: patch tokens of a frame inside the encoder."""
        raise NotImplementedError

    @property
    def pooled_tokens(self) -> int:
        """P: tokens of a frame, which the language model gets."""
        raise NotImplementedError

    @property
    def frame_pixels(self) -> int:
        """Numbers that come for a frame."""
        return PIXEL_CHANNELS * self.pictures * self.frame_tokens * self.patch_size**2

    def tokens_beside(self, frames: int) -> int:
        """Tokens that the prompt has for a video beside those of its frames, whatever is kept of them."""
        return 0

    # --- Multiply-adds that are done (protocol exact) -----------------------------------------------------

    def places_seen(self, layer: int) -> float:
        """Places of its frame that a query of this encoder layer attends to, on average over the frame."""
        return self.frame_tokens

    def patch_embedding(self, frames: float) -> float:
        """Of all patches of so many frames."""
        values = PIXEL_CHANNELS * self.pictures * self.patch_size**2
        return frames * self.frame_tokens * values * self.vision_width

    @property
    def vision_matrices(self) -> int:
        """Of a layer of the encoder for one token: four square matrices, and an MLP of two."""
        return 4 * self.vision_width**2 + 2 * self.vision_width * self.vision_mlp

    def vision_layer(self, layer: int, tokens: float) -> float:
        """Its matrices, and the two products of attention within each frame."""
        return tokens * (self.vision_matrices + 2 * self.places_seen(layer) * self.vision_width)

    def attention_scores(self, layer: int, frames: float) -> float:
        """The first of attention's two products once more, which nobody keeps and importance needs."""
        return frames * self.frame_tokens * self.places_seen(layer) * self.vision_width

    def projector(self, frames: Sequence[float]) -> float:
        """Between encoder and language model; ``frames`` enter each layer of the encoder, the last of them leave it."""
        raise NotImplementedError

    def projector_moves(self, frames: float) -> float:
        """Numbers that it reads and writes, its weights aside, where so many frames leave the encoder."""
        raise NotImplementedError

    @property
    def head_width(self) -> int:
        """Channels of a head of the language model."""
        return self.llm_width // self.llm_heads

    def llm_layer(self, layer: int, tokens: float) -> float:
        """Queries, output and the narrower keys and values; attention of all heads; three matrices of SwiGLU."""
        width, heads, keys = self.llm_width, self.head_width * self.llm_heads, self.head_width * self.llm_kv_heads
        matrices = 2 * width * heads + 2 * width * keys + 3 * width * self.llm_mlp
        return tokens * matrices + 2 * tokens**2 * heads

    def above_diagonal(self, layer: int, tokens: float) -> float:
        """Of these, those of attention to later positions, which need not be computed."""
        return tokens * (tokens - 1) * self.head_width * self.llm_heads

    def cache_numbers(self, layer: int, tokens: float) -> float:
        """What this layer of the language model keeps of a prompt: keys and values."""
        return 2 * tokens * self.head_width * self.llm_kv_heads

    # --- As the paper's tables count (protocol paper) -----------------------------------------------------

    def paper_encoder(self, computed: Sequence[float], frames: Sequence[float]) -> float:
        """Eq. 8 over the encoder: ``computed`` patches of ``frames`` frames in each layer, all in one sequence."""
        widths = self.vision_width, self.vision_mlp
        pairs = zip(computed, frames, strict=False)  # the last frames leave the encoder
        return sum(_eq_8(tokens, *widths, places=f * self.frame_tokens) for tokens, f in pairs)

    def paper_llm_layer(self, layer: int, tokens: float) -> float:
        """Eq. 8 for a layer of the language model."""
        return _eq_8(tokens, self.llm_width, self.llm_mlp, places=tokens)


@dataclass(frozen=True, kw_only=True)
class LlavaShape(ModelShape):
    """A LLaVA-OneVision: a SigLIP encoder, a projector of two matrices, 2x2 pooling, a Qwen2."""

    image_size: int
    prefix: int = 0
    """Tokens of a frame in front of its patches, a class token, which leave no further than the encoder."""

    @property
    def frame_tokens(self) -> int:
        """S: tokens of a frame inside the encoder."""
        return self.prefix + self.patches

    @property
    def patches(self) -> int:
        """Of a frame: what is embedded, and what leaves the encoder."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def pooled_tokens(self) -> int:
        """P: tokens of a frame after 2x2 pooling."""
        return (-(-(self.image_size // self.patch_size) // 2)) ** 2

    @property
    def frame_pixels(self) -> int:
        """Those at the border, of which there is no patch, come too."""
        return PIXEL_CHANNELS * self.image_size**2

    def tokens_beside(self, frames: int) -> int:
        """A newline."""
        return 1

    def patch_embedding(self, frames: float) -> float:
        """Of all patches of so many frames; what stands in front of them is learned."""
        return frames * self.patches * PIXEL_CHANNELS * self.patch_size**2 * self.vision_width

    def projector(self, frames: Sequence[float]) -> float:
        """Two matrices for each patch that leaves the encoder."""
        return frames[-1] * self.patches * self.llm_width * (self.vision_width + self.llm_width)

    def projector_moves(self, frames: float) -> float:
        """Patches in and out: pooling comes behind."""
        return frames * self.patches * (self.vision_width + self.llm_width)

    @classmethod
    def of_config(cls, config: Any) -> "LlavaShape":
        """The sizes in a ``LlavaOnevisionConfig``; raises :class:`EarlyTomConfigError` for what cannot be counted."""
        vision, text = config.vision_config, config.text_config
        head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        feature_layer = getattr(config, "vision_feature_layer", None)
        if head_width * text.num_attention_heads != text.hidden_size or not isinstance(feature_layer, int):
            raise EarlyTomConfigError(
                f"head_dim={head_width} x {text.num_attention_heads} heads, hidden_size={text.hidden_size}, "
                f"vision_feature_layer={feature_layer}: the work of a model can be counted where the heads fill the "
                "width and one encoder layer feeds the projector, as in LLaVA-OneVision."
            )
        return cls(
            vision_layers=vision.num_hidden_layers,
            vision_width=vision.hidden_size,
            vision_heads=vision.num_attention_heads,
            vision_mlp=_mlp_width(vision),
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            # "default" is to drop the class token.
            prefix=int(getattr(config, "vision_feature_select_strategy", "full") == "default"),
            llm_layers=text.num_hidden_layers,
            llm_width=text.hidden_size,
            llm_heads=text.num_attention_heads,
            llm_kv_heads=text.num_key_value_heads,
            llm_mlp=text.intermediate_size,
            vocab=text.vocab_size,
            tied_embeddings=bool(config.tie_word_embeddings),
        )


def _mlp_width(vision: Any) -> int:
    """Channels inside the MLP of an encoder; DINOv2 says how many times its width."""
    width = getattr(vision, "intermediate_size", None)
    return int(vision.hidden_size * vision.mlp_ratio) if width is None else width


def _eq_8(tokens: float, width: int, mlp: int, *, places: float) -> float:
    """4nd² + 2n²d + 2ndm (Eq. 8), where each of n tokens looks at ``places``: n, unless some are not computed."""
    return 4 * tokens * width**2 + 2 * tokens * places * width + 2 * tokens * width * mlp
