"""In place: ``earlytom_compile.compile(model, retain_ratio=0.1)`` and what undoes it.

``torch.compile(model).generate`` would never run compiled code: the compiled module forwards ``generate`` to the
original one. Here the methods of the model itself are replaced, by those of a ``CompiledModel`` (``generate.py``).
"""

from typing import Any

import torch

from ..config import EarlyTomConfig
from ..errors import EarlyTomConfigError
from ..families.base import Family
from ..families.registry import family_of
from ..methods.base import Step
from ..reporting import forget, note_restored
from ..stages import asks_for_cuda_graphs
from .checks import check_family, is_encoded, require_tensors
from .generate import CompiledModel
from .method import Method
from .placement import Placement, prepare_libraries
from .prefill import decoder_layers

_HANDLE = "_earlytom"


def compile(model: torch.nn.Module, **options: Any) -> torch.nn.Module:  # noqa: A001
    """Make ``model`` compress its videos in ``generate()`` and ``forward()``; returns the same model.

    ``options`` are those of :class:`EarlyTomConfig`; bad ones raise :class:`EarlyTomConfigError` now, and so does a
    vision tower that is sharded or on several devices. Calling it again replaces the options; what was compiled stays
    where it does not depend on them: all of it with the same options, the layers with another ``retain_ratio``.
    Promises: ``generate`` returns the caller's own prompt ids followed by the new tokens; :func:`restore` undoes it
    exactly; a call without a video runs the model's own code.
    """
    family = family_of(model)
    config = EarlyTomConfig.from_options(family.options(options))
    family.require_versions()
    check_family(model, family)
    if reason := Placement.of(model, family, asks_for_cuda_graphs(config.mode)).reason_against:
        raise EarlyTomConfigError(f"{reason[0]}. {reason[1]}.")
    layers = family.encoder_layers(getattr(model, "config", None))
    if layers is not None:
        config.require_layers(layers)
    steps = _steps_inside(model, config, family)
    before: CompiledModel | None = model.__dict__.get(_HANDLE)
    if before is not None and before.config == config and before.is_in_place():
        return model
    restore(model)
    family.prepare()
    prepare_libraries()
    handle = CompiledModel(model, config, family)
    model.__dict__[_HANDLE] = handle
    note_restored(model, False)
    for name in handle.own:
        model.__dict__[name] = Method(handle, name, getattr(model, name))
    if before is not None:
        handle.take_over(before)
    handle.install_prefill(steps)
    return model


def _steps_inside(model: torch.nn.Module, config: EarlyTomConfig, family: Family) -> tuple[Step, ...]:
    """Where the model's language model goes on with fewer tokens; raises where it cannot."""
    if not config.reduces_inside():
        return ()
    language_model = family.language_model(model)
    layers = 0 if language_model is None else len(decoder_layers(language_model))
    if not layers:
        option = f"method={config.method!r}" if config.inner_layer is None else f"inner_layer={config.inner_layer}"
        raise EarlyTomConfigError(
            f"{option}: the language model of a {type(model).__name__} has no list of layers, before one of which "
            "tokens could go. Leave it out."
        )
    return config.steps_inside(layers)


def restore(model: torch.nn.Module) -> torch.nn.Module:
    """Undo :func:`compile` exactly; does nothing to a model that is not compiled. Returns the same model.

    Raises :class:`EarlyTomConfigError` for what is no model."""
    if not isinstance(model, torch.nn.Module):
        raise EarlyTomConfigError(f"restore() got a {type(model).__name__}; it takes what compile() returned.")
    handle = model.__dict__.pop(_HANDLE, None)
    if handle is not None:
        for name in handle.own:
            if isinstance(model.__dict__.get(name), Method):  # not a wrapper that somebody put there since
                del model.__dict__[name]
        model.__dict__.update({k: v for k, v in handle.replaced.items() if k not in model.__dict__})
        if handle.prefill is not None:
            handle.prefill.remove()
        forget(model)
        note_restored(model, True)
    return model


def encode_videos(model: torch.nn.Module, pixel_values_videos: Any, **arguments: Any) -> list[torch.Tensor]:
    """The compressed tokens of each video, as the language model gets them: for many questions about one video.

    ``model`` is what :func:`compile` returned; ``pixel_values_videos`` [V, F, 3, H, W], or a sequence of videos
    [F, 3, H, W]; ``arguments`` are those of ``generate()`` that have to do with videos. Returns ``V`` tensors [K, C] in
    the model's dtype, the newline last where the model has one. Give them to ``generate()`` or ``forward()`` as
    ``pixel_values_videos``, as often as there are questions, with one ``<video>`` for each in ``input_ids`` (or as many
    as the processor writes, which models that know tokens by their positions need, as Qwen-VL: they also need all else
    that the processor gave, and these very tensors)::

        videos = earlytom_compile.encode_videos(model, inputs["pixel_values_videos"])
        ids = processor.tokenizer(prompt, return_tensors="pt")
        model.generate(**ids, pixel_values_videos=videos)

    Raises :class:`EarlyTomConfigError` if the model is not compiled or a video has another shape.
    """
    handle = model.__dict__.get(_HANDLE)
    if handle is None:
        raise EarlyTomConfigError("the model is not compiled: call earlytom_compile.compile(model) first.")
    name = handle.family.spelled("pixel_values_videos")
    require_tensors(handle.family, pixel_values_videos)
    if is_encoded(pixel_values_videos):
        raise EarlyTomConfigError(f"these videos are encoded already: give them to generate() as {name}.")
    if reason := handle.encoder.reason_against_placement():
        raise EarlyTomConfigError(f"the videos cannot be encoded: {reason[0]}. {reason[1]}.")
    call = {**handle.family.by_our_names(arguments), "pixel_values_videos": pixel_values_videos}
    if reason := handle.family.reason_against(model, call):
        raise EarlyTomConfigError(f"the videos cannot be encoded: {reason[0]}. {reason[1]}.")
    return handle.encode_videos(handle.family.videos(model, call))
