"""`megaprot finetune`, `evaluate --task` and `predict` as a person uses them, and what they say to wrong input."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megaprot.finetune.hugging_face import load_encoder
from megaprot.tools import cli
from tests.finetune.folders import esm_folder, megatron_bert_folder, random_proteins
from tests.finetune.tasks_data import regression_table, secondary_structure

FLAGS = ["--train.batch_size", "8", "--head.hidden_size", "32", "--optim.lr", "0.01", "--train.log_interval", "5"]


@pytest.fixture(scope="module", autouse=True)
def no_processes_are_joined() -> None:
    """Leave a world that earlier modules have joined."""
    if dist.is_initialized():
        from megaprot.pretrain import parallel

        parallel.stop_processes()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    esm_folder(folder / "model", token_dropout=False)
    secondary_structure(folder / "data", {"train": 40, "valid": 10, "cb513": 11})
    regression_table(folder / "table.csv", 40)
    return folder


@pytest.fixture(scope="module")
def tuned(inputs: Path) -> Iterator[Path]:
    """A run that has learned its labels."""
    output = inputs / "tuned"
    assert finetune(inputs, output, "--train.num_epochs", "6", "--head.name", "mlp") == 0
    yield output


def finetune(inputs: Path, output: Path, *flags: str, task: str = "secondary_structure", data: str = "data") -> int:
    places = ["--model", str(inputs / "model"), "--data", str(inputs / data), "--output", str(output)]
    return cli.main(["finetune", "--task", task, *places, *FLAGS, *flags])


def evaluate(capsys: pytest.CaptureFixture[str], model: Path, data: Path, *flags: str, task: str) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main(["evaluate", "--task", task, "--model", str(model), "--data", str(data), *flags]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_train_evaluate_and_predict_secondary_structure(
    inputs: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluate(capsys, tuned, inputs / "data", "--split", "cb513", task="secondary_structure")
    assert found["num_examples"] == 11
    assert found["accuracy"] > 0.8
    results = json.loads((tuned / "evaluation_cb513" / "results.json").read_text())
    assert (results["task"], results["split"], results["num_examples"]) == ("secondary_structure", "cb513", 11)
    for name, metric in results["metrics"].items():
        assert metric["low"] <= metric["value"] <= metric["high"]
        assert results["definitions"][name]
    page = (tuned / "evaluation_cb513" / "report.html").read_text()
    assert page.count("<img") == 2  # curves and confusion matrix
    assert "://" not in page  # opens offline
    assert "ProteinLM 3B" in page

    records = json.loads((inputs / "data/secondary_structure/secondary_structure_cb513.json").read_text())
    (tmp_path / "x.fasta").write_text("".join(f">p{number}\n{one['primary']}\n" for number, one in enumerate(records)))
    flags = ["--model", str(tuned), "--input", str(tmp_path / "x.fasta"), "--output", str(tmp_path / "x.tsv")]
    assert cli.main(["predict", *flags]) == 0
    header, *rows = [line.split("\t") for line in (tmp_path / "x.tsv").read_text().splitlines()]
    assert header == ["identifier", "sequence", "prediction"]
    assert [row[:2] for row in rows] == [[f"p{number}", one["primary"]] for number, one in enumerate(records)]
    hits = sum("HEC"[label] == letter for one, row in zip(records, rows, strict=True)
               for label, letter in zip(one["ss3"], row[2], strict=True))  # fmt: skip
    assert hits / sum(len(one["ss3"]) for one in records) == pytest.approx(found["accuracy"])


def test_the_run_leaves_a_report_of_its_validation_and_an_encoder_for_others(tuned: Path) -> None:
    results = json.loads((tuned / "results.json").read_text())
    best = json.loads((tuned / "best" / "task.json").read_text())
    assert results["split"] == "valid"
    assert results["metrics"]["accuracy"]["value"] == pytest.approx(best["valid"]["accuracy"])
    assert "<h2>Training</h2>" in (tuned / "report.html").read_text()
    assert load_encoder(tuned / "best" / "encoder").num_layers == 3


def test_the_same_command_again_takes_no_more_steps(
    inputs: Path, tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (tuned / "metrics.jsonl").read_text()
    assert finetune(inputs, tuned, "--train.num_epochs", "6", "--head.name", "mlp") == 0
    assert "going on from step 30" in capsys.readouterr().out
    assert (tuned / "metrics.jsonl").read_text() == before


def test_a_table_of_ones_own_a_grid_and_seeds(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = ["--sweep", "optim.lr=1e-2,1e-9", "head.name=mean", "--seeds", "2", "--train.num_epochs", "3"]
    assert finetune(inputs, tmp_path / "out", *grid, task="sequence_regression", data="table.csv") == 0
    assert "standard deviation over seeds" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "runs.json").read_text())
    assert [one["setting"] for one in summary["settings"]] == [
        "optim.lr=1e-2 head.name=mean",
        "optim.lr=1e-9 head.name=mean",
    ]
    assert summary["best_runs"] == ["lr_1e-2-name_mean-seed_1", "lr_1e-2-name_mean-seed_2"]
    found = evaluate(capsys, tmp_path / "out", inputs / "table.csv", task="sequence_regression")
    assert found["num_examples"] == 10
    results = json.loads((tmp_path / "out" / "evaluation_test" / "results.json").read_text())
    values = results["values_by_model"]["spearman"]
    assert len(values) == 2
    assert results["metrics"]["spearman"]["value"] == pytest.approx(sum(values) / 2)
    assert results["standard_deviation"]["spearman"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    more = ["--split", "valid,test", "--output", str(tmp_path / "both")]
    found = evaluate(capsys, tmp_path / "out", inputs / "table.csv", *more, task="sequence_regression")
    assert found["split"] == "test"
    both = {name: json.loads((tmp_path / "both" / name / "results.json").read_text()) for name in ("valid", "test")}
    assert both["test"] == results
    assert len(both["valid"]["values_by_model"]["spearman"]) == 2
    one = tmp_path / "out" / summary["best_runs"][1]
    assert evaluate(capsys, one, inputs / "table.csv", task="sequence_regression")["spearman"] == values[1]


def test_a_padded_encoder_says_so(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    megatron_bert_folder(tmp_path / "model")
    flags = ["--task", "secondary_structure", "--model", str(tmp_path / "model"), "--data", str(inputs / "data")]
    assert cli.main(["finetune", *flags, "--output", str(tmp_path / "out"), "--train.num_steps", "1"]) == 0
    assert "run in padded batches (its class has no attention interface)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--task", "secondary_structur"], "--task must be one of contact_prediction, fluorescence"),
        (["--task", "absent.py"], "--task absent.py: there is no such file"),
        (["--head.name", "attention"], "the task secondary_structure has the heads convolution, mlp, tape."),
        (["--labels.num_classes", "5"], "secondary structure has 3 or 8 classes"),
        (["--train.batch_size", "0"], "--train.batch_size is 0; give a number above 0."),
        (["--train.max_tokens", "-1"], "--train.max_tokens is -1; give 0 or more."),
        (["--head.dropout", "1"], "--head.dropout is 1.0; give a share from 0 to below 1."),
        (["--optim.layer_decay", "0"], "--optim.layer_decay is 0.0; give a factor above 0"),
        (["--train.num_epochs", "0"], "are both 0; give one of them."),
        (["--sweep", "optim.lr"], "--sweep optim.lr: write a key and its values"),
        (["--sweep", "seed=1,2"], "--sweep seed: sweep over settings of"),
        (["--sweep", "optim.rate=1,2"], "unknown flag --optim.rate; did you mean --optim."),
        (["--sweep", "optim.lr=1e-3,fast"], "--optim.lr must be"),
        (["--sweep", "head.name=tape,tape"], "names a setting twice"),
        (["--model", "absent"], "absent is no Hugging Face model folder"),
        (["--data", "absent"], "--data absent is neither a folder nor a file"),
        (["--engine.zero_stage", "4"], "--engine.zero_stage must be"),
        (["--optim.rl", "1"], "unknown flag --optim.rl; did you mean --optim.lr?"),
    ],
)
def test_wrong_flags_are_one_sentence(
    flags: list[str], sentence: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert finetune(inputs, tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("megaprot finetune: error: ")
    assert error.count("\n") == 1
    assert sentence in error
    assert not (tmp_path / "out").exists()


def test_wrong_models_are_one_sentence(
    inputs: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*flags: str) -> str:
        capsys.readouterr()
        assert cli.main(list(flags)) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    data = ["--data", str(inputs / "data")]
    assert "holds no fine-tuned model" in refused(
        "evaluate", "--task", "secondary_structure", "--model", str(inputs / "model"), *data
    )
    assert "predicts secondary_structure, not fluorescence" in refused(
        "evaluate", "--task", "fluorescence", "--model", str(tuned), "--data", str(fluorescence(tmp_path / "data"))
    )
    assert "there are: cb513, train, valid." in refused(
        "evaluate", "--task", "secondary_structure", "--model", str(tuned), *data, "--split", "test"
    )
    assert "--rows and --parallel are for --task mlm" in refused(
        "evaluate", "--task", "secondary_structure", "--model", str(tuned), *data, "--split", "cb513", "--rows", "3"
    )
    broken = tmp_path / "broken"
    (broken / "encoder").mkdir(parents=True)
    for name in ("task.json", "head.safetensors"):
        (broken / name).write_bytes((tuned / "best" / name).read_bytes())
    for path in (tuned / "best" / "encoder").iterdir():
        (broken / "encoder" / path.name).write_bytes(path.read_bytes())
    (broken / "head.safetensors").write_bytes((broken / "head.safetensors").read_bytes()[:100])
    (tmp_path / "x.fasta").write_text(">a\nMKT\n")
    predict = ["predict", "--input", str(tmp_path / "x.fasta"), "--output", str(tmp_path / "x.tsv"), "--model"]
    assert f"{broken} is damaged" in refused(*predict, str(broken))
    assert not (tmp_path / "x.tsv").exists()


def fluorescence(folder: Path) -> Path:
    folder.mkdir()
    (folder / "test.json").write_text(json.dumps([{"primary": "MKT", "log_fluorescence": [1.0]}]))
    return folder


def test_contacts_from_attention_alone(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    (tmp_path / "proteinnet").mkdir()
    for name, size in (("train", 22), ("valid", 3)):
        records = [
            {"primary": protein.decode(), "tertiary": random.normal(0, 2, (30, 3)).cumsum(axis=0).tolist()}
            for protein in random_proteins([30] * size)
        ]
        (tmp_path / "proteinnet" / f"proteinnet_{name}.json").write_text(json.dumps(records))
    flags = ["--split", "valid", "--output", str(tmp_path / "numbers.json")]
    found = evaluate(capsys, inputs / "model", tmp_path, *flags, task="unsupervised_contacts")
    assert (found["num_examples"], found["num_fitted"]) == (3, 20)
    written = json.loads((tmp_path / "numbers.json").read_text())
    assert written["metrics"]["precision_at_l5_min_sep_6"]["value"] == found["precision_at_l5_min_sep_6"]
    flags = ["--model", str(inputs / "model"), "--data", str(tmp_path), "--check_processes", "2"]
    assert cli.main(["evaluate", "--task", "unsupervised_contacts", *flags]) == 2
    assert "runs in one process" in capsys.readouterr().err


def test_help_answers_without_loading_torch() -> None:
    lines = [
        "import sys",
        "from megaprot.tools.cli import main",
        "try:",
        "    main(['finetune', '--help'])",
        "except SystemExit:",
        "    print([name for name in ('torch', 'deepspeed', 'transformers') if name in sys.modules])",
    ]
    found = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"
    assert "--tuning.lora_rank" in found.stdout
