"""What is installed: a wheel holds the package and nothing else, and what it holds is enough to run."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = sorted(marker.parent.name for marker in ROOT.glob("*/py.typed"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that no build folder is left in the repository."""
    pytest.importorskip("setuptools", minversion="70.1", reason="builds without a network need setuptools installed")
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "sources"
    copy.mkdir()
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / file).exists():
            (copy / file).write_bytes((ROOT / file).read_bytes())
    for room in (*ROOMS, "tests"):
        for file in (ROOT / room).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                target = copy / file.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    done = subprocess.run([*pip, "--wheel-dir", str(folder), str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("megaprot-*.whl")
    return built


def test_the_wheel_holds_nothing_outside_the_package(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"megaprot"}


def test_the_wheel_holds_every_source_file_recipe_and_type_marker(wheel: Path) -> None:
    wanted = {
        f"megaprot/{file.relative_to(ROOT)}"
        for room in ROOMS
        for pattern in ("*.py", "recipes/*.yaml", "py.typed", "slurm/*", "local/*.sh", "container/*")
        for file in (ROOT / room).rglob(pattern)
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("megaprot/")}
    assert held == wanted


def test_every_folder_with_sources_is_a_package() -> None:
    folders = {file.parent for room in ROOMS for file in (ROOT / room).rglob("*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders)


def test_the_program_runs_from_an_unpacked_wheel(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import megaprot.tools.cli as cli; print(cli.__file__); raise SystemExit(cli.main(['--help']))"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))
    assert "usage: megaprot" in done.stdout
