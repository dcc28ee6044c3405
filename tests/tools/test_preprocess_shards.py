"""Workers, ranges of bytes and shards: the same bytes as one process makes, no process and no half shard left over."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megaprot.common.errors import InputError
from megaprot.common.sequence_readers import read_fasta
from megaprot.tools.preprocess import run
from megaprot.tools.preprocessing import shards, units
from tests.tools.preprocess_runs import CLANS, CUT, contents, made_sequences, settings, write_fasta
from tests.tools.test_preprocess import PROGRAM

VALUES: dict[str, Any] = {
    "deduplicate": True,
    "split": {"by": "clan", "clans": str(CLANS), "valid": 0.2, "hold_out": ["PF00005"]},
}


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two plain files, one of them large for this test, and a compressed one; some sequences stand in two."""
    monkeypatch.setattr(units, "UNIT_BYTES", 50_000)
    records = [*read_fasta(CUT)]
    paths = [tmp_path / "a.fasta", tmp_path / "b.fasta", CUT]
    for path, part in zip(paths, (records[:1500], records[1400:1600]), strict=False):
        path.write_text(
            "".join(f">{record.identifier} {record.description}\n{record.sequence.decode()}\n" for record in part)
        )
    return [str(path) for path in paths]


def test_a_large_plain_file_is_cut_into_ranges_and_keeps_its_checksum(inputs: list[str]) -> None:
    planned = units.plan_units(inputs, "auto")
    size = os.path.getsize(inputs[0])
    assert [unit.byte_range for unit in planned if unit.byte_range] == [
        (start, min(start + 50_000, size)) for start in range(0, size, 50_000)
    ]
    assert [unit.source for unit in planned if unit.is_checksum] == [0]
    assert [unit.number for unit in planned] == [*range(len(planned))]
    assert not any(unit.byte_range for unit in units.plan_units(inputs, "csv"))


