"""The models that lmms-eval finds once this package is installed beside it.

    python -m lmms_eval --model earlytom --model_args pretrained=path/or/hub-id,retain_ratio=0.2 --tasks mvbench ...

``lmms_eval`` asks for :func:`manifests` by the entry point group ``lmms_eval.models``; nothing of it is imported
before. ``docs/lmms-eval.md`` says what to call.
"""

from typing import Any

_MODELS = {
    "earlytom": "EarlyTom",
    "earlytom_llava_onevision_hf": "EarlyTomLlavaOnevisionHf",
    "earlytom_llava_onevision": "EarlyTomLlavaOnevision",
}
"""Name for ``--model`` -> class in ``model.py`` for its simple tasks; that for chat tasks ends in ``Chat``."""


def manifests() -> list[Any]:
    """A ``lmms_eval.models.registry_v2.ModelManifest`` for each model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    place = f"{__name__}.model"
    return [
        ModelManifest(name, simple_class_path=f"{place}.{kind}", chat_class_path=f"{place}.{kind}Chat")
        for name, kind in _MODELS.items()
    ]
