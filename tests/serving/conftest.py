"""Engines run in processes of their own: the compiler of this one is not theirs."""

import pytest
from vllm_checkpoint import with_published_names


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    return with_published_names(tmp_path_factory.mktemp("checkpoints") / "toy")
