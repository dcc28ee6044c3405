"""A run in a process of its own that kills itself at a chosen moment of a save.

Moments are the calls with which a save changes the file system. At a sync the file is first cut in half, as a power cut
would leave it.
"""

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megaprot.pretrain.config import PretrainConfig
from megaprot.pretrain.training import Training
from tests.pretrain.runs import begin, run
from tests.pretrain.tiny import world_of_one

CALLS = ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir")


def path_of(argument: Any, directory: Any) -> Path:
    """The file a call is about: a path, a descriptor, or a name inside an open folder."""
    if isinstance(argument, int):
        return Path(os.readlink(f"/proc/self/fd/{argument}"))
    return Path(os.readlink(f"/proc/self/fd/{directory}")) / argument if isinstance(directory, int) else Path(argument)


def watch_calls(kill_at: int, said: Connection) -> None:
    """Send the name of each moment from now on through ``said``; die at number ``kill_at``."""
    moments = 0
    for name in CALLS:
        original = getattr(os, name)

        def call(argument: Any, *more: Any, _name: str = name, _original: Any = original, **options: Any) -> Any:
            nonlocal moments
            path = path_of(argument, options.get("dir_fd", options.get("src_dir_fd")))
            said.send(f"{_name} {path.name}")
            if moments == kill_at:
                if _name == "fsync" and path.is_file():
                    os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            moments += 1
            return _original(argument, *more, **options)

        setattr(os, name, call)


def go_on(config: PretrainConfig, kill_at: int, said: Connection) -> None:
    """Go on with a run to its end, its last save watched."""
    with world_of_one() as place:
        training = begin(config, place)
        save = Training.save

        def watched_save(is_last: bool = False) -> None:
            if training.state.step == config.train.num_steps and training.saved_step != training.state.step:
                watch_calls(kill_at, said)
            save(training, is_last)
            said.send("saved")

        training.save = watched_save  # type: ignore[method-assign]
        run(training)


def save_killed_at(config: PretrainConfig, kill_at: int) -> list[str]:
    """Go on with the run of ``config`` in a process that dies at moment ``kill_at`` (-1: never); returns them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    listening, speaking = context.Pipe(duplex=False)
    process = context.Process(target=go_on, args=(config, kill_at, speaking))
    process.start()
    speaking.close()
    moments = []
    while True:
        try:
            moments.append(listening.recv())
        except EOFError:
            break
    process.join()
    assert process.exitcode == (0 if kill_at < 0 else -signal.SIGKILL), (process.exitcode, moments)
    return moments
