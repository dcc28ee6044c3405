"""A killed `megaprot embed` goes on where it was; several processes share the work."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megaprot.common.errors import InputError
from megaprot.tools.embedding import parts
from megaprot.tools.embedding.parts import Entry, Parts
from tests.finetune.folders import esm_folder, random_proteins
from tests.tools.embedding.runs import assert_close, embed, expected_means, read_hdf5, write_fasta

PROTEINS = {f"p{number}": protein for number, protein in enumerate(random_proteins([20, 33, 8, 15, 40, 27, 3, 12]))}


@pytest.fixture
def esm(tmp_path: Path) -> Path:
    return esm_folder(tmp_path / "esm")


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    return write_fasta(tmp_path / "proteins.fasta", PROTEINS)


class _Killed(Exception):
    pass


def kill_after(monkeypatch: pytest.MonkeyPatch, num_parts: int) -> None:
    """End the run when so many parts are written, each of one protein."""
    flush = Parts.flush

    def counted(self: Parts) -> None:
        flush(self)
        if len(list(self.folder.glob("part-*"))) >= num_parts:
            raise _Killed

    monkeypatch.setattr(parts, "PART_SECONDS", 0.0)
    monkeypatch.setattr(Parts, "flush", counted)


def test_a_killed_run_goes_on_where_it_was(
    esm: Path, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "vectors.h5"
    with monkeypatch.context() as patched:
        kill_after(patched, 3)
        with pytest.raises(_Killed):
            embed(esm, fasta, output)
    assert not output.exists()
    assert len(Parts(output).places()) == 3
    (tmp_path / ".vectors.h5.partial" / ".part-0-000003.safetensors.99").write_bytes(b"cut short")
    read: list[int] = []
    monkeypatch.setattr("megaprot.tools.embedding.vectors._embed_batch", _counting(read))
    assert embed(esm, fasta, output) == 0
    assert sum(read) == len(PROTEINS) - 3
    assert "3 of 8 proteins were embedded before" in capsys.readouterr().err
    assert_close(read_hdf5(output), expected_means(esm, PROTEINS))
    assert not (tmp_path / ".vectors.h5.partial").exists()


def _counting(read: list[int]) -> Any:
    from megaprot.tools.embedding.vectors import _embed_batch

    def counted(*arguments: Any) -> Any:
        read.append(len(arguments[-1]))
        return _embed_batch(*arguments)

    return counted


@pytest.mark.parametrize("change", ["layer", "input", "model"])
def test_a_run_with_other_settings_does_not_go_on(
    change: str,
    esm: Path,
    fasta: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "vectors.h5"
    with monkeypatch.context() as patched:
        kill_after(patched, 2)
        with pytest.raises(_Killed):
            embed(esm, fasta, output)
    more = ["--layer", "1"] if change == "layer" else []
    if change == "input":
        write_fasta(fasta, PROTEINS | {"another": b"MKV"})
    if change == "model":
        with (esm / "config.json").open("a") as stream:
            stream.write("\n")
    assert embed(esm, fasta, output, *more) == 2
    assert f"was begun with {change}" in capsys.readouterr().err
    assert not output.exists()


def test_settings_are_checked_before_anything_is_written(tmp_path: Path) -> None:
    output = tmp_path / "vectors.h5"
    Parts(output).begin({"layer": [-1]})
    with pytest.raises(InputError, match="layer"):
        Parts(output).begin({"layer": [0]})
    Parts(output).begin({"layer": [-1]})


def test_a_full_disk_leaves_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megaprot.common.errors import RunError

    found = Parts(tmp_path / "vectors.h5", part_bytes=1)
    found.begin({})
    found.add(Entry("a", "a", torch.ones(2)))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parts, "write_file", full)
    with pytest.raises(RunError, match="No space left"):
        found.add(Entry("b", "b", torch.ones(2)))
    assert list(found.places()) == ["a"]


@pytest.mark.slow
def test_a_run_ended_by_a_signal_goes_on(esm: Path, fasta: Path, tmp_path: Path) -> None:
    proteins = {f"p{number}": one for number, one in enumerate(random_proteins([400] * 60))}
    write_fasta(fasta, proteins)
    output = tmp_path / "vectors.h5"
    script = tmp_path / "embed.py"
    script.write_text(
        "import sys\nfrom megaprot.tools import cli\nfrom megaprot.tools.embedding import parts\n"
        "parts.PART_SECONDS = 0.0\nsys.exit(cli.main(sys.argv[1:]))\n"
    )
    arguments = ["embed", "--model", str(esm), "--input", str(fasta), "--output", str(output), "--max_tokens", "1"]
    process = subprocess.Popen([sys.executable, str(script), *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"})
    folder = tmp_path / ".vectors.h5.partial"
    deadline = time.monotonic() + 120
    while len(list(folder.glob("part-*"))) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    num_done = len(Parts(output).places())
    assert 3 <= num_done < len(proteins)
    assert embed(esm, fasta, output) == 0
    assert_close(read_hdf5(output), expected_means(esm, proteins))


@pytest.mark.slow
def test_two_processes_share_the_work(esm: Path, fasta: Path, tmp_path: Path) -> None:
    output = tmp_path / "vectors.h5"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = ["-m", "megaprot.tools.cli", "embed", "--model", str(esm), "--input", str(fasta), "--output", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run([*launcher, *command], env=environment, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr
    assert_close(read_hdf5(output), expected_means(esm, PROTEINS))
    assert found.stdout.count("8 proteins") == 1
    assert not (tmp_path / ".vectors.h5.partial").exists()
