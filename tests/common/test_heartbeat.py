"""Signs of life: a line a launcher can read at any moment, and nothing at all without a launcher."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megaprot.common import heartbeat

PROGRAM = """
import time
from megaprot.common import heartbeat
assert heartbeat.start() and heartbeat.start()
heartbeat.mark("training", 12)
heartbeat.progress()
heartbeat.mark("saving")
print("ready", flush=True)
def inner_function():
    time.sleep(60)
inner_function()
"""


def read(folder: Path) -> list[str]:
    return (folder / "rank_5").read_text().split()


def test_a_process_keeps_a_line_and_writes_its_stacks_when_asked(tmp_path: Path) -> None:
    environment = os.environ | {heartbeat.FOLDER_VARIABLE: str(tmp_path), "RANK": "5"}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        first = read(tmp_path)
        assert first[1:] == ["3", "12", "saving"]
        end = time.monotonic() + 20
        while int(read(tmp_path)[0]) <= int(first[0]) + 1:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert read(tmp_path)[1:] == first[1:]
        process.send_signal(signal.SIGUSR2)
        while "inner_function" not in (tmp_path / "stacks_5.txt").read_text():
            assert time.monotonic() < end
            time.sleep(0.05)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_without_a_launcher_nothing_happens() -> None:
    assert heartbeat.FOLDER_VARIABLE not in os.environ
    assert not heartbeat.start()
    heartbeat.mark("training", 3)
    heartbeat.progress()
