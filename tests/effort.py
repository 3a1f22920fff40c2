"""How hard the tests that draw their inputs try.

    @examples(40)    ->    the same 40 inputs every time in `make test`, 400 new ones in `make test-all`

conftest.py has the profiles. ``pytest -m "hypothesis and not long" --hypothesis-profile=seeded --hypothesis-seed=7``
draws as many inputs as the quick one, but those of a seed.
"""

from itertools import cycle, islice, product

import pytest
from hypothesis import settings

QUICK, LONG = 100, 1000
"""Examples of a test that does not say how many, in the quick profile and in the long one."""


def examples(quick: int) -> settings:
    """``quick`` inputs in the quick profile, ten times as many in the long one."""
    return settings(max_examples=quick * settings.default.max_examples // QUICK)


def cases(*quick, among):
    """Parameters: all ``among``, of which the quick suite runs the ``quick`` ones.

    Where axes do not depend on each other in the code, each value of each and the most complex case prove what all
    combinations do; the long suite runs those.
    """
    assert all(case in among for case in quick)
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.long) for case in among]


def diagonal(*axes):
    """Parameters: all combinations, of which the quick suite runs as few as have each value of each axis.

    parametrize("layout, variant", diagonal(LAYOUTS, VARIANTS))
    """
    axes = [list(axis) for axis in axes]
    longest = max(map(len, axes))
    return cases(*zip(*(islice(cycle(axis), longest) for axis in axes), strict=True), among=list(product(*axes)))
