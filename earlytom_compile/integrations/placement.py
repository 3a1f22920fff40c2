"""Where the weights of a model's video path are and what hangs on its modules, as far as compiled code has to know.

    placed = Placement.of(model, family) # once a video: .reason_against, .on_device(video), .hooks
    with video_path(model, family):      # around every call of a compiled video path
        rows = compiled_path(model, placed.on_device(video))

Dynamo traces hooks and replaced ``forward`` methods like any code, but does not notice one that comes or goes later:
so each set of them has compiled code of its own. accelerate's ``AlignDevicesHook`` is not traced: what it does, bring
inputs and weights to a device, is done once around the video path. So ``dispatch_model``, ``cpu_offload`` and
``disk_offload`` work; the language model keeps its hooks and may be anywhere.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..errors import EarlyTomConfigError
from ..families.base import Family, Video
from . import attention_choice
from .own_trace import is_video_path, tracing_video
from .tracing import prepare_peft

MOST_SETS_OF_HOOKS = 8
"""Whoever changes hooks more often would compile more than run."""


def video_modules(model: Any, family: Family) -> list[nn.Module]:
    """The model and the modules of its video path: all but what makes text of the rows."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    skipped = (family.language_model(model), family.embedding(model), head)
    return _with_all_below([model, *family.vision_within(model)], without=skipped)


def _with_all_below(found: list[nn.Module], without: Sequence[nn.Module | None] = ()) -> list[nn.Module]:
    """What ``modules()`` gives, in a fifth of the time; it is asked in every call."""
    skipped = {id(module) for module in (None, *without)}
    for module in found:  # which grows
        found += [child for child in module._modules.values() if id(child) not in skipped]  # type: ignore[misc]
    return found


@dataclass(frozen=True)
class Placement:
    """How one video path is placed at this moment."""

    reason_against: tuple[str, str] | None
    """(reason, cure) where it cannot be compiled."""
    device: torch.device | None
    """Where its weights are while they are used."""
    moves_inputs: bool
    """Whether accelerate brings inputs there."""
    hooks: tuple[Any, ...]
    """See :func:`hooks_on`."""
    _modules: tuple[nn.Module, ...] = field(repr=False)

    @classmethod
    def of(cls, model: Any, family: Family, cuda_graphs: bool = False) -> "Placement":
        """``cuda_graphs`` read weights where they were when they were captured."""
        modules = video_modules(model, family)
        devices: dict[torch.device, nn.Module] = {}
        problems: list[tuple[tuple[str, str], nn.Module, str]] = []
        moves, latest = False, None
        for module in modules:
            state, brought_to = module.__dict__, None
            for hook in _accelerate_hooks(module) if "_hf_hook" in state else ():
                if not _aligns_devices(hook):
                    problems.append((_UNKNOWN_HOOK, module, type(hook).__name__))
                elif hook.execution_device is not None:
                    moves, brought_to = True, _indexed(hook.execution_device)
                    if hook.offload and cuda_graphs:
                        problems.append((_CAPTURED, module, ""))
            if _is_sharded(module):
                problems.append((_SHARDED, module, ""))
            for weights in state["_parameters"].values():
                if weights is not None and (brought_to or weights.device != latest):  # most are where the last one was
                    latest = weights.device
                    devices.setdefault(brought_to if brought_to and weights.is_meta else latest, module)
        if len(devices) > 1:
            where = ", ".join(f"{_name(model, module)} on {device}" for device, module in devices.items())
            problems.append((_SPREAD, modules[0], where))
        problems += [(_NOT_THERE, module, "") for device, module in devices.items() if device.type == "meta"]
        reason = None
        if problems:
            (text, cure), module, what = problems[0]
            reason = text.format(name=_name(model, module), what=what), cure
        # Hooks on the model itself are around calls, not in the video path.
        return cls(reason, next(iter(devices), None), moves, hooks_on(modules[1:]), tuple(modules))

    @property
    def names_of_hooked(self) -> str:
        """The modules with hooks, for people; empty if there are none."""
        model, *modules = self._modules
        places = dict.fromkeys(place for place, hook in self.hooks if hook.is_hook)
        return ", ".join(_name(model, modules[place]) if isinstance(place, int) else "all modules" for place in places)

    def on_device(self, video: Video) -> Video:
        """``video`` where the weights are; raises :class:`EarlyTomConfigError` where nobody but the caller moves it."""
        if self.device in (None, video.pixels.device):
            return video
        if self.moves_inputs:
            arguments = {
                name: value.to(self.device) if isinstance(value, torch.Tensor) else value
                for name, value in video.arguments.items()
            }
            tables = {name: table.to(self.device) for name, table in video.tables.items()}
            return replace(video, pixels=video.pixels.to(self.device), arguments=arguments, tables=tables)
        raise EarlyTomConfigError(
            f"pixel_values_videos are on {video.pixels.device} and the vision tower on {self.device}: move them there. "
            "(DataParallel, which spreads a call over devices, is not supported: compile a model for each device.)"
        )


_UNKNOWN_HOOK = (
    "{name} has a hook of accelerate that moves or changes it in its own way ({what})",
    "Take it off with accelerate.hooks.remove_hook_from_module(), and place the model yourself",
)
_SHARDED = (
    "the weights of {name} are sharded (FSDP or a device mesh)",
    "Leave the vision tower, the projector and image_newline out of it; sharding the language model is fine",
)
_SPREAD = (
    "the vision tower and the projector are not on one device ({what})",
    "Keep them and image_newline together (device_map); the language model may be anywhere",
)
_NOT_THERE = "the weights of {name} are not there (device meta)", "Load them first"
_CAPTURED = (
    "the weights of {name} are offloaded, and CUDA graphs need them in one place",
    "Leave mode out, or keep the vision tower and the projector on the device",
)


