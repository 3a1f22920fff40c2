"""What several files share, encoded once."""

import pytest
from pools import fill_tiny


@pytest.fixture(scope="session")
def pools(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield fill_tiny(tmp_path_factory.mktemp("pool"), patch)
