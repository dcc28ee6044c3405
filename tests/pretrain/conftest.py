"""Tests of the model share one world of one process, since megatron-core's groups are global to a process."""

from collections.abc import Iterator

import pytest

from megaprot.pretrain.parallel import Place
from tests.pretrain.tiny import world_of_one


@pytest.fixture(scope="session")
def alone() -> Iterator[Place]:
    with world_of_one() as place:
        yield place
