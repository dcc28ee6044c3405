"""The model card says what the run folder and its corpus know."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from megaprot.pretrain.config import DataConfig, PretrainConfig, RunConfig
from megaprot.tools import cli
from megaprot.tools.conversion.model_card import facts_of_run

_DRAW = random.Random(3)
SEQUENCES = ["".join(_DRAW.choices("ACDEFGHIKLMNPQRSTVWY", k=40)) for _ in range(60)]


def corpus(folder: Path, *more: str) -> Path:
    """A corpus of random sequences of two families, as ``megaprot preprocess`` writes it."""
    folder.mkdir()
    records = [
        f">P{number}/1-40 P{number}.1 PF0000{number % 2 + 1}.1;name;\n{sequence}"
        for number, sequence in enumerate(SEQUENCES)
    ]
    (folder / "given.fasta").write_text("\n".join(records) + "\n")
    command = ["preprocess", "--input", str(folder / "given.fasta"), "--output", str(folder / "corpus")]
    assert cli.main([*command, "--split.valid", "0.2", *more]) == 0
    return folder / "corpus"


def run_folder(folder: Path, data: Path, rows: list[dict[str, Any]]) -> tuple[Path, PretrainConfig]:
    """What facts_of_run reads of a run: a checkpoint's state and the log."""
    step = folder / "run" / "checkpoints" / "step_00000200"
    step.mkdir(parents=True)
    (step / "state.json").write_text(json.dumps({"step": 200, "consumed_residues": 12345}))
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return step, PretrainConfig(data=DataConfig(path=str(data)), run=RunConfig(dir=str(folder / "run")))


def test_steps_perplexity_data_and_exclusions_are_named(tmp_path: Path) -> None:
    (tmp_path / "tests.fasta").write_text(f">x\n{SEQUENCES[0]}\n")
    exclude = ("--exclude.files", str(tmp_path / "tests.fasta"), "--split.hold_out", "PF00002")
    data = corpus(tmp_path / "data", *exclude)
    rows: list[dict[str, Any]] = [
        {"step": 100, "validation_loss": 2.9, "validation_perplexity": 18.2, "validation_masked_accuracy": 0.1},
        {"step": 200, "validation_loss": 2.7, "validation_perplexity": 14.9, "validation_masked_accuracy": 0.15},
        {"step": 300, "validation_loss": 2.5, "validation_perplexity": 12.2, "validation_masked_accuracy": 0.2},
    ]
    facts, sizes = facts_of_run(*run_folder(tmp_path, data, rows))
    assert "given.fasta" in facts["Training data"]
    assert "PF00002" in facts["Exclusions"]
    assert "tests.fasta" in facts["Exclusions"]
    assert sizes["steps"] == "200"
    assert sizes["residues seen"] == "12,345"
    assert sizes["validation perplexity"] == "14.9 (step 200)", "of the steps up to the checkpoint's"


def test_a_corpus_that_leaves_nothing_out_says_so(tmp_path: Path) -> None:
    facts, _ = facts_of_run(*run_folder(tmp_path, corpus(tmp_path / "data"), []))
    assert facts["Exclusions"].startswith("No sequences were excluded.")


@pytest.mark.parametrize("manifest", [None, "not JSON", "[]"])
def test_what_is_gone_is_said_not_to_be_recorded(manifest: str | None, tmp_path: Path) -> None:
    if manifest:
        (tmp_path / "train.json").write_text(manifest)
    facts, sizes = facts_of_run(*run_folder(tmp_path, tmp_path, []))
    assert facts == {"Training data": "Not recorded.", "Exclusions": "Not recorded."}
    assert "validation perplexity" not in sizes
