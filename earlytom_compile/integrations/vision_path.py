"""Videos of one kind through the compiled code of their family.

path = VisionPath(family, config, any_length=True, kinds={}, cause="...")
rows, compressed = path(model, video)     # [K, C], (the graph that compressed them, what it kept)
                                          # or [N, C], None
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import GraphModule

from ..backend import compile_graph
from ..config import EarlyTomConfig
from ..errors import EarlyTomCompileError, EarlyTomConfigError, EarlyTomError
from ..families.base import Family, Video
from ..reporting import Counts
from ..stages import LAST_COUNTS, CompressedGraph, Kinds
from ..words import counted
from .own_trace import changed_in_trace
from .placement import video_path, weights_in_place
from .tracing import FirstCallAlone, mark_static, with_its_own_code


class VisionPath:
    """The compiled vision path for one resolution and, unless ``any_length``, one number of frames. With
    ``frames_only`` it is that of a tower alone, and the rows are its frames [N, S, D]."""

    def __init__(
        self,
        family: Family,
        config: EarlyTomConfig,
        any_length: bool,
        kinds: Kinds,
        cause: str,
        *,
        frames_only: bool = False,
    ) -> None:
        self._family = family
        self._config = config
        self._cause = cause
        self._kinds = kinds
        self._any_length = any_length
        self._frames_only = frames_only
        self.graphs: list[CompressedGraph] = []
        self._traced: set[Any] = set()  # Dynamo's functions: several where a graph break cut ours
        self._compiled = FirstCallAlone(torch.compile(with_its_own_code(video_rows), backend=self._backend))

    @property
    def told(self) -> bool:
        """Whether compiling gave reasons, in warnings, why calls run uncompressed."""
        return bool(self._traced) and not self.graphs

    @property
    def broken(self) -> bool:
        """Whether Dynamo could not trace everything to one graph."""
        return len(self._traced) > 1

    def __call__(self, model: Any, video: Video) -> tuple[torch.Tensor, tuple[CompressedGraph, Counts] | None]:
        """Rows [K, C]; the graph that compressed them in this call and what it kept, None if none did."""
        token = LAST_COUNTS.set(None)
        try:
            with video_path(model, self._family), blamed_on_rows(self._family):
                rows = self._compiled(self._family, model, *traced_arguments(video, self._any_length))
            compressed = LAST_COUNTS.get()
        except EarlyTomCompileError:
            if not self._frames_only:
                self.uncompiled(model, video)  # rows of a wrong shape are a better reason
            raise
        finally:
            LAST_COUNTS.reset(token)
        return rows if self._frames_only else _without_batch(rows, self._family), compressed

    def uncompiled(self, model: Any, video: Video) -> torch.Tensor:
        """Rows [N, C] by the model's own code."""
        with weights_in_place(model, self._family):
            rows = video_rows(self._family, model, *traced_arguments(video, any_length=False))
            return _without_batch(rows, self._family)

    def _backend(self, graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        compile_id = torch._guards.CompileContext.current_compile_id()
        self._traced.add(getattr(compile_id, "frame_id", None))
        cause = self._cause + changed_in_trace()
        compiled = compile_graph(
            graph_module,
            example_inputs,
            self._config,
            features_only=not self._frames_only,
            frames_only=self._frames_only,
            kinds=self._kinds,
            cause=cause,
        )
        if isinstance(compiled, CompressedGraph):
            self.graphs.append(compiled)
        return compiled


def _without_batch(rows: Any, family: Family) -> torch.Tensor:
    if not isinstance(rows, torch.Tensor) or rows.dim() not in (2, 3) or (rows.dim() == 3 and len(rows) != 1):
        given = list(rows.shape) if isinstance(rows, torch.Tensor) else f"a {type(rows).__name__}"
        raise EarlyTomConfigError(
            f"rows() of the family {family.name} returned {given}; must be one tensor [N, C] or [1, N, C], in which "
            "the tokens of each frame are behind those of the frame before."
        )
    return rows[0] if rows.dim() == 3 else rows


@contextmanager
def blamed_on_rows(family: Family) -> Iterator[None]:
    """An error inside, which keeps its type, says in a note whose code it comes from; ours say what they mean."""
    try:
        yield
    except EarlyTomError:
        raise
    except Exception as error:
        error.add_note(f"in rows() of the family {family.name}, compiled by earlytom_compile")
        raise


def video_rows(family: Family, model: Any, pixels: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """What Dynamo traces: rows [N, C] or [1, N, C] of one video [1, F, ...]."""
    return family.rows(model, pixels, **arguments)


def traced_arguments(video: Video, any_length: bool) -> tuple[torch.Tensor, dict[str, Any]]:
    """Pixels [1, F, ...] and arguments for :func:`video_rows`, of which Dynamo knows whether F may change."""
    arguments = {
        name: _of_one(value, any_length) if isinstance(value, torch.Tensor) else value
        for name, value in video.arguments.items()
    }
    for table in video.tables.values():
        mark_static(table, *range(table.dim()))
    return _of_one(video.pixels, any_length), {**arguments, **video.tables}


def _of_one(tensor: torch.Tensor, any_length: bool) -> torch.Tensor:
    batch = tensor.unsqueeze(0)
    # Not dynamic=False: that changes Dynamo's configuration in every call, which torch 2.11 has one of for all
    # threads. Two that meet there leave the whole process without automatic dynamic shapes.
    if any_length:
        mark_static(batch, 0, *range(2, batch.dim()))
        torch._dynamo.maybe_mark_dynamic(batch, 1)
    else:
        mark_static(batch, *range(batch.dim()))
    return batch


def kind_of(video: Video, any_length: bool) -> tuple[Any, ...]:
    """Videos of one kind go one path: all that is the same about them, but for the number of frames."""
    arguments = tuple((name, _kind_of_value(value)) for name, value in video.arguments.items())
    tables = tuple((name, (*table.shape, table.dtype, table.device)) for name, table in video.tables.items())
    return None if any_length else len(video.pixels), *_kind_of_value(video.pixels), arguments, tables


def _kind_of_value(value: Any) -> Any:
    return (*value.shape[1:], value.dtype, value.device) if isinstance(value, torch.Tensor) else repr(value)


def describe(video: Video, any_length: bool) -> str:
    """What a vision path is for, for the report."""
    pixels = video.pixels
    length = "2 and more frames" if any_length else counted(len(pixels), "frame")
    size = video.size or "x".join(map(str, pixels.shape[1:][-2:]))
    return f"videos of {length}, {size}, {str(pixels.dtype).removeprefix('torch.')} on {pixels.device}"
