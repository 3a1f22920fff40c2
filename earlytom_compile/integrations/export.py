"""The compressed video path as a program of its own, for processes that have torch and nothing of ours.

    program = earlytom_compile.export(model, frames=32, retain_ratio=0.1)   # torch.export.ExportedProgram
    package(program, "video.pt2")                                            # AOTInductor

    path = torch._inductor.aoti_load_package("video.pt2")                   # in another process, without this package
    rows = path(pixel_values_videos)                                         # one video [1, F, 3, H, W] -> [K, C]

How many frames are left inside depends on the video and is a size known at run time only, read once for each merge;
what goes in and comes out has fixed sizes. Our operators are taken apart into those of torch (kernels/exportable.py).
"""

import importlib.metadata
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter

from ..backend import raising
from ..config import NOT_EXPORTED, EarlyTomConfig, is_whole_number
from ..errors import EarlyTomCompileError, EarlyTomConfigError
from ..families.base import Family, Video
from ..families.registry import family_of
from ..kernels import exportable, exportable_reuse
from ..passes.manager import Rewrite, run_passes
from ..passes.reasons import NotApplicable
from .checks import check_family
from .placement import Placement, video_path
from .tracing import with_its_own_code
from .vision_path import blamed_on_rows, traced_arguments, video_rows

_META = "earlytom"
_FORMS = exportable.FORMS | exportable_reuse.FORMS


def export(
    model: nn.Module, *, frames: int, frame_size: tuple[int, int] | None = None, **options: Any
) -> ExportedProgram:
    """The video path of ``model``, compressed, as a program for videos of ``frames`` pictures.

    It takes ``pixel_values_videos`` of one video as the model's processor makes them, in the model's dtype and on its
    device: [1, F, 3, H, W], or patches [T*h*w, C*2*p*p] of models of Qwen, whose pictures have ``frame_size`` (height,
    width). It returns rows [K, C] as :func:`earlytom_compile.encode_videos` does, and for models whose tokens keep
    their places in the prompt also int64 [K], ascending, the places of these rows among all of the video. ``options``
    are those of :class:`EarlyTomConfig` but for those in :data:`~earlytom_compile.config.NOT_EXPORTED`.

    Raises :class:`EarlyTomConfigError` for bad options, such as ``variant="released"``, whose K depends on the video,
    and :class:`EarlyTomCompileError` where the path cannot be compressed or exported.
    """
    family = family_of(model)
    config = EarlyTomConfig.from_options(family.options(options))
    require_exportable(config, options)
    family.require_versions()
    check_family(model, family)
    family.prepare()
    placed = Placement.of(model, family)
    if placed.reason_against is not None:
        raise EarlyTomConfigError(f"{placed.reason_against[0]}. {placed.reason_against[1]}.")
    if not is_whole_number(frames) or frames < 1:
        raise EarlyTomConfigError(f"frames={frames!r}: must be a whole number of pictures, at least 1.")
    call = family.blank_call(model, frames, frame_size)
    (video,) = family.videos(model, call)
    if family.separators(model, torch.zeros(1, 2, dtype=torch.int64)) is not None:
        raise EarlyTomConfigError(
            f"{family.name} puts separators between rows where the rows that are kept say, outside of the video path: "
            "its models cannot be exported. encode_videos() has them."
        )
    path, pixels = _traced(model, family, config, video), call["pixel_values_videos"]
    with torch.no_grad():
        try:
            program = torch.export.export(path, (pixels,), strict=False)
        except Exception as error:  # whatever torch meets in a model's operators
            raise EarlyTomCompileError(f"torch.export cannot take the video path: {_first_line(error)}") from error
    program.graph_module.meta[_META] = _metadata(model, program, path.config, frames)
    return program


def package(program: ExportedProgram, path: str | Path) -> dict[str, str]:
    """Compile what :func:`export` made with AOTInductor and write it to ``path``, a file whose name ends in ``.pt2``;
    returns what it says of itself, which ``get_metadata()`` of the loaded package has, too. Takes minutes for a large
    tower. Raises :class:`EarlyTomConfigError` for another name or program."""
    metadata = program.graph_module.meta.get(_META)
    if metadata is None:
        raise EarlyTomConfigError("package() takes what earlytom_compile.export() returned, as it is.")
    require_package_name(path)
    with tempfile.TemporaryDirectory(dir=Path(path).absolute().parent, prefix=".earlytom-") as folder:
        unfinished = Path(folder) / "package.pt2"
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(unfinished), inductor_configs={"aot_inductor.metadata": dict(metadata)}
        )
        os.replace(unfinished, path)
    return dict(metadata)


