"""Commands start their own process groups, so the world that earlier tests shared must be gone."""

import sys

import pytest


@pytest.fixture(scope="module", autouse=True)
def no_world_of_other_tests() -> None:
    """Leave the process groups that tests of other folders keep to the end of the session."""
    if "torch.distributed" in sys.modules and sys.modules["torch.distributed"].is_initialized():
        from megaprot.pretrain import parallel

        parallel.stop_processes()
