"""A run folder must be the same folder on every node: checked at the start, before hours of work cannot be saved."""

from __future__ import annotations

import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megaprot.common.errors import InputError, RunError
from megaprot.pretrain.parallel import Place

_PATIENCE_SECONDS = 30.0  # network file systems may show a new file late


def require_shared(folder: Path, place: Place) -> None:
    """Raise InputError on all ranks alike unless every one sees the file that rank 0 puts into ``folder``.

    Raises:
        RunError: rank 0 cannot write to the folder.
    """
    if place.world_size == 1:
        return
    message = ["", ""]  # name of the file, or why there is none
    mine = folder / f".seen-{uuid.uuid4().hex}"
    if place.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mine.touch()
            message[0] = mine.name
        except OSError as error:
            message[1] = f"run.dir {folder} cannot be written ({error.strerror}); free the disk or name another."
    dist.broadcast_object_list(message, src=0)
    if message[1]:
        raise RunError(message[1])
    blind: list[Any] = [None] * place.world_size
    dist.all_gather_object(blind, "" if _appears(folder / message[0]) else socket.gethostname())
    if place.is_main:
        mine.unlink(missing_ok=True)
    for rank, host in enumerate(blind):
        if host:
            raise InputError(
                f"run.dir {folder} on {host} (rank {rank}) is not the folder that rank 0 writes to; name one on a file "
                "system that all nodes share."
            )


def _appears(path: Path) -> bool:
    """Whether ``path`` is there, or comes within half a minute."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            return False
        if path.parent.is_dir():
            os.listdir(path.parent)  # makes NFS look again
        time.sleep(0.2)
    return True
