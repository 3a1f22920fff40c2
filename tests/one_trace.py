"""Dynamo traces a model once, and then any number of backends compile what it found.

Of the seconds that it takes to compile a tiny model with ``backend="earlytom"``, most are Dynamo's own, and the graph
that it hands over does not depend on our options. So tests that differ in nothing but options share it:

    trace = OneTrace(model.forward)
    compiled = trace.through(backend)          # instead of torch.compile(model, backend=backend, dynamic=False)
    compiled(**inputs)                         # traces this shape
    trace.through(another_backend)(**inputs)   # compiles what was traced

A fixture of the name ``one_trace`` keeps conftest.py from resetting Dynamo before each test that asks for it.
"""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch._guards import CompileContext, TracingContext, compile_context, tracing
from torch.fx import GraphModule


class OneTrace:
    """``torch.compile(function, dynamic=False)``, whose backend is chosen at every call."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._compiled = torch.compile(function, backend=self._hand_over, dynamic=False)
        self._backend: Callable[..., Any] | None = None

    def through(self, backend: Callable[..., Any]) -> Callable[..., Any]:
        """The function compiled by ``backend``, as ``torch.compile(function, backend=backend)`` would."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._backend = backend
            with torch._dynamo.config.patch(recompile_limit=1000):
                return self._compiled(*args, **kwargs)

        return call

    def _hand_over(self, graph_module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        # Dynamo strips its graph once the backend has answered, and a backend edits what it gets.
        untouched = GraphModule(graph_module, copy.deepcopy(graph_module.graph))
        contexts = (tracing, TracingContext.get()), (compile_context, CompileContext.get())
        last: tuple[Any, Callable[..., Any]] | None = None

        def run(*args: Any) -> Any:
            nonlocal last
            if last is None or last[0] is not self._backend:
                with ExitStack() as stack:
                    for enter, context in contexts:
                        stack.enter_context(enter(context))
                    graph = GraphModule(untouched, copy.deepcopy(untouched.graph))
                    graph.meta["traced"] = untouched
                    last = self._backend, self._backend(graph, example_inputs)
            return last[1](*args)

        return run
