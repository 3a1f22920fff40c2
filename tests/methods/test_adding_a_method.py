"""What docs/adding-a-method.md shows is what works: its package is installed, and its code is run."""

import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from generating import new_tokens
from tiny_models import tiny_llava_onevision, tokens_per_frame, video_inputs

import earlytom_compile
from earlytom_compile import EarlyTomConfig, EarlyTomConfigError
from earlytom_compile.methods import FrameTokens, Step, method_named, method_names, register_method, registry

PAGE = (Path(__file__).parents[2] / "docs" / "adding-a-method.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
FILE, INSIDE, TRYING, TESTING = BLOCKS
(ENTRY_POINTS,) = re.findall(r"^```toml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
FRAMES = 5


def install(folder, entries):
    """A package as pip leaves it, with the page's file in it."""
    package, described = folder / "my_package", folder / "my_package-1.0.dist-info"
    package.mkdir()
    described.mkdir()
    (package / "__init__.py").touch()
    (package / "zip_one.py").write_text(FILE)
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    lines = [f"[{registry.GROUP}]", *(f"{name} = {value}" for name, value in entries.items())]
    (described / "entry_points.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def nothing_known(monkeypatch):
    for known in ("_registered", "_of_packages"):
        monkeypatch.setattr(registry, known, {})
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


@pytest.fixture
def installed(tmp_path, monkeypatch, nothing_known):
    install(tmp_path, tomllib.loads(ENTRY_POINTS)["project"]["entry-points"]["earlytom_compile.methods"])
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture(scope="module")
def model():
    return tiny_llava_onevision(vision_layers=3, text_layers=3, image_size=32)


def test_an_installed_package_is_found_by_its_name_and_imported_when_it_is_asked_for(installed):
    assert "zip_one" in method_names() and "my_package" not in sys.modules
    EarlyTomConfig()
    assert "my_package" not in sys.modules
    method = method_named("zip_one")
    assert method.name == "zip_one" and method is method_named("zip_one") is sys.modules["my_package.zip_one"].METHOD


def test_the_page_can_be_tried_as_it_says(installed, model, capsys):
    names = {"model": model, "torch": torch, "earlytom_compile": earlytom_compile}
    names["inputs"] = video_inputs(model, FRAMES, videos_per_row=(2, 1), images_per_row=(0, 1))
    try:
        exec(TRYING, names)
    finally:
        earlytom_compile.restore(model)
    every = FRAMES * tokens_per_frame(model)
    printed = capsys.readouterr().out
    assert "method='zip_one'" in printed and printed.count(f"tokens {every} -> {round(every / 4)}") == 3


def test_the_pages_own_test_passes_and_can_fail(installed, monkeypatch):
    names = {}
    exec(TESTING, names)
    names["test_zip_one"]()
    method = method_named("zip_one")
    wrong = method.__class__("zip_one", "", keep=lambda video, budget: method.keep(last_first(video), budget))
    monkeypatch.setitem(registry._of_packages, "zip_one", wrong)
    with pytest.raises((AssertionError, ExceptionGroup)):
        names["test_zip_one"]()


def last_first(video):
    return FrameTokens(video.features, -video.importance, None)


def test_a_script_registers_its_own(nothing_known, model):
    names = {}
    exec(FILE, names)
    assert earlytom_compile.register_method is register_method
    assert earlytom_compile.register_method(names["METHOD"]) is names["METHOD"]
    inputs = video_inputs(model, FRAMES)
    compiled = earlytom_compile.compile(model, method="zip_one", retain_ratio=0.3, lowering="eager", strict=True)
    try:
        new_tokens(compiled, inputs)
        assert earlytom_compile.report(model).to_dict()["videos"][0]["tokens"][1] == round(0.3 * FRAMES * 16)
    finally:
        earlytom_compile.restore(model)


def test_steps_inside_are_those_of_the_page(nothing_known):
    names = {}
    exec(INSIDE, names)
    register_method(names["HALFWAY"])
    config = EarlyTomConfig(method="drop_at_2", retain_ratio=0.25)
    assert config.steps_inside(28) == (Step(2, 0.25, "drop", "last"),) and config.reduces_inside()
    assert config.token_budget(8, 16) == 128


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"zip_two": "my_package.zip_one:METHOD"}, "'zip_two': my_package.zip_one:METHOD is no .*Method of that name"),
        ({"zip_two": "my_package.zip_one:keep"}, "'zip_two': my_package.zip_one:keep is no .*Method of that name"),
        ({"zip_two": "my_package.zip_two:METHOD"}, "method='zip_two' of another package cannot be loaded: ModuleNot"),
    ],
)
def test_an_entry_point_that_is_wrong_is_named(tmp_path, monkeypatch, nothing_known, entry, message):
    install(tmp_path, entry)
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):
        with pytest.raises(EarlyTomConfigError, match=message):
            EarlyTomConfig(method="zip_two")


def test_what_the_page_names_is_there():
    linked = re.findall(r"\]\((\.\./[^)#]+|[\w./-]+\.md)\)", PAGE)
    missing = [name for name in linked if not (Path(__file__).parents[2] / "docs" / name).exists()]
    assert linked and not missing
