"""What tests of ``generate()`` in place share: inputs in all layouts, and the two sides of a comparison."""

import copy
from dataclasses import replace

import torch
from one_trace import OneTrace
from oracle import compressed_generate

import earlytom_compile
from earlytom_compile import reporting
from earlytom_compile.integrations import video_encoder, vision_path
from earlytom_compile.integrations.caches import cache_name
from earlytom_compile.stages import CompressedGraph

OPTIONS = {"variant": "paper", "merge_layers": (0, 2), "reuse": False, "tau_seg": 0.3, "retain_ratio": 0.2}
NEW = 6
LAYOUTS = {
    "one": {},
    "batch of different prompts": {"videos_per_row": (1, 1, 1), "before": (1, 6, 3), "after": (4, 1, 9)},
    "two videos in a row": {"videos_per_row": (2,)},
    "different numbers of videos": {"videos_per_row": (2, 0, 1)},
    "left padding": {"videos_per_row": (1, 1), "left_padding": (0, 7)},
    "images beside videos": {"videos_per_row": (1, 1), "images_per_row": (1, 0)},
}


def compiled(model, **options):
    return earlytom_compile.compile(model, **{"lowering": "eager", **OPTIONS, **options})


def trace_of_video_rows():
    """For :func:`share_vision_paths`, in tests that want one trace of a model for each shape of its videos."""
    return OneTrace(vision_path.video_rows)


def share_vision_paths(one_trace, monkeypatch, **options):
    """Models compiled in place trace their vision through ``one_trace``, each with its own options but for these.

    What Inductor has no part in is also rewritten once for all models of the same options."""
    compile_graph, rewritten = vision_path.compile_graph, one_trace.__dict__.setdefault("rewritten", {})

    def rewritten_once(graph_module, example_inputs, config, **kwargs):
        if config.lowering != "eager":
            return compile_graph(graph_module, example_inputs, config, **kwargs)
        same = repr(config), *(value for name, value in sorted(kwargs.items()) if name != "kinds")
        known = rewritten.setdefault(graph_module.meta["traced"], {})
        if same not in known:
            got = compile_graph(graph_module, example_inputs, config, **kwargs)
            if not isinstance(got, CompressedGraph):
                return got
            known[same] = got
        twin = copy.copy(known[same])  # which knows of its own calls alone
        told = {name: copy.copy(value) for name, value in vars(twin.record).items()}
        reporting.discard_record(twin.record)
        twin.record = reporting.add_record(reporting.GraphRecord(**told), example_inputs)
        return twin

    class SharedPath(vision_path.VisionPath):
        def __init__(self, family, config, any_length, kinds, cause):
            super().__init__(family, replace(config, **options), any_length, kinds, cause)
            self._compiled = one_trace.through(self._backend)

    monkeypatch.setattr(video_encoder, "VisionPath", SharedPath)
    monkeypatch.setattr(vision_path, "compile_graph", rewritten_once)


def new_tokens(model, inputs, **kwargs):
    """Generate and check the first promise: the caller's own prompt comes first."""
    kwargs = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **kwargs}
    output = model.generate(**inputs, **kwargs)
    prompt = inputs["input_ids"]
    assert torch.equal(output[:, : prompt.shape[1]], prompt.repeat_interleave(len(output) // len(prompt), 0))
    return output[:, prompt.shape[1] :]


def given(model, cache):
    """A cache as an argument of the model, by the name that its transformers gives it."""
    return {cache_name(model.forward): cache}


def oracle_tokens(model, inputs, **options):
    earlytom_compile.restore(model)
    return compressed_generate(model, inputs, NEW, **{"variant": "paper", **OPTIONS, **options})


def graphs_compiled():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
