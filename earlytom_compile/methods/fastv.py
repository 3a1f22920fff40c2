"""FastV: an image is worth 1/2 tokens after layer 2.

Layers 0 and 1 of the language model see all F * P tokens of a video. Behind them it keeps the share ``retain_ratio`` of
its tokens that receive the most attention in layer 1, "the average attention-score one token received from all other
tokens" (section 4.1), and layer 2 and all later ones run without the others. The paper's R is the share that goes,
1 - ``retain_ratio``, and its K is 2, as in its title.

In a decoder only a token itself and what comes after it can attend to it; the average is over these. The released code
ranks by the attention of the prompt's last position instead; the form of it that keeps no cache hides the others from
attention and computes them all the same.
"""

from ..errors import EarlyTomConfigError
from .base import Method, Step

_LAYER = 2


def inside(retain_ratio: float, layers: int) -> tuple[Step, ...]:
    if layers <= _LAYER:
        raise EarlyTomConfigError(
            f'method="fastv" with a language model of {layers} layers: it leaves tokens out before layer {_LAYER}, so '
            f'there must be at least {_LAYER + 1}. Choose a method that acts behind the encoder, such as "visionzip".'
        )
    return (Step(_LAYER, retain_ratio, "drop", scores="all"),)


METHOD = Method(
    name="fastv",
    paper="An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language "
    "Models, ECCV 2024, arXiv 2403.06764",
    inside=inside,
)
