"""Atomic writes: whatever goes wrong, the old content stays or nothing is there; checksums against hashlib's own."""

import hashlib
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from megaprot.common import files
from megaprot.common.errors import InputError
from megaprot.common.files import atomic_write, folder_written_whole, sha256_of, write_json_atomically


@pytest.mark.parametrize("num_bytes", [0, 1, files.BLOCK_BYTES - 1, files.BLOCK_BYTES, files.BLOCK_BYTES + 1])
def test_sha256_is_that_of_the_whole_content(tmp_path: Path, num_bytes: int) -> None:
    content = (b"MKTAYIAKQR" * (num_bytes // 10 + 1))[:num_bytes]
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "state.json"
    write_json_atomically(target, {"step": 1})
    write_json_atomically(target, {"step": 2, "name": "é"})
    assert target.read_text(encoding="utf-8") == '{\n  "step": 2,\n  "name": "é"\n}\n'
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_new_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_json_atomically(tmp_path / "atomic", {})
    assert stat.S_IMODE((tmp_path / "atomic").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_failed_write_keeps_the_old_content(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_write(target) as stream:
        stream.write(b"new")
        raise KeyboardInterrupt
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_values_json_cannot_hold_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomically(tmp_path / "file", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


def test_a_file_appears_under_its_name_only_when_complete(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "file") as stream:
        stream.write(b"half")
        stream.flush()
        assert not (tmp_path / "file").exists()
    assert (tmp_path / "file").read_bytes() == b"half"


def test_a_folder_appears_when_its_block_ends(tmp_path: Path) -> None:
    final = tmp_path / "new" / "corpus"
    with folder_written_whole(final) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_bytes(b"content")
        assert partial.parent == final.parent
        assert not final.exists()
    assert (final / "inner" / "file").read_bytes() == b"content"
    assert os.listdir(final.parent) == ["corpus"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    with folder_written_whole(tmp_path / "corpus") as partial:
        (partial / "file").touch()
    assert os.listdir(tmp_path / "corpus") == ["file"]


def test_a_failed_block_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), folder_written_whole(tmp_path / "corpus") as partial:
        (partial / "file").touch()
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_a_folder_with_content_is_refused_before_and_after_the_work(tmp_path: Path) -> None:
    final = tmp_path / "corpus"
    with pytest.raises(InputError, match="already has content"), folder_written_whole(final):
        final.mkdir()
        (final / "theirs").touch()
    with pytest.raises(InputError, match="already has content"), folder_written_whole(final):
        pytest.fail("nothing may be done before the folder is refused")
    assert os.listdir(final) == ["theirs"]
    with pytest.raises(InputError, match="is a file, not a folder"), folder_written_whole(final / "theirs"):
        pass


def test_a_parent_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written to"), folder_written_whole(tmp_path / "file" / "corpus"):
        pass


def test_leftovers_of_ended_processes_are_removed_and_those_of_running_ones_kept(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from megaprot.common.files import folder_written_whole\n"
        "with folder_written_whole(Path(sys.argv[1])) as partial:\n"
        "    (partial / 'half').touch(); print('ready', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "corpus")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        leftover = tmp_path / f".corpus.partial-{socket.gethostname()}-{process.pid}"
        elsewhere = tmp_path / ".corpus.partial-another.host-1"
        elsewhere.mkdir()
        with pytest.raises(ZeroDivisionError), folder_written_whole(tmp_path / "corpus"):
            raise ZeroDivisionError
        assert (leftover / "half").exists()
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "corpus").exists()
    with folder_written_whole(tmp_path / "corpus"):
        assert not leftover.exists()
    assert sorted(os.listdir(tmp_path)) == [elsewhere.name, "corpus"]
