"""The speaker for a checkpoint of transformers: what its processor makes of a video decides."""

from ...cli.loading import load_checkpoint
from ..preprocess import makes_patches
from .arguments import Arguments
from .patches_code import PatchSpeaker
from .speaker import Speaker
from .transformers_code import TransformersSpeaker


def load_speaker(arguments: Arguments) -> Speaker:
    """Load a checkpoint; raises :class:`~earlytom_compile.EarlyTomConfigError` where that fails."""
    loaded = load_checkpoint(
        arguments.pretrained, device=arguments.device, dtype=arguments.dtype, options=arguments.options
    )
    return (PatchSpeaker if makes_patches(loaded.processor) else TransformersSpeaker)(arguments, loaded)
