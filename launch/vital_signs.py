"""Which ranks of a node have stopped or hang, read from the lines they keep (written by ``megaprot.common.heartbeat``).

A rank's line is ``BEAT PROGRESS STEP PHASE``. BEAT grows each second while the process runs, PROGRESS while it gets on.
Only changes are looked at, never clocks.
"""

import time
from dataclasses import dataclass
from pathlib import Path

FOLDER_VARIABLE = "MEGAPROT_HEARTBEAT_FOLDER"
GAVE_UP = "gave up"
_SLOW_PHASES = ("starting", "loading", "saving", "validating")
_SLOW_PHASE_TIMES = 3


@dataclass
class Sign:
    """The last line of a rank and when its parts last changed, in seconds of this process's clock."""

    beat: int
    progress: int
    step: int
    phase: str
    beat_at: float
    progress_at: float


class VitalSigns:
    """Watches the lines of the ranks in a folder. Ranks without a line (other programs, or yet to start) are let alone.

    Args:
        folder: Where the ranks keep their lines.
        ranks: Their numbers.
        silent_seconds: Longest time without a beat.
        hang_seconds: Longest time without progress; three times that while a rank starts, loads, saves or validates.
    """

    def __init__(self, folder: Path, ranks: list[int], silent_seconds: float, hang_seconds: float) -> None:
        self.folder, self.ranks = folder, ranks
        self.silent_seconds, self.hang_seconds = silent_seconds, hang_seconds
        self.signs: dict[int, Sign] = {}

    def read(self) -> None:
        """Look at all lines once."""
        now = time.monotonic()
        for rank in self.ranks:
            try:
                words = (self.folder / f"rank_{rank}").read_text(encoding="utf-8").split(maxsplit=3)
                beat, progress, step = map(int, words[:3])
            except (OSError, ValueError):
                continue
            phase = words[3].strip() if len(words) > 3 else ""
            old = self.signs.get(rank)
            beat_at = old.beat_at if old and old.beat == beat else now
            progress_at = old.progress_at if old and old.progress == progress else now
            self.signs[rank] = Sign(beat, progress, step, phase, beat_at, progress_at)

    def fault(self, running: set[int]) -> tuple[int, str] | None:
        """Return (rank, what is wrong with it) of the first rank among ``running`` that is stopped or hangs."""
        now = time.monotonic()
        watched = {rank: sign for rank, sign in self.signs.items() if rank in running}
        for rank, sign in watched.items():
            if now - sign.beat_at > self.silent_seconds:
                return rank, f"has shown no sign of life for {self.silent_seconds:g} s"
        stuck = {}
        for rank, sign in watched.items():
            patience = self.hang_seconds * (_SLOW_PHASE_TIMES if sign.phase in _SLOW_PHASES else 1)
            if now - sign.progress_at > patience:
                stuck[rank] = patience
        if not stuck:
            return None
        # Ranks that wait in a collective have gone on to it; who keeps them waiting is behind.
        rank = min(stuck, key=lambda rank: watched[rank].progress)
        return rank, f"has not got on for {stuck[rank]:g} s (phase: {watched[rank].phase})"

    def gave_up(self, rank: int) -> bool:
        """Whether the rank ended on purpose, with a message of its own."""
        return rank in self.signs and self.signs[rank].phase == GAVE_UP

    def last_step(self, rank: int) -> str:
        """Return ``, after step N`` where that is known."""
        return f", after step {self.signs[rank].step}" if rank in self.signs else ""
