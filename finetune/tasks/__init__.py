"""The tasks, one file each; a new file with a class ``TASK`` is a new task."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from pathlib import Path

from megaprot.common.errors import InputError
from megaprot.finetune.config import LabelConfig
from megaprot.finetune.task import Task


def task_names() -> list[str]:
    """Return the names of the tasks shipped."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")


def open_task(name: str, labels: LabelConfig) -> Task:
    """Return a task by its name, or the one in a Python file, which is run.

    Raises:
        InputError: There is no such task or file, or the file holds none.
    """
    if name.endswith(".py"):
        return _from_file(Path(name))(labels)
    if name not in task_names():
        raise InputError(f"--task must be one of {', '.join(task_names())}, or a Python file, but got '{name}'.")
    found: type[Task] = importlib.import_module(f"{__name__}.{name}").TASK
    return found(labels)


def _from_file(path: Path) -> type[Task]:
    """Return the class ``TASK`` of a Python file."""
    if not path.is_file():
        raise InputError(f"--task {path}: there is no such file; name one, or one of {', '.join(task_names())}.")
    spec = importlib.util.spec_from_file_location(f"megaprot_task_{path.stem}", path)
    assert spec is not None  # a name that ends with .py has a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    task = getattr(module, "TASK", None)
    if not (inspect.isclass(task) and issubclass(task, Task)):
        raise InputError(f"--task {path}: the file has no class TASK made from megaprot.finetune.task.Task; add it.")
    return task
