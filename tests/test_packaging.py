"""What is installed is what is meant: one importable package, its entry points, no dependency too many."""

import ast
import email
import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from effort import cases
from oracle import compressed_forward
from packaging.requirements import Requirement
from tiny_models import tiny_llava_onevision, video_inputs

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy so that building leaves nothing in the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("earlytom_compile", "benchmarks", "passes", "kernels", "examples"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", folder, source], check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed_python(wheel, tmp_path_factory):
    """Python of an environment that has the wheel, and sees the dependencies of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel]
    subprocess.run(pip, check=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    # A plain path line: .pth files lying there, such as an editable install's, are not read.
    dependencies = Path(importlib.metadata.distribution("torch").locate_file(""))
    (site_packages / "dependencies.pth").write_text(f"{dependencies}\n")
    return python


def run_in_root(python, code, *arguments):
    """Run ``code`` where a folder named ``kernels`` lies in sight, as from a user's clone."""
    hidden = ("PYTHONSAFEPATH", "PYTHONPATH")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    command = [python, "-c", code, *arguments]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def test_the_wheel_has_one_top_level_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"earlytom_compile"}
    for folder in ("benchmarks", "passes", "kernels"):
        there = {name.removeprefix("earlytom_compile/") for name in names if f"/{folder}/" in name}
        assert there == {f"{folder}/{file.name}" for file in (ROOT / folder).glob("*.py")}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_every_package_of_the_source_is_in_the_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for file in (ROOT / "earlytom_compile").rglob("*.py"):
        assert file.relative_to(ROOT).as_posix() in names


@pytest.mark.parametrize("world", ["toyworld", "photoworld"])
def test_a_world_is_in_the_wheel_with_its_weights(wheel, world):
    names = set(zipfile.ZipFile(wheel).namelist())
    folder = ROOT / "examples" / world
    files = [*folder.glob("*.py"), *(folder / "weights").iterdir()]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {file.name for file in files}
    for file in files:
        assert f"earlytom_compile/{world}/{file.relative_to(folder).as_posix()}" in names
    assert sum(file.stat().st_size for file in (folder / "weights").iterdir()) < 10_000_000


def test_entry_points(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    text = archive.read(name).decode()
    assert "[torch_dynamo_backends]\nearlytom = earlytom_compile.backend:earlytom" in text
    assert "[console_scripts]\nearlytom = earlytom_compile.cli.main:main" in text
    assert "[lmms_eval.models]\nearlytom = earlytom_compile.integrations.lmms_eval:manifests" in text
    assert "earlytom_compile/integrations/lmms_eval/model.py" in archive.namelist()


def test_dependencies_are_few_and_torchvision_is_none_of_them(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(archive.read(name))
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    hard = {needed.name for needed in requirements if "extra" not in str(needed.marker)}
    assert hard == {"torch", "transformers", "triton", "av", "numpy", "packaging", "safetensors", "rich"}
    (transformers,) = [needed for needed in requirements if needed.name == "transformers"]
    assert transformers.specifier.contains("4.46.3")  # a family says what its models need
    assert metadata["License-Expression"] == "Apache-2.0"
    (triton,) = [needed for needed in requirements if needed.name == "triton"]
    assert not triton.marker.evaluate({"sys_platform": "darwin"})


@pytest.mark.parametrize("folder", ["kernels", "passes"])
def test_top_level_folders_hold_a_docstring_only(folder):
    """transformers probes for a package named ``kernels`` by importing it: that must do nothing."""
    body = ast.parse((ROOT / folder / "__init__.py").read_text()).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)


FRESH = """
import sys, torch
from transformers import LlavaOnevisionForConditionalGeneration
assert not any(name.startswith("earlytom") for name in sys.modules)
sys.path.remove("")  # where a folder named earlytom_compile lies, too, which is not the one that is installed
assert "earlytom" in torch.compiler.list_backends()
folder, lowering = sys.argv[1:]
model = LlavaOnevisionForConditionalGeneration.from_pretrained(folder).eval()
fast = torch.compile(model, backend="earlytom", options={"lowering": lowering, "variant": "paper"})
with torch.inference_mode():
    logits = fast(**torch.load(folder + "/inputs.pt")).logits
torch.testing.assert_close(logits, torch.load(folder + "/logits.pt"), atol=1e-4, rtol=1e-4)
counters = torch._dynamo.utils.counters
assert not counters["graph_break"], counters
assert counters["stats"]["unique_graphs"] == 1, counters
for part in ("", ".kernels.merge_frames", ".passes.manager"):
    print(sys.modules["earlytom_compile" + part].__file__)
"""


@pytest.mark.parametrize("lowering", cases(("eager",), among=[("eager",), ("staged",)]))
def test_a_fresh_process_finds_the_backend_by_its_name(installed_python, tmp_path, lowering):
    """In the repository's root, where transformers must import too. Of us it has what is in the wheel."""
    model = tiny_llava_onevision(vision_layers=3, text_layers=1)
    inputs = video_inputs(model, 8)
    with torch.no_grad():
        expected = compressed_forward(model, inputs, retain_ratio=0.2, variant="paper")
    model.save_pretrained(tmp_path)
    torch.save(inputs, tmp_path / "inputs.pt")
    torch.save(expected.logits, tmp_path / "logits.pt")
    files = run_in_root(installed_python, FRESH, tmp_path, lowering).splitlines()
    assert len(files) == 3 and all(Path(file).is_relative_to(installed_python.parents[1]) for file in files)
