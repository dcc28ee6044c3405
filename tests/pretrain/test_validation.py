"""Wrong input is one sentence that names the key or the file, exit status 2, before a process is started."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megaprot.common.vocabulary import get_vocabulary
from megaprot.pretrain.config import DataConfig, TrainConfig
from megaprot.pretrain.parallel import Place
from megaprot.pretrain.validation import batch_rows_at, row_shape_of
from megaprot.tools import cli
from tests.pretrain.runs import begin, run, small_config, write_corpus

Flags = dict[str, str]
MODEL: Flags = {"model.num_layers": "4", "model.hidden_size": "64", "model.num_attention_heads": "4"}
ROWS: Flags = {"data.row_tokens": "128", "data.max_sequence_length": "80", "train.global_batch_rows": "8"}
FOUR: Flags = {"check_processes": "4"}
GPU = torch.cuda.is_available()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def argv(corpus: Path, folder: Path, **changed: str) -> list[str]:
    flags = MODEL | ROWS | {"data.path": str(corpus), "run.dir": str(folder / "run"), "check_processes": "1"} | changed
    return ["pretrain", *(word for name, text in flags.items() for word in (f"--{name}", *text.split()))]


def the_sentence(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("megaprot pretrain: error: ")
    return captured.err


WRONG: list[tuple[Flags, str]] = [
    # layouts
    (FOUR | {"parallel.tensor": "3"}, "parallel.tensor 3 does not divide the model (heads 4, feed-forward 256, "),
    (FOUR | {"parallel.tensor": "8"}, "choose one of 1, 2, 4."),
    (FOUR | {"parallel.tensor": "0"}, "parallel.tensor"),
    (FOUR | {"parallel.pipeline": "-1"}, "parallel.pipeline is -1; give 1 or more."),
    (FOUR | {"parallel.pipeline": "5"}, "asks for 5 chunks, but the model has only 4 layers; use fewer stages."),
    (FOUR | {"parallel.pipeline": "4", "parallel.virtual_pipeline": "2"}, "8 chunks, but the model has only 4 layers"),
    (FOUR | {"parallel.virtual_pipeline": "2"}, "parallel.virtual_pipeline interleaves pipeline stages; it needs"),
    (FOUR | {"parallel.pipeline": "2", "parallel.pipeline_layout": "1 2"}, "must hold 2 positive numbers that add up"),
    (FOUR | {"parallel.pipeline": "2", "parallel.pipeline_layout": "4 0"}, "must hold 2 positive numbers that add up"),
    (FOUR | {"parallel.pipeline": "2", "parallel.pipeline_layout": "1 1 2"}, "[1, 1, 2] must hold 2 positive numbers"),
    (FOUR | {"parallel.pipeline_layout": "2 2"}, "parallel.pipeline_layout [2, 2] must hold 1"),
    (FOUR | {"parallel.sequence": "true"}, "parallel.sequence needs parallel.tensor of 2 or more"),
    (FOUR | {"parallel.sequence": "true", "parallel.tensor": "2", "data.row_tokens": "129"}, "divides data.row_tokens"),
    (
        {"check_processes": "2", "parallel.tensor": "2", "parallel.pipeline": "2"},
        "needs a multiple of 4 processes, but there are 2; start it with megaprot launch local --nproc 4.",
    ),
    # batches
    (FOUR | {"train.global_batch_rows": "6"}, "6 rows cannot be dealt to 4 data-parallel ranks; make train.global_"),
    ({"train.global_batch_rows": "0"}, "a global batch of 0 rows"),
    (
        {"check_processes": "2", "parallel.pipeline": "2", "parallel.virtual_pipeline": "2"}
        | {"train.global_batch_rows": "9"},
        "9 rows cannot be dealt to 1 data-parallel ranks in groups of 2 (interleaved pipeline)",
    ),
    ({"train.ramp_up_start_rows": "3"}, "needs ramp_up_steps and a ramp_up_increment_rows that leads from it"),
    (
        {"train.ramp_up_start_rows": "3", "train.ramp_up_increment_rows": "2", "train.ramp_up_steps": "9"},
        "3 + n x 2 never is 8",
    ),
    (
        FOUR | {"train.ramp_up_start_rows": "2", "train.ramp_up_increment_rows": "3", "train.ramp_up_steps": "9"},
        "a global batch of 2 rows cannot be dealt to 4",
    ),
    # shapes
    ({"model.hidden_size": "62"}, "model.hidden_size 62 is not divisible by model.num_attention_heads 4."),
    ({"model.hidden_size": "12"}, "rotary positions need an even head size, 12 / 4 is odd"),
    ({"model.num_layers": "0"}, "model.num_layers is 0; give a positive number."),
    ({"model.num_attention_heads": "0"}, "model.num_attention_heads is 0; give a positive number."),
    ({"model.ffn_hidden_size": "-4"}, "model.ffn_hidden_size is -4"),
    ({"model.hidden_dropout": "1.0"}, "model.hidden_dropout is 1.0; give a share below 1."),
    ({"data.row_tokens": "64"}, "data.max_sequence_length (80) is larger than data.row_tokens (64)"),
    ({"data.max_sequence_length": "2"}, "data.max_sequence_length is 2, which leaves no residue"),
    ({"data.row_tokens": "0"}, "data.row_tokens is 0; give a number above 0."),
    # numbers
    ({"train.num_steps": "0"}, "train.num_steps is 0; give a number above 0."),
    ({"train.log_interval": "0"}, "train.log_interval is 0; give a number above 0."),
    ({"train.save_interval": "-1"}, "train.save_interval is -1; give 0 or more."),
    ({"optim.lr": "0"}, "optim.lr is 0.0; give a number above 0."),
    ({"optim.lr": ".nan"}, "optim.lr is nan"),
    ({"optim.beta2": "1.0"}, "optim.beta2 is 1.0; give a number from 0 to below 1."),
    ({"optim.lr": ".inf"}, "optim.lr is inf"),
    ({"optim.lr": "1e-4", "optim.min_lr": "1e-3"}, "optim.min_lr 0.001 is above optim.lr 0.0001"),
    ({"optim.warmup_steps": "50", "optim.decay_steps": "10"}, "optim.decay_steps 10 ends within the 50 warm-up steps"),
    ({"run.peak_tflops": "-5"}, "run.peak_tflops is -5.0; give 0 or more."),
    ({"train.ramp_up_steps": "5"}, "need train.ramp_up_start_rows; give all three."),
    ({"check_processes": "-1"}, "check_processes is -1; give the number of processes."),
    ({"data.num_workers": "-1"}, "data.num_workers is -1; give 0 or more."),
    ({"data.mask_probability": "0"}, "data.mask_probability is 0.0"),
    ({"data.random_fraction": "0.3"}, "data.mask_token_fraction and data.random_fraction add up to 1.1"),
    # keys
    ({"model.hiden_size": "64"}, "unknown flag --model.hiden_size; did you mean --model.hidden_size?"),
    ({"optim.lr": "fast"}, "--optim.lr must be a number, but got 'fast'"),
    ({"train.precision": "fp8"}, "--train.precision must be "),
    ({"train.num_steps": "1.5"}, "--train.num_steps must be a whole number, but got 1.5"),
    ({"config": "esm2_8n"}, "no recipe of that name; did you mean esm2_8m?"),
    ({"data.path": ""}, "--data.path"),
    ({"data.path": "nowhere"}, "nowhere is not a folder; make it with megaprot preprocess."),
]


@pytest.mark.parametrize(("changed", "sentence"), WRONG, ids=[" ".join(case[1].split()[:4]) for case in WRONG])
def test_wrong_configuration_is_one_sentence(
    changed: Flags, sentence: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv(corpus, tmp_path, **changed)) == 2
    assert sentence in the_sentence(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("backend", ["varlen", "te"])
@pytest.mark.skipif(GPU, reason="the kernels may be there")
def test_a_kernel_this_machine_lacks_is_an_error(
    backend: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv(corpus, tmp_path, **{"model.attention_backend": backend})) == 2
    assert f"model.attention_backend: {backend} needs a CUDA device" in the_sentence(capsys)


@pytest.mark.skipif(GPU, reason="allowed there")
def test_overlap_needs_cuda(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv(corpus, tmp_path, **{"parallel.overlap_communication": "true"})) == 2
    assert "parallel.overlap_communication needs CUDA devices" in the_sentence(capsys)


def test_a_run_without_data_path_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrain", "--run.dir", str(tmp_path / "run")]) == 2
    assert "give data.path, a folder that megaprot preprocess made, or data.blend" in the_sentence(capsys)


@pytest.mark.parametrize("inside", ["", "deeper/run"])
def test_a_run_folder_that_is_or_is_in_a_file_is_an_error(
    inside: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(argv(corpus, tmp_path, **{"run.dir": str(tmp_path / "file" / inside)})) == 2
    assert f"run.dir {tmp_path}/file" in the_sentence(capsys)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "flipped": _flip,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "file", [f"{part}{suffix}" for part in ("train", "valid") for suffix in (".bin", ".idx", ".json")]
)
def test_damaged_data_is_named(file: str, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    DAMAGES[damage](corpus / file)
    assert cli.main(argv(corpus, tmp_path)) == 2
    assert str(corpus / file) in the_sentence(capsys)


def test_parts_of_different_vocabularies_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_corpus(tmp_path / "esm")
    other = write_corpus(tmp_path / "iupac", vocabulary=get_vocabulary("iupac"))
    for suffix in (".bin", ".idx", ".json"):
        (other / f"valid{suffix}").rename(corpus / f"valid{suffix}")
    assert cli.main(argv(corpus, tmp_path)) == 2
    assert "has another vocabulary (iupac) than" in the_sentence(capsys)


@pytest.fixture(scope="module")
def earlier_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory, alone: Place) -> Path:
    """A folder whose ``run`` holds one step of the model and data of ``argv``."""
    folder = tmp_path_factory.mktemp("earlier")
    shape = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4}
    config = small_config(corpus, folder / "run", model=shape, train={"num_steps": 1, "precision": "bf16"})
    run(begin(config, alone))
    return folder


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"run.seed": "7"}, "run.seed is 7, but the run in {run} began with 1234; keep it or name a new run.dir."),
        ({"train.precision": "fp32"}, "train.precision is fp32, but the run in {run} began with bf16"),
        ({"model.num_layers": "3"}, "model.num_layers is 3, but the run in {run} began with 4"),
        ({"model.ffn_hidden_size": "128"}, "model.ffn_hidden_size differs from the run in {run}"),
        ({"data.row_tokens": "256"}, "data.row_tokens is 256, but the run in {run} began with 128"),
        ({"parallel.distributed_optimizer": "true"}, "parallel.distributed_optimizer is True, but the run in {run}"),
        ({"data.path": "{other}"}, "the corpus {other} is not the one the run in {run} was trained on"),
        ({"data.path": "{iupac}"}, "vocabulary iupac, but the run in {run} has esm; preprocess with --vocabulary esm"),
    ],
)
def test_a_run_is_not_continued_as_another(
    changed: Flags, sentence: str, corpus: Path, earlier_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {
        "run": str(earlier_run / "run"),
        "other": str(write_corpus(tmp_path / "other", seed=2)),
        "iupac": str(write_corpus(tmp_path / "iupac", vocabulary=get_vocabulary("iupac"))),
    }
    capsys.readouterr()
    assert cli.main(argv(corpus, earlier_run, **{name: text.format(**places) for name, text in changed.items()})) == 2
    assert sentence.format(**places) in the_sentence(capsys)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"optim.lr": "1e-5", "optim.min_lr": "1e-6", "train.num_steps": "9"},
        {"data.num_workers": "1", "train.global_batch_rows": "16"},
        FOUR | {"parallel.tensor": "2", "parallel.pipeline": "2", "parallel.sequence": "true"},
        FOUR | {"parallel.pipeline": "2", "parallel.pipeline_layout": "3 1", "train.recompute": "full"},
    ],
)
def test_what_may_change_between_restarts_is_let_pass(
    changed: Flags, corpus: Path, earlier_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv(corpus, earlier_run, **changed)) == 0
    assert capsys.readouterr().out.endswith("processes\n")


@pytest.mark.parametrize("program", [["pretrain"], ["launch", "local", "--nproc", "2", "--", "pretrain"]])
def test_the_programs_end_with_status_2_and_start_nothing(program: list[str], tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    os.truncate(corpus / "train.bin", 100)
    words = [*program, *argv(corpus, tmp_path)[1:-2]]
    done = subprocess.run([sys.executable, "-m", "megaprot.tools.cli", *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"megaprot pretrain: error: {corpus / 'train.bin'}: is truncated (100 bytes, ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("step", "rows"), [(0, 2), (1, 2), (2, 4), (3, 4), (4, 6), (5, 6), (6, 8), (7, 8), (100, 8)])
def test_batches_are_ramped_up_in_equal_stretches(step: int, rows: int) -> None:
    train = TrainConfig(
        global_batch_rows=8, ramp_up_start_rows=2, ramp_up_increment_rows=2, ramp_up_steps=6
    )  # 2 -> 4 -> 6 -> 8: three increases in six steps
    assert batch_rows_at(step, train) == rows
    assert batch_rows_at(step, TrainConfig(global_batch_rows=8)) == 8


@given(start=st.integers(1, 50), increment=st.integers(1, 9), num=st.integers(1, 40), steps=st.integers(1, 300))
def test_a_ramp_up_never_falls_and_stays_on_its_grid(start: int, increment: int, num: int, steps: int) -> None:
    end = start + num * increment
    train = TrainConfig(
        global_batch_rows=end, ramp_up_start_rows=start, ramp_up_increment_rows=increment, ramp_up_steps=steps
    )
    rows = [batch_rows_at(step, train) for step in range(steps + 3)]
    assert rows == sorted(rows)
    assert (rows[0], rows[steps]) == (start, end)
    assert set(rows) <= set(range(start, end + 1, increment))


@given(row_tokens=st.integers(8, 10_000), tensor=st.sampled_from([1, 2, 3, 4, 8, 128]), has_fp8=st.booleans())
def test_places_for_masked_positions_are_enough_and_shared_evenly(row_tokens: int, tensor: int, has_fp8: bool) -> None:
    capacity = row_shape_of(DataConfig(row_tokens=row_tokens), tensor, has_fp8).masked_capacity
    assert capacity % ((32 if has_fp8 else 1) * tensor) == 0
    assert capacity >= 0.15 * row_tokens + 8 * (0.15 * 0.85 * row_tokens) ** 0.5
