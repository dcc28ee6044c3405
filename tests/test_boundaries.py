"""The rules of the house, read from the sources: which room may import which, no unpickling, no overlong file."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "common": {"common"},
    "pretrain": {"common", "pretrain"},
    "finetune": {"common", "finetune"},
    "tools": {"common", "pretrain", "finetune", "tools", "launch"},
    "launch": {"launch"},
}
"""{room: the rooms its files may import}."""
MOST_LINES = 600
RESTRICTED_UNPICKLER = ROOT / "common" / "safe_pickle.py"
PICKLER = ROOT / "tools" / "conversion" / "tensor_record.py"
SOURCES = [file for room in MAY_IMPORT for file in sorted((ROOT / room).rglob("*.py"))]


def imported_modules(source: str, package: str = "") -> set[str]:
    """Return the absolute names that a module in ``package`` imports anywhere, functions included.

    ``from a import b`` counts as ``a`` and ``a.b``, either of which may be the module.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base] if base else parent)
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def package_of(file: Path) -> str:
    """Return the package a source file belongs to."""
    return ".".join(["megaprot", *file.relative_to(ROOT).parent.parts])


def name(file: Path) -> str:
    """Return the file's path in the repository."""
    return str(file.relative_to(ROOT))


def test_imports_are_found_in_every_form() -> None:
    source = (
        "import a.b as c\nfrom d import e\nfrom . import f\nfrom ..g import h\n"
        "def x():\n    from megaprot.common import errors\n"
    )
    assert imported_modules(source, "megaprot.tools") == {
        "a.b",
        "d",
        "d.e",
        "megaprot.tools",
        "megaprot.tools.f",
        "megaprot.g",
        "megaprot.g.h",
        "megaprot.common",
        "megaprot.common.errors",
    }


def test_every_folder_of_the_package_has_its_rule() -> None:
    folders = {file.parent.name for file in ROOT.glob("*/py.typed")}
    assert folders == set(MAY_IMPORT)


@pytest.mark.parametrize("file", SOURCES, ids=name)
def test_a_room_imports_only_the_rooms_it_may(file: Path) -> None:
    room = file.relative_to(ROOT).parts[0]
    imported = imported_modules(file.read_text(encoding="utf-8"), package_of(file))
    rooms = {module.split(".")[1] for module in imported if module.startswith("megaprot.")}
    assert rooms <= MAY_IMPORT[room]
    assert not {module.split(".")[0] for module in imported} & {"tests", "benchmarks", *MAY_IMPORT}


@pytest.mark.parametrize("file", SOURCES, ids=name)
def test_nothing_unpickles(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    imported = {module.split(".")[0] for module in imported_modules(source, package_of(file))}
    if file == RESTRICTED_UNPICKLER:
        assert "pickle.load" not in source, "only its own restricted class may read"
        imported -= {"pickle"}
    if file == PICKLER:
        assert "Unpickler" not in source and not re.search(r"pickle\.load", source), "it only writes"
        imported -= {"pickle"}
    assert not imported & {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve"}
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert keywords.get("allow_pickle", "False") == "False", f"line {call.lineno}"
        if ast.unparse(call.func) == "torch.load":
            assert keywords.get("weights_only") == "True", f"line {call.lineno}: torch.load without weights_only"


def test_launch_needs_no_more_than_the_standard_library_to_be_imported() -> None:
    for file in sorted((ROOT / "launch").rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        tops = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        modules = set().union(*(imported_modules(ast.unparse(node)) for node in tops))
        assert not {module.split(".")[0] for module in modules} & {"torch", "numpy", "yaml", "jsonargparse"}


@pytest.mark.parametrize("file", [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))], ids=name)
def test_no_file_is_overlong(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MOST_LINES
