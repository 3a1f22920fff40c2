"""Which family a model belongs to is found out without importing anything, and versions belong to families."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_llava_onevision
from transformers import LlavaNextForConditionalGeneration, LlavaOnevisionForConditionalGeneration

import earlytom_compile
from earlytom_compile import EarlyTomConfigError, EarlyTomFallbackWarning, report
from earlytom_compile.families import base, registry
from earlytom_compile.families.base import Family
from earlytom_compile.families.registry import family_of, has_family
from earlytom_compile.prompt import locate_runs


@pytest.fixture(scope="module")
def model():
    return tiny_llava_onevision(vision_layers=2, text_layers=1)


def test_a_subclass_belongs_to_the_family_of_its_class(model):
    class Mine(LlavaOnevisionForConditionalGeneration):
        pass

    assert family_of(model).name == "LLaVA-OneVision"
    assert family_of(Mine(model.config)) is family_of(model)


def test_a_class_of_remote_code_has_a_commit_in_its_name(monkeypatch):
    class Mine(torch.nn.Module):
        pass

    class Remote(Family):
        name, classes = "remote", ("transformers_modules.*.modeling_mine.Mine",)

    Mine.__module__, Mine.__qualname__ = "transformers_modules.me.model.0f3c9d.modeling_mine", "Mine"
    monkeypatch.setattr(registry, "_of_other_packages", lambda: [Remote()])
    assert family_of(Mine()).name == "remote"


def test_an_outside_family_serves_the_subclass_it_names(model, monkeypatch):
    class Mine(LlavaOnevisionForConditionalGeneration):
        pass

    class Other(Family):
        name, classes = "other", (f"{__name__}.{Mine.__qualname__}", *registry.BUILT_IN[0].classes)

    monkeypatch.setattr(registry, "_of_other_packages", lambda: [Other()])
    assert family_of(Mine(model.config)).name == "other"
    assert family_of(model).name == "LLaVA-OneVision"


def test_an_unknown_class_is_told_what_there_is_and_what_is_near():
    class Unknown(torch.nn.Module):
        pass

    with pytest.raises(EarlyTomConfigError) as caught:
        earlytom_compile.compile(Unknown())
    for part in (
        "LlavaOnevisionForConditionalGeneration (LLaVA-OneVision)",
        "LlavaNextVideoForConditionalGeneration (LLaVA-NeXT-Video)",
        "got Unknown",
        'torch.compile(model, backend="earlytom")',
        "docs/adding-a-model.md",
    ):
        assert part in str(caught.value)
    assert "nearest" not in str(caught.value)
    near = LlavaNextForConditionalGeneration.__new__(LlavaNextForConditionalGeneration)
    with pytest.raises(EarlyTomConfigError, match="to which LlavaNextVideoForConditionalGeneration is the nearest"):
        earlytom_compile.compile(near)
    same = type("LlavaNextVideoForConditionalGeneration", (torch.nn.Module,), {})
    with pytest.raises(
        EarlyTomConfigError, match=r"to which transformers\.models\.llava_next_video\.\S+ is the nearest"
    ):
        earlytom_compile.compile(same())


def test_two_families_of_one_class_are_told(monkeypatch):
    class Mine(torch.nn.Module):
        pass

    class First(Family):
        name, classes = "first", (f"{__name__}.{Mine.__qualname__}",)

    class Second(First):
        name, classes = "second", ("*.Mine",)

    monkeypatch.setattr(registry, "_of_other_packages", lambda: [First(), Second()])
    with pytest.warns(
        EarlyTomFallbackWarning, match=r"Mine is claimed by .* first \(.*\) and second .* the first is used"
    ):
        assert family_of(Mine()).name == "first"


@pytest.mark.parametrize("version", ["5.16.2", "4.51.3", "5.17.0.dev0"])
def test_a_version_that_is_too_old_is_named(model, monkeypatch, version):
    monkeypatch.setattr(base, "_version_of", lambda package: version)
    with pytest.raises(EarlyTomConfigError, match=f"needs transformers >=5.17, but {version} is installed"):
        earlytom_compile.compile(model)
    assert report(model).state == "never compiled"


def test_what_is_too_old_or_missing_is_not_prepared(monkeypatch):
    def prepare(family):
        raise AssertionError

    monkeypatch.setattr("earlytom_compile.families.llava_onevision.LlavaOnevision.prepare", prepare)
    monkeypatch.setattr("earlytom_compile.families.llava_next_video.LlavaNextVideo.prepare", prepare)
    for version in ("4.55.4", None):
        monkeypatch.setattr(base, "_version_of", lambda package, version=version: version)
        registry.make_traceable()


def test_has_family(model):
    assert has_family(model.modules()) and not has_family(model.model.modules())


def test_videos_are_next_to_each_other_unless_they_say_so():
    assert locate_runs(torch.tensor([[9, 9, 5, 9], [9, 5, 5, 5]]), 9, [2, 1, 1]) == [
        [[range(0, 2)], [range(3, 4)]],
        [[range(0, 1)]],
    ]


WITHOUT = """
import sys
sys.modules["transformers"] = None
import importlib, pkgutil
import earlytom_compile, earlytom_compile.backend, earlytom_compile.integrations as rooms
names = [module.name for module in pkgutil.iter_modules(rooms.__path__)]
assert "generate" in names and "preprocess" in names
for name in names:
    importlib.import_module(f"earlytom_compile.integrations.{name}")
import torch
fast = torch.compile(torch.nn.Sequential(torch.nn.Linear(3, 3)), backend="earlytom", options={"lowering": "eager"})
try:
    earlytom_compile.compile(torch.nn.Linear(2, 2))
except earlytom_compile.EarlyTomConfigError as error:
    print(error)
"""


def test_the_core_imports_without_transformers():
    finished = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "got Linear" in finished.stdout
    assert "transformers" not in finished.stderr


def test_the_page_about_adding_a_model_says_what_is_there():
    """Its first example is a family, all that it names exists, and its links lead somewhere."""
    page = Path(__file__).parents[2] / "docs" / "adding-a-model.md"
    text = page.read_text(encoding="utf-8")
    named: dict = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1), named)
    family = named["MyVideoModel"]()
    assert isinstance(family, Family) and family.frame_shape(None) == (3, 336, 336)
    steps = text[text.index("1. **`classes`**") : text.index("## Registering it")]
    assert all(hasattr(family, name) for name in re.findall(r"\*\*`(\w+)`\*\*", steps))
    public = {name for name in vars(Family) if not name.startswith("_")} - {"spelled", "require_versions"}
    told_elsewhere = {"by_our_names", "by_its_own_names", "model_type", "checkpoint", "model_class", "processor"}
    assert public - told_elsewhere <= set(re.findall(r"\*\*`(\w+)`\*\*", steps))
    for link in re.findall(r"\]\((\.\./[^)#]+)\)", text):
        assert (page.parent / link).is_file(), link
