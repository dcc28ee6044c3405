"""``megaprot distill`` from a file, or a corpus, to a folder that transformers opens."""

from pathlib import Path

import pytest
import torch

from megaprot.common.metrics_log import read_metrics
from megaprot.finetune.hugging_face import load_encoder
from megaprot.tools import distill
from megaprot.tools.cli import main
from megaprot.tools.distill import DistillConfig
from tests.finetune.folders import esm_folder, random_proteins


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    esm_folder(folder / "teacher", num_hidden_layers=2, initializer_range=0.02)
    proteins = random_proteins([20 + place % 7 for place in range(40)])
    (folder / "data.fasta").write_text("".join(f">p{place}\n{one.decode()}\n" for place, one in enumerate(proteins)))
    return folder


def arguments(folder: Path, output: Path, *more: str) -> list[str]:
    return ["distill", "--teacher", str(folder / "teacher"), "--data", str(folder / "data.fasta"),
            "--output", str(output), "--layers", "1", "--valid_share", "0.2", "--train.num_epochs", "4",
            "--train.batch_size", "8", "--optim.lr", "3e-3", *more]  # fmt: skip


def test_a_student_is_trained_and_opens_as_any_model(folder: Path, tmp_path: Path) -> None:
    assert main(arguments(folder, tmp_path / "out")) == 0
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out" / "student")
    assert model.config.num_hidden_layers == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "student").mask_token_id is not None
    losses = [row["valid_loss"] for row in read_metrics(tmp_path / "out" / "metrics.jsonl") if "valid_loss" in row]
    assert losses[-1] < losses[0]
    student, best = (load_encoder(tmp_path / "out" / one, with_head=True) for one in ("student", "best/encoder"))
    for name, tensor in student.model.state_dict().items():
        assert torch.equal(tensor, best.model.state_dict()[name])


def test_a_finished_run_is_not_begun_again_with_other_settings(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(folder, tmp_path / "out")) == 0
    assert main(arguments(folder, tmp_path / "out", "--seed", "2")) == 2
    assert "with another seed" in capfd.readouterr().err
    assert main(arguments(folder, tmp_path / "out", "--layers", "2")) == 2
    assert "holds a run with --layers 1, not 2" in capfd.readouterr().err
    assert main(arguments(folder, tmp_path / "out", "--hidden_size", "8")) == 2
    assert "holds a run with --hidden_size" in capfd.readouterr().err
    (tmp_path / "out" / "checkpoints").rename(tmp_path / "gone")  # without a save the run begins anew
    assert main(arguments(folder, tmp_path / "out", "--layers", "2", "--train.num_epochs", "1")) == 0
    assert load_encoder(tmp_path / "out" / "student").num_layers == 2


def test_a_corpus_gives_the_sequences_it_was_made_of(folder: Path, tmp_path: Path) -> None:
    made = ["preprocess", "--input", str(folder / "data.fasta"), "--output", str(tmp_path / "corpus")]
    assert main(made) == 0
    vocabulary = load_encoder(folder / "teacher").vocabulary
    (prefix,) = {path.with_suffix("") for path in (tmp_path / "corpus").glob("train.idx")}
    of_corpus, of_file = (
        {one.residues.tobytes() for one in distill._read(config, vocabulary)}
        for config in (
            DistillConfig("", str(prefix), "", 1),
            DistillConfig("", str(folder / "data.fasta"), "", 1),
        )
    )
    assert of_corpus
    assert of_corpus <= of_file


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--valid_share", "0"), "valid_share"),
        (("--loss.temperature", "0"), "temperature"),
        (("--loss.truth_weight", "0", "--loss.logits_weight", "0", "--loss.hidden_weight", "0"), "above 0"),
        (("--layers", "7"), "the teacher has 2"),
        (("--data", "nowhere.fasta"), "nowhere.fasta"),
    ],
)
def test_wrong_input_is_one_sentence(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    assert main(arguments(folder, tmp_path / "out", *more)) == 2
    assert message in capfd.readouterr().err
