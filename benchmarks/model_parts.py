"""Where the parts of a model are that its time and its weights are told by.

parts_of(model.model)[VISION]      # [vision tower]: SigLIP of LLaVA-OneVision, or the blocks of Qwen's tower
"""

from typing import Any

from torch import nn

VISION, TOKENS, LLM = "vision encoding", "visual token processing", "LLM prefill"
"""The stages of a call: the vision encoder, what makes tokens of patches and chooses among them, the language model."""


def parts_of(inner: Any) -> dict[str, list[nn.Module]]:
    """Modules of ``inner``, the ``model`` of a model, by the stage that begins when one of them is called.

    Qwen's mergers, which make tokens of patches, lie inside its tower: a module belongs to the stage of the nearest one
    around it.
    """
    if not hasattr(inner, "visual"):
        tower, projectors = inner.vision_tower, [inner.multi_modal_projector]
    else:
        tower = inner.visual
        projectors = [tower.merger, *getattr(tower, "deepstack_merger_list", ())]
    return {VISION: [tower], TOKENS: projectors, LLM: [inner.language_model]}


def weight_bytes(inner: Any) -> dict[str, int]:
    """Of each stage: what its modules hold, and nothing twice; of the language model, its layers."""
    parts = parts_of(inner)
    bytes_of = {stage: sum(map(_bytes, modules)) for stage, modules in parts.items()}
    if any(inside in parts[VISION][0].modules() for inside in parts[TOKENS]):
        bytes_of[VISION] -= bytes_of[TOKENS]
    return {**bytes_of, LLM: _bytes(inner.language_model.layers)}


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
