"""A log a rank and one merged view: what ranks print goes to files and on to the terminal."""

import threading
from pathlib import Path
from subprocess import Popen
from typing import IO, Any


class RankLog:
    """Copies the two outputs of one rank to its file and to the launcher's own, line by line.

    Args:
        process: The rank, started with pipes.
        file: Where its lines go; those of other starts are kept.
        rank: Its number; on the terminal the lines of all but rank 0 say whose they are.
        outputs: The launcher's standard output and standard error, as byte streams.
    """

    def __init__(self, process: "Popen[bytes]", file: Path, rank: int, outputs: tuple[IO[bytes], IO[bytes]]) -> None:
        self.file = open(file, "ab", buffering=0)  # noqa: SIM115  # open until both outputs end
        self.prefix = f"[rank {rank}] ".encode() if rank else b""
        self.threads = [
            threading.Thread(target=self._copy, args=pair, daemon=True)
            for pair in zip((process.stdout, process.stderr), outputs, strict=True)
        ]
        for thread in self.threads:
            thread.start()

    def _copy(self, source: IO[bytes], target: IO[bytes]) -> None:
        for line in source:
            for stream, words in ((self.file, line), (target, self.prefix + line)):
                try:
                    stream.write(words)
                    stream.flush()
                except OSError:  # a full disk or a closed terminal must not end the run
                    continue

    def close(self, seconds: float) -> None:
        """Wait at most ``seconds`` for the last lines: a process that a rank left behind may hold its outputs open."""
        for thread in self.threads:
            thread.join(seconds)
        if not any(thread.is_alive() for thread in self.threads):
            self.file.close()


def redirection(has_log: bool) -> dict[str, Any]:
    """Return Popen's arguments for a rank with a log, or for one that writes to the terminal itself."""
    from subprocess import PIPE

    return {"stdout": PIPE, "stderr": PIPE} if has_log else {}
