"""How hard the tests that draw their inputs try.

    @examples(40)    ->    the same 40 inputs every time in `make test`, 400 new ones in `make test-all`

conftest.py has the two profiles; ``--hypothesis-profile=long --hypothesis-seed=7`` gives the long one a seed.
"""

from hypothesis import settings

QUICK, LONG = 100, 1000
"""Examples of a test that does not say how many, in the quick profile and in the long one."""


def examples(quick: int) -> settings:
    """``quick`` inputs in the quick profile, ten times as many in the long one."""
    return settings(max_examples=quick * settings.default.max_examples // QUICK)
