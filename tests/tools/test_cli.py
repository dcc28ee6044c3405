"""The console program: its table of commands, its speed, and how it hands over to a command's module."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from megaprot.tools import cli

DUMMY_COMMAND = '''"""Count to a number.

Not part of the description.
"""
from dataclasses import dataclass

from megaprot.common.errors import RunError


@dataclass
class Config:
    """Counting."""

    upto: int = 3
    """The last number."""


CONFIG = Config


def run(config: Config) -> None:
    """Count."""
    if config.upto > 9:
        raise RunError("lost count")
    print(*range(1, config.upto + 1))
'''


@pytest.fixture
def dummy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `megaprot count` and `megaprot plain` commands of modules in a temporary folder."""
    (tmp_path / "dummy_count.py").write_text(DUMMY_COMMAND)
    (tmp_path / "dummy_plain.py").write_text("def main(argv):\n    print('got', *argv)\n    return 7\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(cli.COMMANDS, "count", ("dummy_count", "count"))
    monkeypatch.setitem(cli.COMMANDS, "plain", ("dummy_plain", "plain"))


@pytest.mark.usefixtures("dummy")
def test_a_command_with_a_configuration_is_parsed_and_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["count", "--upto", "4"]) == 0
    assert capsys.readouterr().out == "1 2 3 4\n"
    assert cli.main(["count", "--up-too", "4"]) == 2
    assert cli.main(["count", "--upto", "10"]) == 1
    error = capsys.readouterr().err
    assert error == (
        "megaprot count: error: unknown flag --up_too; did you mean --upto? (--help lists all)\n"
        "megaprot count: error: lost count\n"
    )


@pytest.mark.usefixtures("dummy")
def test_a_commands_help_shows_its_description_and_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["count", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "usage: megaprot count" in text
    assert "Count to a number." in text
    assert "Not part" not in text
    assert "The last number. (a whole number; default: 3)" in text


@pytest.mark.usefixtures("dummy")
def test_a_command_with_its_own_main_gets_the_arguments_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plain", "local", "--nproc", "2", "--", "x"]) == 7
    assert capsys.readouterr().out == "got local --nproc 2 -- x\n"


@pytest.mark.parametrize(
    ("given", "meant"), [("pretain", "pretrain"), ("preproces", "preprocess"), ("eval", "evaluate")]
)
def test_an_unknown_command_is_answered_with_the_nearest(
    given: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([given]) == 2
    error = capsys.readouterr().err
    assert f"unknown command '{given}'; did you mean {meant}?" in error
    assert error.count("\n") == 1


def test_no_command_is_an_error_that_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert all(f"\n  {name} " in captured.err for name in cli.COMMANDS)


def test_version_is_the_installed_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    name, number = capsys.readouterr().out.split()
    assert name == "megaprot"
    assert [part.isdigit() for part in number.split(".")[:2]] == [True, True]


def test_help_loads_only_the_standard_library() -> None:
    code = "import sys; from megaprot.tools.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in cli.COMMANDS)
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    assert not loaded & {"torch", "numpy", "jsonargparse", "yaml", "megatron"}


def test_help_lists_commands_one_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(cli.COMMANDS)


def test_the_program_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "megaprot.tools.cli", "nope"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("megaprot: error: unknown command 'nope'")


def test_every_command_names_a_module_that_exists() -> None:
    assert all(find_spec(module) for module, _ in cli.COMMANDS.values())
