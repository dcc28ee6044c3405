"""What all tests share: one thread a process, repeatable property tests, `gpu` tests skipped without a CUDA device."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from tests.distributed.launched import Launched

# Set before any test imports torch: tests share few cores, and some start several processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # a test that needs them sets them
    os.environ.pop(name, None)
# Where a shell without job control starts the tests in the background it has them ignore Ctrl-C, and with them all that
# they start: tests that send it would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where torch sees no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def launched() -> Iterator[list[Launched]]:
    """Runs a test has started, ended after it."""
    runs: list[Launched] = []
    yield runs
    for run in runs:
        run.end()
