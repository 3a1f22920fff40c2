"""What a report says to people, line by line.

>>> earlytom_compile.report(model)
state            compressing; the last call was compressed
vision encoder   model.vision_tower.encoder.layers (26 layers), reuses patches but in layers 23, 24, 25
video 0          frames 32, patches 23328 -> 7290 (changed beyond 0.06), tokens 6272 -> 627
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from .config import EarlyTomConfig
from .methods.registry import EARLYTOM
from .reused import ComputedPatches

NEVER_COMPILED = "never compiled"
NOT_CALLED = "compiled, not called yet"
COMPRESSING = "compressing"
NOTHING_YET = "called, nothing compressed so far"
RESTORED = "restored"
STATES = (NEVER_COMPILED, NOT_CALLED, COMPRESSING, NOTHING_YET, RESTORED)
"""What a report can say of a model; :func:`report` says which is which."""


def lines_of(content: Mapping[str, Any], config: EarlyTomConfig | None) -> list[tuple[str, str]]:
    """(heading, text) of each line; ``content`` is :meth:`Report.to_dict`, ``config`` what it was compiled with."""
    lines = [("state", _STATE_TEXTS[content["state"]].format(last_call=_LAST_CALL_TEXTS[content["last_call"]]))]
    if config is not None:
        lines.append(("options", _describe_options(config)))
    if encoder := content["encoder"]:
        operators = ", ".join(f"{count} {name}" for name, count in content["inserted"].items())
        layers = f"({encoder['layers']} layers), {_describe_layers(content, config)}"
        lines += [
            ("vision encoder", f"{encoder['module']} {layers}"),
            ("inserted", operators),
            ("computed by", _describe_providers(content["providers"])),
            ("lowering", f"{content['lowering']}{_describe_stages(content['stages'])}"),
        ]
    if graphs := content["cuda_graphs"]:
        used = sum(graph["used"] for graph in graphs)
        lines.append(("CUDA graphs", f"{used} of {len(graphs)} measured faster"))
    lines += [(f"video {index}", _describe_video(video)) for index, video in enumerate(content["videos"])]
    if content["prompt"]:
        inside = "".join(f", {step['prompt']} from layer {step['layer']} on" for step in content["inside"])
        lines.append(("prompt", "{} -> {} tokens".format(*content["prompt"]) + inside))
    if content["graphs"]:
        summary = (
            f"{content['graphs']} graphs in {content['compile_seconds']} s, {content['recompiles']} recompiles, "
            f"{content['graph_breaks']} graph breaks in this process"
        )
        lines.append(("compiled", summary))
        lines += [("", _describe_compilation(compilation)) for compilation in content["compilations"]]
    lines += [("left alone", reason) for reason in content["reasons"]]
    return lines


_STATE_TEXTS = {
    NEVER_COMPILED: "never compiled: earlytom_compile.compile(model) makes it compress its videos",
    NOT_CALLED: "compiled, not called yet: the first call with a video takes longer, since it compiles",
    COMPRESSING: "compressing; {last_call}",
    NOTHING_YET: "called, nothing compressed so far; {last_call}",
    RESTORED: "restored: the model's own code, as if it had never been compiled",
}
_LAST_CALL_TEXTS = {
    None: "no call since",
    "compressed": "the last call was compressed",
    "encoded": "the last call encoded videos for calls to come",
    "given": "the last call took videos that were encoded before",
    "no video": "the last call had no video and ran the model's own code",
    "uncompressed": "the last call kept all tokens",
    "failed": "the last call ended in an error",
}


def _describe_layers(content: Mapping[str, Any], config: EarlyTomConfig | None) -> str:
    """What happens in the layers of the vision encoder."""
    if config is not None and config.method != EARLYTOM and not config.reuses():
        return "no frames merge"
    if config is None or not config.reuses() or content["merge_layers"]:
        return f"merges after {', '.join(map(str, content['merge_layers'])) or 'none'}"
    full = ", ".join(map(str, content["full_layers"]))
    return f"reuses patches but in layers {full}" if full else "reuses patches in all of them"


def _describe_video(video: Mapping[str, Any]) -> str:
    frames = " -> ".join(map(str, video["frames"]))
    patches = ""
    if "patches" in video:
        found = ComputedPatches(**video["patches"])
        why = f"changed beyond {found.threshold:.3g}" if found.reused else "nothing was reused"
        patches = f"patches {found.every} -> {found.total} ({why}), "
    return f"frames {frames}, {patches}" + "tokens {} -> {}".format(*video["tokens"])


def _describe_options(config: EarlyTomConfig) -> str:
    """What a reader looks for first, and whatever else somebody has chosen."""
    default = EarlyTomConfig()
    always = ("retain_ratio", "variant" if config.method == EARLYTOM else "method")
    chosen = [
        f"{option.name}={value!r}"
        for option in fields(config)
        if (value := getattr(config, option.name)) not in (option.default, getattr(default, option.name))
        or option.name in always
    ]
    return ", ".join(chosen) + ", the others at their defaults"


def _describe_compilation(compilation: dict[str, Any]) -> str:
    again = " again" if compilation["recompile"] else ""
    cause = f": {compilation['cause']}" if compilation["cause"] else ""
    return f"{compilation['part']}{again}, {compilation['seconds']} s{cause}"


def _describe_providers(providers: dict[str, str]) -> str:
    operators: dict[str, list[str]] = {}
    for operator, provider in providers.items():
        operators.setdefault(provider, []).append(operator)
    if len(operators) == 1:
        return next(iter(operators))
    return "; ".join(f"{provider}: {', '.join(names)}" for provider, names in operators.items())


def _describe_stages(stages: list[int] | None) -> str:
    return f", {stages[0]} pieces of which {stages[1]} kinds are compiled" if stages else ""
