"""Numbers come with the machine and the versions they were measured with."""

import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from earlytom_compile.benchmarks import environment as module
from earlytom_compile.benchmarks.environment import environment

CPU = torch.device("cpu")


def test_versions_are_those_that_run():
    about = environment(CPU)
    assert about["torch"] == torch.__version__ and about["earlytom"] == version("earlytom-compile")
    threads = torch.get_num_threads()
    assert about["machine"].endswith(f", {threads} thread" + "s" * (threads > 1))
    assert not {"cuda", "driver", "triton"} & about.keys()


def test_the_processor_is_called_by_its_model(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_CPU_INFO", tmp_path / "cpuinfo")
    assert environment(CPU)["machine"].startswith(module.platform.machine())
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Abacus 9000: fast\nmodel name\t: other\n")
    assert environment(CPU)["machine"].startswith("Abacus 9000: fast, ")


def test_the_commit_is_that_of_the_checkout():
    if not (Path(module.__file__).parents[1] / ".git").exists():
        pytest.skip("not in a checkout")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert head.stdout.startswith(environment(CPU)["commit"])


def test_what_is_not_there_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_HERE", tmp_path / "site-packages" / "earlytom_compile" / "benchmarks")
    assert not {"commit", "changed"} & environment(CPU).keys()


def test_a_gpu_comes_with_its_driver(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(module, "_output", lambda *command: "580.1\n580.1" if command[0] == "nvidia-smi" else None)
    about = environment(torch.device("cuda"))
    assert (about["machine"], about["cuda"], about["driver"]) == ("NVIDIA H200", "13.0", "580.1")
