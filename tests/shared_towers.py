"""Towers that are compiled alone trace through one function, as whole models do with generating.share_vision_paths."""

from earlytom_compile.integrations import tower
from earlytom_compile.integrations.vision_path import VisionPath


def share_towers(one_trace, monkeypatch):
    """``compile_tower()`` traces through ``one_trace``, whatever the options; each still compiles with its own."""

    class SharedPath(VisionPath):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._made = {}
            self._compiled = one_trace.through(self._once)

        def _once(self, graph, inputs):
            traced = graph.meta["traced"]  # which comes again where encoders take turns
            if traced not in self._made:
                self._made[traced] = self._backend(graph, inputs)
            return self._made[traced]

    monkeypatch.setattr(tower, "VisionPath", SharedPath)
