"""PyramidDrop: fewer tokens at the end of each of four stages of the language model.

The L layers are cut into four stages, which end before layers floor(L / 4), floor(L / 2) and floor(3 L / 4) (8, 16 and
24 of 32 in the paper). At the end of a stage the share lambda of what the stage had stays, ranked by the attention that
the last token of the instruction, here the last position of the prompt, pays in the stage's last layer (Eq. 2).

``retain_ratio`` is the share of a video's tokens in the last stage, so lambda = retain_ratio^(1/3), and
after stage i the share lambda^i of all of them is left; each number is rounded once, from the video's own, where the
paper takes ceil((1 - lambda) n) away from the n of the stage before. The paper's lambda is 0.5: ``retain_ratio=0.125``.

Tokens that are left keep their positions. The released code numbers them anew, takes the share by rounding down, and
ranks with the weights of the layer behind the stage.
"""

from ..errors import EarlyTomConfigError
from .base import Method, Step

_STAGES = 4


def inside(retain_ratio: float, layers: int) -> tuple[Step, ...]:
    if layers < _STAGES:
        raise EarlyTomConfigError(
            f'method="pyramiddrop" with a language model of {layers} layers: it has {_STAGES} stages of at least one '
            'layer each. Choose another method, such as "fastv", or one that acts behind the encoder, such as '
            '"visionzip".'
        )
    last = _STAGES - 1
    return tuple(
        Step(layers * stage // _STAGES, retain_ratio ** (stage / last), "drop", scores="last")
        for stage in range(1, _STAGES)
    )


METHOD = Method(
    name="pyramiddrop",
    paper="PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction, "
    "CVPR 2025, arXiv 2410.17247",
    inside=inside,
)
