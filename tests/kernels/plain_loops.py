"""``while_loop`` as Python has it: outside of a trace torch would compile each loop."""

from contextlib import contextmanager

import pytest


@contextmanager
def looping(module):
    """Loops of ``module`` run so."""

    def loop(goes_on, step, state):
        while goes_on(*state):
            state = step(*state)
        return state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "while_loop", loop)
        yield
