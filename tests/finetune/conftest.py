"""What tests of fine-tuning share."""

from collections.abc import Iterator

import pytest

from megaprot.finetune.processes import Place


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """A world of one for a module; that of earlier modules is not needed any more."""
    import torch.distributed as dist

    from megaprot.finetune.processes import processes
    from megaprot.pretrain import parallel

    if dist.is_initialized():
        parallel.stop_processes()
    with processes(5.0) as alone:
        yield alone
