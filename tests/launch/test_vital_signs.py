"""Which ranks are taken for stopped or hung, on a clock of the test's own; and the same words on both sides."""

from pathlib import Path

import pytest

from megaprot.common import heartbeat
from megaprot.launch import vital_signs
from megaprot.launch.vital_signs import VitalSigns


class Ward:
    """Two ranks, their lines, and a clock."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.now = folder, 100.0
        monkeypatch.setattr(vital_signs.time, "monotonic", lambda: self.now)
        self.signs = VitalSigns(folder, [4, 5], silent_seconds=10, hang_seconds=50)

    def after(self, seconds: float, *lines: str) -> tuple[int, str] | None:
        """Let time pass, write the lines of ranks 4 and 5, and look."""
        self.now += seconds
        for rank, line in zip((4, 5), lines, strict=False):
            (self.folder / f"rank_{rank}").write_text(line)
        self.signs.read()
        return self.signs.fault({4, 5})


@pytest.fixture
def ward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ward:
    return Ward(tmp_path, monkeypatch)


def test_a_rank_without_a_beat_is_silent(ward: Ward) -> None:
    assert ward.after(0, "1 1 7 training", "1 1 7 training") is None
    assert ward.after(9, "2 1 7 training") is None
    assert ward.after(2, "3 1 7 training") == (5, "has shown no sign of life for 10 s")
    assert ward.signs.last_step(5) == ", after step 7"


def test_the_rank_that_is_behind_is_the_one_that_hangs(ward: Ward) -> None:
    assert ward.after(0, "1 9 7 training", "1 8 7 reading rows") is None
    for second in range(5, 50, 5):
        assert ward.after(5, f"{second} 9 7 training", f"{second} 8 7 reading rows") is None
    assert ward.after(6, "60 9 7 training", "60 8 7 reading rows") == (
        5,
        "has not got on for 50 s (phase: reading rows)",
    )


@pytest.mark.parametrize("phase", ["starting", "loading", "saving", "validating"])
def test_slow_phases_have_three_times_as_long(phase: str, ward: Ward) -> None:
    for second in range(0, 150, 5):
        assert ward.after(5, f"{second} 1 7 {phase}", f"{second} 1 7 {phase}") is None
    assert ward.after(10, f"200 1 7 {phase}", f"200 1 7 {phase}") == (4, f"has not got on for 150 s (phase: {phase})")


def test_progress_within_a_phase_counts(ward: Ward) -> None:
    for second in range(0, 400, 5):
        assert ward.after(5, *[f"{second} {second} 7 validating"] * 2) is None


def test_ranks_without_a_line_and_damaged_lines_are_let_alone(ward: Ward) -> None:
    assert ward.after(0) is None
    assert ward.after(1000, "", "no line") is None
    assert ward.signs.last_step(4) == ""
    assert not ward.signs.gave_up(4)


def test_a_rank_that_has_ended_is_not_missed(ward: Ward) -> None:
    ward.after(0, "1 1 7 training", "1 1 7 gave up")
    ward.now += 1000
    assert ward.signs.fault(set()) is None
    assert ward.signs.gave_up(5)


def test_both_sides_speak_of_the_same_things() -> None:
    assert vital_signs.FOLDER_VARIABLE == heartbeat.FOLDER_VARIABLE
    assert vital_signs.GAVE_UP == heartbeat.GAVE_UP
