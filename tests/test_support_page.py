"""The table of what works is about tests that there are."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)", PAGE)))


@pytest.mark.parametrize("file, test", NAMED)
def test_each_test_is_there(file, test):
    assert re.search(rf"^ *def {test}\(", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.MULTILINE)


def test_the_readme_says_the_same():
    """Family by family, yes or no in each column."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| \[?([\w.' -]+)[^|]*\| [\d.+ to]+ \|((?: (?:yes|no) \|)+)$", readme, re.MULTILINE)
    assert len(table) == PAGE.count("\n## ") and len(NAMED) > 20
    for family, cells in table:
        section = PAGE.split(f"\n## {family.strip()}\n")[1].split("\n## ")[0]
        told = re.findall(r"^\| (?!what|---)[^|]+ \| (no|`)", section, re.MULTILINE)
        assert ["no" if each == "no" else "yes" for each in told] == re.findall(r"yes|no", cells), family
