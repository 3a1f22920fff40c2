"""Runs a rewritten graph on fake tensors: does it fit together, and what shapes does everything have now?

h.view(sym_size(h, 0), 36, -1, 8)      [n, 36, 4, 8], n known at run time only
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._prims_common import is_contiguous_or_false
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from earlytom_compile.passes.axis_call import MARK
from earlytom_compile.passes.patterns import op_name
from earlytom_compile.passes.reasons import NotApplicable, describe
from earlytom_compile.passes.video_sizes import HINT

log = logging.getLogger(__name__)


@contextmanager
def data_dependent_sizes() -> Iterator[None]:
    """Allow sizes that depend on the data while the current graph is checked and lowered.

    Without it, torch raises inside the backend and Dynamo turns that into a silent graph break.
    """
    fake_mode = torch._guards.TracingContext.get().fake_mode
    assert fake_mode is not None and fake_mode.shape_env is not None
    shape_env, before = fake_mode.shape_env, fake_mode.shape_env.settings
    shape_env.settings = replace(before, allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True)
    try:
        yield
    finally:
        shape_env.settings = before


def _hint(size: torch.SymInt, likely: int) -> None:
    """What Inductor takes a size known only at run time for; without a hint, for thousands of frames."""
    shape_env = size.node.shape_env
    assert shape_env is not None
    shape_env.var_to_hint_override[size.node.expr] = likely


POSITION_WISE = frozenset({"linear", "layer_norm", "gelu", "silu"})
"""Functions of the last axis, whatever the others are; so is ``layer_norm``, unless it is one of several axes, and so
are operators marked as such."""


class Recorder(Interpreter):
    """Records as ``example_value`` what comes out of every node."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        self.current: Node = next(iter(graph_module.graph.nodes))
        self.before = {node: node.meta.get("example_value") for node in graph_module.graph.nodes}

    def run_node(self, n: Node) -> object:
        self.current = n
        result = self._of_each_position(n)
        if result is None:
            result = super().run_node(n)
        if n.op not in ("placeholder", "output"):
            n.meta["example_value"] = result
        if isinstance(result, torch.SymInt) and HINT in n.meta:
            _hint(result, n.meta[HINT])
        return result

    def _of_each_position(self, n: Node) -> torch.Tensor | None:
        """What it was, for other positions. PyTorch's symbolic shapes of these functions take half of all the time."""
        marked = n.meta.get(MARK)
        if marked is None and op_name(n) not in POSITION_WISE:
            return None
        source = marked if marked is not None else n.args[0] if n.args else None
        if not isinstance(source, Node):
            return None
        x, was, out = self.env[source], self.before[source], self.before[n]
        if not (isinstance(was, torch.Tensor) and isinstance(out, torch.Tensor) and is_contiguous_or_false(x)):
            return None
        if op_name(n) == "layer_norm" and (len(n.args) < 2 or len(n.args[1]) != 1):  # type: ignore[arg-type]
            return None
        if x.dim() != was.dim() or not statically_known_true(x.shape[-1] == was.shape[-1]):
            return None
        sizes = (*x.shape[:-1], out.shape[-1])
        strides = [math.prod(sizes[axis + 1 :]) for axis in range(x.dim())]
        return out.new_empty_strided(sizes, strides)


def run_on_fake_tensors(graph_module: GraphModule) -> None:
    """Run the rewritten graph on fake tensors; records the new shapes, raises NotApplicable if they clash."""
    inputs = [node.meta["example_value"] for node in graph_module.graph.nodes if node.op == "placeholder"]
    # Dynamo's own fake mode, not the one it made for the backend: the recorded inputs belong to it.
    fake_mode = next(x.fake_mode for x in inputs if isinstance(x, FakeTensor))
    assert fake_mode.shape_env is not None
    # Some shape functions in C++ cannot take a size that is known only at run time; the Python ones can.
    python_shapes = enable_python_dispatcher()
    with (
        data_dependent_sizes(),
        fake_mode,
        python_shapes,
        fake_mode.shape_env.ignore_fresh_unbacked_symbols(),
    ):
        recorder = Recorder(graph_module)
        try:
            recorder.run(*inputs)
        except Exception as error:
            log.debug("the rewritten graph does not fit together", exc_info=True)
            said = next((line for line in str(error).splitlines() if line.strip()), "")
            raise NotApplicable(
                f"the rewritten graph does not fit together: {describe(recorder.current)} cannot do with numbers of "
                f"frames or tokens that are known at run time only ({type(error).__name__}: {said[:200]})",
                "This model does something with frame or token counts that is not understood; please report it",
            ) from error
