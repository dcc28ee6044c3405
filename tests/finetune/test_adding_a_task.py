"""The page on adding a task: its example runs as it stands there, from training to a table of predictions."""

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from megaprot.common.errors import InputError
from megaprot.finetune.config import LabelConfig
from megaprot.finetune.tasks import open_task, task_names
from megaprot.pretrain import parallel
from megaprot.tools import cli
from tests.finetune.folders import esm_folder, random_proteins

PAGE = Path(__file__).parents[2] / "docs" / "adding_a_task.md"


def example_file(folder: Path) -> Path:
    code = PAGE.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    (folder / "charge_side.py").write_text(code)
    return folder / "charge_side.py"


def test_the_example_trains_evaluates_and_predicts(tmp_path: Path) -> None:
    if dist.is_initialized():
        parallel.stop_processes()
    task = example_file(tmp_path)
    esm_folder(tmp_path / "model", token_dropout=False)
    lines, sequences = ["sequence,charge,set"], random_proteins([12] * 60)
    for number, protein in enumerate(sequences):
        charge = sum(protein.count(letter) for letter in (b"K", b"R")) - sum(map(protein.count, (b"D", b"E")))
        lines.append(f"{protein.decode()},{charge},{('train', 'train', 'valid', 'test')[number % 4]}")
    (tmp_path / "charges.csv").write_text("\n".join(lines) + "\n")
    common = ["--task", str(task), "--data", str(tmp_path / "charges.csv")]
    train = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "run"), "--train.num_steps", "8"]
    assert cli.main(["finetune", *common, *train, "--optim.lr", "0.003", "--train.batch_size", "10"]) == 0
    assert cli.main(["evaluate", *common, "--model", str(tmp_path / "run"), "--split", "test"]) == 0
    results = json.loads((tmp_path / "run" / "evaluation_test" / "results.json").read_text())
    assert results["task"] == "charge_side"
    assert set(results["metrics"]) == {"top1_accuracy", "top5_accuracy", "f1_macro", "recall_basic"}
    (tmp_path / "new.fasta").write_text(">a\nKKKRRRKKR\n>b\nDDEEDDE\n")
    predict = ["--model", str(tmp_path / "run"), "--input", str(tmp_path / "new.fasta")]
    output = ["--output", str(tmp_path / "new.tsv")]
    assert cli.main(["predict", "--task", str(task), *predict, *output]) == 0
    rows = [line.split("\t") for line in (tmp_path / "new.tsv").read_text().splitlines()]
    assert [row[0] for row in rows] == ["identifier", "a", "b"]
    assert {row[1] for row in rows[1:]} <= {"0", "1"}
    assert cli.main(["predict", *predict, *output]) == 2  # code is only taken from a file that is named


def test_tasks_are_found_by_their_files(tmp_path: Path) -> None:
    assert {"contact_prediction", "fluorescence", "remote_homology", "secondary_structure", "stability",
            "sequence_regression", "sequence_classification", "token_classification"} <= set(task_names())  # fmt: skip
    for name in task_names():
        assert open_task(name, LabelConfig()).name == name
    (tmp_path / "empty.py").write_text("TASK = 7\n")
    with pytest.raises(InputError, match="has no class TASK"):
        open_task(str(tmp_path / "empty.py"), LabelConfig())
