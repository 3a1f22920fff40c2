"""When each stage of a call begins, while the call runs the very code that is timed.

    with stage_marks(arm, stages_of_weights(model.model), begin):
        arm.first_token()          # calls begin("vision encoding"), begin("visual token processing"), ...

Where Python calls the parts of the model, hooks tell. Inside a compiled graph nothing is called by name, but a stage
can be told by its weights: the first product with a weight of the projector begins visual token processing, the first
with one of the first decoder layer the LLM prefill. Inductor calls products through a namespace, where they are
watched during the call, which takes some microseconds a product.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from earlytom_compile.benchmarks.arms import Arm
from earlytom_compile.benchmarks.model_parts import LLM, VISION, parts_of

Begin = Callable[[str], None]


def stages_of_weights(inner: Any) -> dict[int, str]:
    """{address of a weight: the stage that its product belongs to}."""
    # What comes later is inside what came before, as Qwen's mergers are in its tower.
    parts = {**parts_of(inner), LLM: [inner.language_model.layers[0]]}
    return {
        weight.data_ptr(): stage for stage, modules in parts.items() for part in modules for weight in part.parameters()
    }


@contextmanager
def stage_marks(arm: Arm, stage_of: dict[int, str], begin: Begin) -> Iterator[None]:
    """While open, ``begin`` is called whenever another stage of ``arm`` begins; vision encoding begins at once."""
    current: str | None = None

    def once(stage: str) -> None:
        nonlocal current
        if stage != current:
            current = stage
            begin(stage)

    once(VISION)
    hooks = [_before_forward(module, once, stage) for module, stage in _called_by_python(arm)]
    try:
        with _watched_products(stage_of, once):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _called_by_python(arm: Arm) -> Iterator[tuple[torch.nn.Module, str]]:
    if arm.called:
        for stage, modules in parts_of(arm.model.model).items():
            yield from ((module, stage) for module in modules if stage in arm.called)


def _before_forward(module: torch.nn.Module, begin: Begin, stage: str) -> RemovableHandle:
    return module.register_forward_pre_hook(lambda module, args: begin(stage))


@contextmanager
def _watched_products(stage_of: dict[int, str], begin: Begin) -> Iterator[None]:
    """Products that compiled code calls, and those of graphs that run uncompiled, tell the stage of their weight."""
    from torch._inductor.select_algorithm import extern_kernels

    originals: list[tuple[Any, str, Any]] = [(extern_kernels, *item) for item in vars(extern_kernels).items()]
    originals.append((torch._C._nn, "linear", torch._C._nn.linear))

    def watched(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            for argument in args:
                if isinstance(argument, torch.Tensor) and (stage := stage_of.get(argument.data_ptr())):
                    begin(stage)
            return kernel(*args, **kwargs)

        return call

    for owner, name, kernel in originals:
        setattr(owner, name, watched(kernel))
    try:
        yield
    finally:
        for owner, name, kernel in originals:
            setattr(owner, name, kernel)
