"""``earlytom eval``: what compression costs in answers, and in features.

``--toy``, a small model that really answers, is in :mod:`.eval_toy`; ``--tasks``, a checkpoint of one's own and
benchmarks of lmms-eval, in :mod:`.eval_tasks`; ``--fidelity``, features of a vision encoder without any question, in
:mod:`.eval_fidelity`.
"""

import argparse
import math
from typing import Any

from ..config import bad_option
from ..errors import EarlyTomConfigError
from . import eval_fidelity, eval_tasks, eval_toy
from .resume import check_resume

_NOT_OF_METHODS = ("preset", "lowering", "mode", "compile_llm", "static_selection", "strict")
"""Options of ``compile()``, which the toy world's methods do without: they are plain PyTorch."""
_KINDS = ("toy", "tasks", "fidelity")
_OF_TOY = ("world", "methods", "pareto", "videos", "split", "first", "try_", "encoded", "noise", "repeats")
_NOT_WITH_ALL: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_OF_TOY, ("toy",)),
    **dict.fromkeys(("batch_size", "limit", "include_path", "model_args", *_NOT_OF_METHODS), ("tasks",)),
    **dict.fromkeys(eval_fidelity.OPTIONS, ("fidelity",)),
    **dict.fromkeys(("frames", "dtype"), ("tasks", "fidelity")),
    **dict.fromkeys(("retain_ratios", "variant"), ("toy", "tasks")),
    "plot": ("toy", "fidelity"),
}
"""Options that mean nothing to some kinds of evaluation, and the kinds to which they mean something."""


def execute(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Evaluate what is asked for; print and write what came out."""
    _check(arguments)
    if not arguments.toy:
        arguments.model = _only_model(arguments.model)
    if arguments.fidelity:
        eval_fidelity.execute(arguments, options)
    elif arguments.tasks:
        eval_tasks.execute(arguments, options)
    else:
        not_here = (*_NOT_OF_METHODS, "variant")  # which says what rows there are
        eval_toy.execute(arguments, {name: value for name, value in options.items() if name not in not_here})


def _only_model(given: list[str] | None) -> str | None:
    if given and len(given) > 1:
        raise EarlyTomConfigError(
            f"model={given[1]!r}: a second one goes with --toy, for models of several training seeds; name one."
        )
    return given[0] if given else None


def _check(arguments: argparse.Namespace) -> None:
    chosen = [kind for kind in _KINDS if getattr(arguments, kind)]
    if len(chosen) != 1:
        raise EarlyTomConfigError(
            "give one of --toy (the toy world that comes along), --tasks (benchmarks of lmms-eval, with --model) and "
            "--fidelity (features of a vision encoder)."
        )
    if arguments.video and not arguments.fidelity:
        raise EarlyTomConfigError(
            f"video={arguments.video[0]!r}: right answers are known for the videos that eval draws or a benchmark has. "
            "What compression changes in answers about your own, earlytom run --compare shows for one and earlytom "
            "compare for many; what it changes in features of them, earlytom eval --fidelity."
        )
    for name, kinds in _NOT_WITH_ALL.items():
        if name in arguments.given and chosen[0] not in kinds:
            them = " and ".join(f"--{kind}" for kind in kinds)
            raise EarlyTomConfigError(f"{name}={getattr(arguments, name)!r}: that goes with {them}; leave it out.")
    wrong = [ratio for ratio in arguments.retain_ratios if not 0 < ratio <= 1]
    if wrong:
        raise EarlyTomConfigError(f"retain_ratios: {wrong[0]} must be in (0, 1].")
    if arguments.toy:
        _check_toy(arguments)
    check_resume(arguments)


def _check_toy(arguments: argparse.Namespace) -> None:
    if arguments.videos < 1 or arguments.first < 0:
        raise EarlyTomConfigError(
            f"videos={arguments.videos}, first={arguments.first}: at least 1 video, counted from 0."
        )
    if arguments.repeats < 0:
        raise bad_option("repeats", arguments.repeats, "a number of videos to be timed, 0 for none")
    if "method" in arguments.given:
        raise EarlyTomConfigError(
            f"method={arguments.method!r} with --toy, where methods are rows: name them with --methods."
        )
    if not 0 <= arguments.noise < math.inf:
        raise bad_option("noise", arguments.noise, "a number that is not negative, such as 0.05")
    models = arguments.model or []
    twice = next((name for place, name in enumerate(models) if name in models[:place]), None)
    if twice is not None:
        raise EarlyTomConfigError(f"model={twice!r} is given twice: each is asked once.")
    if "variant" in arguments.given and arguments.methods:
        raise EarlyTomConfigError(
            f"variant={arguments.variant!r} with --methods: give one, such as --methods 'earlytom {arguments.variant}'."
        )
