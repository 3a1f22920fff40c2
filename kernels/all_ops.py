"""Import this and every operator exists: ``torch.ops.earlytom.frame_similarity`` and its siblings.

::

    import earlytom_compile.kernels.all_ops   ->   torch.ops.earlytom.<name> for every file of this folder
"""

from earlytom_compile.kernels import (
    append_separators,
    at_places,
    attention_received,
    distinct_frames,
    first_of_merged,
    frame_similarity,
    inner_prompt,
    inner_tokens,
    keep_by_method,
    merge_frames,
    pack_places,
    plan_merge,
    plan_reuse,
    reuse_attention,
    select_representatives,
    select_tokens,
    sequence,
    video_budget,
    window_attention,
    window_attention_received,
)

__all__ = [
    "append_separators",
    "at_places",
    "attention_received",
    "distinct_frames",
    "first_of_merged",
    "frame_similarity",
    "inner_prompt",
    "inner_tokens",
    "keep_by_method",
    "merge_frames",
    "pack_places",
    "plan_merge",
    "plan_reuse",
    "reuse_attention",
    "select_representatives",
    "select_tokens",
    "sequence",
    "video_budget",
    "window_attention",
    "window_attention_received",
]