def require_exportable(config: EarlyTomConfig, given: Mapping[str, Any]) -> None:
    """Raise :class:`EarlyTomConfigError` for options that a program cannot have, of which some were ``given``."""
    for name in NOT_EXPORTED:
        if getattr(config, name) != getattr(EarlyTomConfig, name):
            raise EarlyTomConfigError(f"{name}={given.get(name)!r} can be no part of a program. Leave it out.")
    if not config.keeps_exactly():
        raise EarlyTomConfigError(
            f'variant={config.variant!r} cannot be exported: how many rows it keeps depends on the video. Use "paper" '
            'or "plus".'
        )


def require_package_name(path: str | Path) -> None:
    """Raise :class:`EarlyTomConfigError` for a name that a package cannot have."""
    if Path(path).suffix != ".pt2":
        raise EarlyTomConfigError(f"{str(path)!r}: the name of a package must end in .pt2.")


def _traced(model: nn.Module, family: Family, config: EarlyTomConfig, video: Video) -> "_VideoPath":
    """With our passes run, as they would for :func:`earlytom_compile.compile`."""
    pixels, arguments = traced_arguments(video, any_length=False)
    paths: list[_VideoPath] = []

    def backend(graph_module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        state = Rewrite(graph_module, config, features_only=True, example_inputs=inputs)
        try:
            state = run_passes(state)
            paths.append(_VideoPath(state, inputs, pixels, model, family.keeps_places))
        except NotApplicable as found:
            return raising(EarlyTomCompileError(f"nothing to export: {found.reason}. {found.cure}."))
        except EarlyTomConfigError as error:
            return raising(error)
        return graph_module.forward

    traced = torch.compile(with_its_own_code(video_rows), backend=backend)
    with torch.no_grad(), video_path(model, family), blamed_on_rows(family):
        traced(family, model, pixels, arguments)
    if len(paths) != 1:
        raise EarlyTomCompileError(
            "nothing to export: Dynamo did not trace the vision path to one graph. Call without "
            "torch.compiler.set_stance and TORCHDYNAMO_DISABLE, and take hooks off the model."
        )
    return paths[0]


class _VideoPath(nn.Module):
    """A rewritten graph as ``torch.export`` takes it: pixels alone go in, all else that Dynamo gave are weights."""

    def __init__(
        self, state: Rewrite, inputs: Sequence[Any], pixels: Tensor, model: nn.Module, keeps_places: bool
    ) -> None:
        super().__init__()
        self.config = state.config  # with what was done in the place of what cannot be
        assert state.path is not None and state.selected is not None and state.video is not None
        self._forms = [_InForms(state.graph_module, int(state.path.frames))]  # in a list: it is no module of this one
        self._shape, self._tokens, self._keeps_places = pixels.shape, state.path.tokens, keeps_places
        names = {id(x): name for name, x in (*model.named_parameters(), *model.named_buffers())}
        self._inputs: list[str | None] = []
        for place, x in enumerate(inputs):
            name = None if x is pixels else names.get(id(x), f"table.{place}").replace(".", "_")
            self._inputs.append(name)
            if name is not None:
                self.register_buffer(name, x.detach())
        told = (state.selected.kept, *((state.video.first,) if state.video.first is not None else ()))
        (output,) = state.graph_module.graph.find_nodes(op="output")
        output.args = ((output.args[0][0], *told),)
        state.graph_module.recompile()

    def forward(self, pixel_values_videos: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Rows [K, C], and their places where somebody needs them."""
        pixels = pixel_values_videos.reshape(self._shape)
        inputs = [pixels if name is None else getattr(self, name) for name in self._inputs]
        rows, kept, *first = self._forms[0].run(*inputs)
        rows = rows.flatten(0, -2)
        if not self._keeps_places:
            return rows
        frame, token = kept[0].unbind(1)
        return rows, (first[0][frame] if first else frame) * self._tokens + token


class _InForms(Interpreter):
    """Runs a graph with our operators in the forms that can be exported, for videos of ``most`` frames at most."""

    def __init__(self, graph_module: GraphModule, most: int) -> None:
        super().__init__(graph_module)
        self._most = most

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = str(target).removesuffix(".default")
        if not name.startswith("earlytom."):
            return super().call_function(target, args, kwargs)
        return _FORMS[name.removeprefix("earlytom.")](*args, **kwargs, most=self._most)


def _metadata(model: nn.Module, program: ExportedProgram, config: EarlyTomConfig, frames: int) -> dict[str, str]:
    """What a program takes, gives and was made of, as text."""
    nodes = {node.name: node for node in program.graph.nodes}
    taken, given = (
        {name: _describe(nodes[name].meta["val"]) for name in names}
        for names in (program.graph_signature.user_inputs, program.graph_signature.user_outputs)
    )
    outputs = dict(zip(("rows", "places"), given.values(), strict=False))
    return {
        "model": type(model).__name__,
        "frames": str(frames),
        "inputs": json.dumps(taken),
        "outputs": json.dumps(outputs),
        "options": json.dumps(
            {field.name: getattr(config, field.name) for field in fields(config) if field.name not in NOT_EXPORTED}
        ),
        "earlytom_compile": _version("earlytom-compile"),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"  # run from its sources


def _describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