@pytest.mark.slow
def test_workers_and_shards_make_the_bytes_that_one_process_makes(
    tmp_path: Path, inputs: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(settings(inputs, tmp_path / "cut", **VALUES))
    expected = contents(tmp_path / "cut")
    printed = capsys.readouterr().out.replace("/cut", "")
    for num_shards in (1, 2, 4):
        output = tmp_path / f"shards-{num_shards}"
        for number in reversed(range(num_shards)):
            run(settings(inputs, output, shard=f"{number}/{num_shards}", **VALUES))
        capsys.readouterr()
        run(settings(inputs, output, merge=True, **VALUES))
        assert contents(output) == expected
        assert capsys.readouterr().out.replace(f"/shards-{num_shards}", "") == printed
    for workers in (2, 3):
        run(settings(inputs, tmp_path / f"workers-{workers}", workers=workers, **VALUES))
        assert contents(tmp_path / f"workers-{workers}") == expected
    monkeypatch.setattr(units, "UNIT_BYTES", 1 << 28)
    run(settings(inputs, tmp_path / "whole", **VALUES))
    assert contents(tmp_path / "whole") == expected


def test_a_finished_shard_is_left_alone_and_one_made_otherwise_refused(
    tmp_path: Path, inputs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    run(settings(inputs, output, shard="1/2", **VALUES))
    folder = output / "shard-00001-of-00002"
    before = folder.stat().st_mtime_ns
    run(settings(inputs, output, shard="1/2", **VALUES))
    assert f"{folder}: is there already, made with the same settings" in capsys.readouterr().out
    assert folder.stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"shard-00001-of-00002: was made with another 'vocabulary'"):
        run(settings(inputs, output, shard="1/2", vocabulary="iupac", **VALUES))
    os.utime(inputs[0], (1, 1))
    with pytest.raises(InputError, match=r"shard-00001-of-00002: was made with another 'sources'"):
        run(settings(inputs, output, shard="1/2", **VALUES))


def test_shards_that_do_not_belong_together_are_not_merged(tmp_path: Path, inputs: list[str]) -> None:
    output = tmp_path / "out"
    merge = settings(inputs, output, merge=True)
    with pytest.raises(InputError, match="out: holds no shards"):
        run(merge)
    run(settings(inputs, output, shard="1/3"))
    with pytest.raises(InputError, match="out: has no shard 0/3, 2/3: run"):
        run(merge)
    run(settings(inputs, output, shard="0/2"))
    with pytest.raises(InputError, match="out: holds shards of 2 and of 3"):
        run(merge)
    (output / "shard-00001-of-00003").rename(tmp_path / "away")
    run(settings(inputs, output, shard="1/2", deduplicate=True))
    with pytest.raises(InputError, match="shard-00001-of-00002: was made with another 'deduplicate' than shard-00000"):
        run(merge)
    (output / "shard-00001-of-00002").rename(tmp_path / "away too")
    run(settings(inputs, output, shard="1/2"))
    with pytest.raises(InputError, match=r"out: its shards were made with another 'split\.seed': merge with the same"):
        run(settings(inputs, output, merge=True, split={"seed": 5}))
    part = output / "shard-00001-of-00002" / "part-000001"
    for name in ("ids", "lengths", "hashes"):
        content = (part / name).read_bytes()
        (part / name).write_bytes(content[:-1])
        with pytest.raises(InputError, match=rf"part-000001: is damaged \('{name}' is truncated\)"):
            run(merge)
        (part / name).write_bytes(content)
    (part / "report.json").write_text("{")
    with pytest.raises(InputError, match=r"part-000001: is damaged"):
        run(merge)
    assert sorted(path.name for path in output.iterdir()) == ["shard-00000-of-00002", "shard-00001-of-00002"]


@pytest.mark.parametrize("text", ["2/2", "a", "1", "-1/2", "1/0"])
def test_a_shard_is_named_from_zero(tmp_path: Path, inputs: list[str], text: str) -> None:
    with pytest.raises(InputError, match=f"shard is '{text}': give i/n, i counting from 0"):
        run(settings(inputs, tmp_path / "out", shard=text))


def test_shards_refuse_what_they_cannot_share(tmp_path: Path, inputs: list[str]) -> None:
    with pytest.raises(InputError, match="shards cannot share standard input"):
        run(settings(["-"], tmp_path / "out", shard="0/2"))
    with pytest.raises(InputError, match="shard and merge exclude each other"):
        run(settings(inputs, tmp_path / "out", shard="0/2", merge=True))
    run(settings(inputs, tmp_path / "out"))
    with pytest.raises(InputError, match="out: holds corpora already"):
        run(settings(inputs, tmp_path / "out", shard="0/2"))


@pytest.mark.parametrize("num_moved", range(7))
def test_a_merge_killed_at_its_end_is_completed_by_the_next(
    tmp_path: Path, inputs: list[str], num_moved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    run(settings(inputs[1:2], output, shard="0/1"))
    moved = 0
    replace = Path.replace

    def replace_some(path: Path, target: Path) -> Path:
        nonlocal moved
        if path.parent.name == "merged":
            moved += 1
            if moved > num_moved:
                raise KeyboardInterrupt
        return replace(path, target)

    merge = settings(inputs[1:2], output, merge=True)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace_some)
        try:
            run(merge)
        except KeyboardInterrupt:
            assert not (output / "train.json").exists()
    run(merge)
    run(settings(inputs[1:2], tmp_path / "expected"))
    assert contents(output) == contents(tmp_path / "expected")
    assert not shards.merged_folder(output).exists()


def start_on_a_pipe(tmp_path: Path) -> tuple["subprocess.Popen[bytes]", list[psutil.Process]]:
    """Start a run whose two workers wait for ever, each for a named pipe to be written to; return it and them."""
    pipes = [tmp_path / "a.fasta", tmp_path / "b.fasta"]
    for pipe in pipes:
        os.mkfifo(pipe)
    command = [
        *PROGRAM,
        "--input",
        *map(str, pipes),
        "--format",
        "fasta",
        "--output",
        str(tmp_path / "out"),
        "--workers",
        "2",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    while len([*tmp_path.glob(".out.partial-*/work/part-*")]) < 2:
        time.sleep(0.05)
        assert process.poll() is None
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    return process, children


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_worker_outlives_the_run(tmp_path: Path, number: signal.Signals) -> None:
    process, children = start_on_a_pipe(tmp_path)
    process.send_signal(number)
    process.wait(timeout=20)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    assert not (tmp_path / "out").exists()
    if number != signal.SIGKILL:
        assert sorted(os.listdir(tmp_path)) == ["a.fasta", "b.fasta"]
        assert process.returncode == (130 if number == signal.SIGINT else 143)


@pytest.mark.slow
def test_a_worker_that_dies_fails_the_run_in_one_sentence(tmp_path: Path) -> None:
    process, children = start_on_a_pipe(tmp_path)
    next(child for child in children if "spawn_main" in " ".join(child.cmdline())).kill()
    _, said = process.communicate(timeout=20)
    assert process.returncode == 1
    assert re.fullmatch(rb"megaprot preprocess: error: a worker process died, [^\n]*\n", said)
    assert sorted(os.listdir(tmp_path)) == ["a.fasta", "b.fasta"]


@pytest.mark.slow
def test_wrong_input_in_a_worker_is_told_as_without(tmp_path: Path) -> None:
    good = write_fasta(tmp_path / "a.fasta", made_sequences(10))
    (tmp_path / "bad.fasta").write_text(">x\n7\n")
    with pytest.raises(InputError, match=r"bad\.fasta:1: record 'x' holds '7' at position 1: correct it"):
        run(settings([good, str(tmp_path / "bad.fasta")], tmp_path / "out", workers=2))
    assert sorted(os.listdir(tmp_path)) == ["a.fasta", "bad.fasta"]
    with pytest.raises(InputError, match="workers is 0"):
        run(settings([good], tmp_path / "out", workers=0))