def _name(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, each in model.named_modules() if each is module) or "the model"


class _Same:
    """A hook or a ``forward``, equal to itself alone whatever its own ``==`` says; it lives as long."""

    def __init__(self, inside: Any, is_hook: bool = True) -> None:
        self._inside = inside
        self.is_hook = is_hook

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._inside is other._inside

    def __hash__(self) -> int:
        return id(self._inside)


def hooks_on(modules: Iterable[nn.Module]) -> tuple[Any, ...]:
    """What changes the calls of these modules: hooks, and ``forward`` where it is not that of the class."""
    found: list[Any] = []
    for place, module in enumerate(modules):
        state = module.__dict__
        if state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state:
            hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            found += ((place, _Same(hook)) for hook in hooks if not _of_transformers(hook))
            if "forward" in state:
                found.append((place, _Same(state["forward"], is_hook=False)))
    everywhere = nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks
    found += ((None, _Same(hook)) for hooks in everywhere for hook in hooks.values())
    return tuple(found)


def _of_transformers(hook: Any) -> bool:
    """Its own, which it installs in the first call."""
    return str(getattr(hook, "__module__", "")).startswith("transformers.")


def own_code_because(language_model: nn.Module, without: Sequence[nn.Module] = ()) -> str | None:
    """Why a language model's prompts are not compiled as it is; None if they can be. ``without``: modules in it that
    are none of its own.

    Those of accelerate break graphs, others may, and Dynamo loses what a hook returns if it breaks a graph."""
    modules = _with_all_below([language_model], without)
    devices: set[torch.device] = set()
    for module in modules:
        if "_hf_hook" in module.__dict__ or _is_sharded(module):
            return "it is placed by accelerate or FSDP"
        devices.update(weights.device for weights in module._parameters.values() if weights is not None)
    if len(devices) > 1:
        return "it is on several devices"
    return "it has hooks" if any(hook.is_hook for _, hook in hooks_on(modules)) else None


@contextmanager
def weights_in_place(model: Any, family: Family) -> Iterator[None]:
    """Around code that reads weights of the video path outside of the calls in which accelerate would load them."""
    with ExitStack() as stack:
        for module in video_modules(model, family):
            for hook in _accelerate_hooks(module):
                if _aligns_devices(hook) and hook.offload:
                    hook.pre_forward(module)
                    stack.callback(hook.post_forward, module, None)
        yield


def prepare_libraries() -> None:
    """What Dynamo shall see of libraries that are loaded by now; does nothing the second time. As early as can be: code
    that Dynamo has traced before is traced again."""
    attention_choice.prepare()
    _prepare_accelerate()
    prepare_peft()


@contextmanager
def video_path(model: Any, family: Family) -> Iterator[None]:
    """Around every call of the compiled video path of ``model``: what Dynamo shall see, and weights in place."""
    prepare_libraries()
    with weights_in_place(model, family), tracing_video():
        yield


def _accelerate_hooks(module: nn.Module) -> tuple[Any, ...]:
    hook = module.__dict__.get("_hf_hook")
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))  # those of a SequentialHook


def _aligns_devices(hook: Any) -> bool:
    return isinstance(hook, sys.modules["accelerate.hooks"].AlignDevicesHook)


def _indexed(device: Any) -> torch.device:
    """A device as tensors name it; accelerate may give the number of an accelerator, or its kind alone."""
    accelerator = torch.accelerator.current_accelerator()
    device = torch.device(accelerator.type, device) if accelerator and isinstance(device, int) else torch.device(device)
    if accelerator and device.type == accelerator.type and device.index is None:
        device = torch.device(device.type, torch.accelerator.current_device_index())
    return device


def _is_sharded(module: nn.Module) -> bool:
    if "_is_fsdp_managed_module" in module.__dict__:  # how FSDP tells Dynamo
        return True
    special = [x for x in module._parameters.values() if x is not None and type(x) is not nn.Parameter]
    tensors = sys.modules.get("torch.distributed.tensor") if special else None
    return tensors is not None and any(isinstance(x, tensors.DTensor) for x in special)


def _prepare_accelerate() -> None:
    """Keep Dynamo out of the hooks that align devices, in our trace; does nothing the second time."""
    hooks = sys.modules.get("accelerate.hooks")
    if hooks is not None and not hasattr(hooks.AlignDevicesHook.pre_forward, "earlytom_original"):
        for kind in (hooks.AlignDevicesHook, hooks.SequentialHook):
            kind.pre_forward = _passing_arguments(kind.pre_forward)
            kind.post_forward = _passing_output(kind.post_forward)


def _passing_arguments(original: Any) -> Any:
    def pre_forward(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() and is_video_path():
            return args, kwargs
        return original(self, module, *args, **kwargs)

    pre_forward.earlytom_original = original  # type: ignore[attr-defined]
    return pre_forward


def _passing_output(original: Any) -> Any:
    def post_forward(self: Any, module: nn.Module, output: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() and is_video_path():
            return output
        return original(self, module, output)

    return post_forward
