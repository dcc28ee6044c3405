"""``megaprot plan`` from the command line: its table, its JSON, and the command it prints."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megaprot.common.command_line import parse_config
from megaprot.pretrain.__main__ import RECIPES
from megaprot.pretrain.config import PretrainConfig
from megaprot.tools import cli
from megaprot.tools.planning.layouts import check_valid
from megaprot.tools.planning.report import command_line, recipe_arguments
from tests.pretrain.tiny import ROOT, tiny_config, write_domains


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The JSON of a plan."""
    assert cli.main(["plan", *arguments, "--json", "true"]) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    return values


def read_command(words: list[str]) -> PretrainConfig:
    """What a printed command asks for."""
    assert words[:2] == ["megaprot", "pretrain"]
    return parse_config(PretrainConfig, words[2:], program="", description="", recipes=RECIPES)


@pytest.mark.parametrize(
    ("recipe", "gpus", "gpu"),
    [
        ("esm2_8m", 1, "a100-40"),
        ("esm2_650m", 64, "h100"),
        ("esm2_15b", 128, "b200"),
        ("proteinlm_200m", 32, "a100-80"),
    ],
)
def test_the_printed_command_asks_for_the_best_layout(
    recipe: str, gpus: int, gpu: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--config", recipe, "--gpus", str(gpus), "--gpu", gpu, "--data.path", "a corpus", "--optim.lr=1e-3"]
    values = planned(capsys, *flags)
    config, best = read_command(values["command"]), values["layouts"][0]
    data_size = check_valid(config, gpus)
    assert data_size == best["data_parallel"]
    assert {name: best["parallel"][name] for name in ("tensor", "pipeline", "sequence")} == {
        name: getattr(config.parallel, name) for name in ("tensor", "pipeline", "sequence")
    }
    assert (config.data.row_tokens, config.train.recompute) == (best["row_tokens"], best["recompute"])
    assert (config.data.path, config.optim.lr) == ("a corpus", 1e-3)
    assert best["fits"] and best["memory_bytes"]["total"] == pytest.approx(
        sum(size for part, size in best["memory_bytes"].items() if part != "total")
    )


def test_the_table_lists_layouts_and_repeats_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--config", "esm2_650m", "--gpus", "16", "--tokens", "1e11", "--price", "2", "--show", "3"]
    assert cli.main(["plan", *flags, "--data.path", "a corpus"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"\d+ of \d+ valid layouts fit 16 x h100; predictions for 1e\+11 tokens", lines[0])
    assert lines[2].split()[:6] == ["TP", "PP", "VPP", "SP", "DP", "row"]
    assert len(lines[3:]) == 3 + 1 + 3 + 1 + 1
    hours, cost = float(lines[3].split()[-1].replace(",", "")), float(lines[9].split()[-1].replace(",", ""))
    assert cost == pytest.approx(2 * hours, abs=2)
    assert "--data.path 'a corpus'" in lines[-1]
    assert read_command(shlex.split(lines[-1])).data.path == "a corpus"


def test_the_layout_of_the_configuration_is_reported_too(capsys: pytest.CaptureFixture[str]) -> None:
    values = planned(capsys, "--config", "esm2_3b", "--gpus", "8", "--parallel.tensor", "2", "--gpu", "a100-40")
    assert values["asked"]["parallel"]["tensor"] == 2
    assert not values["asked"]["fits"]
    assert planned(capsys, "--config", "esm2_3b", "--gpus", "64")["asked"] is None


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--gpus", "0"], "--gpus is 0"),
        (["--gpus", "8", "--gpu", "h1000"], "--gpu must be one of"),
        (["--gpus", "8", "--tokens", "-1"], "--tokens is -1.0; give 0 or more."),
        (["--gpus", "8", "--scaling", "figure.doc"], "must end in .png, .svg or .pdf"),
        (["--gpus", "8", "--scaling", "no such folder/figure.svg"], "its folder does not exist"),
        (["--gpus", "8", "--gpu", "own"], "--gpu own needs --figures.memory_gb"),
        ([], "--gpus is required"),
        (["--gpus", "8", "--train.precision", "fp32"], "rates are known for bf16 and fp16 only"),
        (["--gpus", "8", "--model.hiden_size", "64"], "did you mean --model.hidden_size"),
        (["--gpus", "1", "--config", "esm2_15b"], "nothing fits"),
        (["--gpus", "8", "--config", "esm2_15b", "--check"], "the nearest that fits"),
        (["--gpus", "7", "--parallel.tensor", "2", "--check"], "needs a multiple of 2 processes"),
    ],
)
def test_wrong_input_is_one_sentence_and_status_2(
    flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *flags]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.splitlines()) == 1


def test_a_layout_that_fits_passes_the_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--check", "--gpus", "8", "--config", "esm2_650m"]) == 0
    assert capsys.readouterr().out.startswith("the layout fits: ")


def test_scaling_is_drawn_with_its_numbers_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "scaling.svg"
    assert cli.main(["plan", "--config", "esm2_650m", "--gpus", "64", "--scaling", str(output)]) == 0
    assert b"<svg" in output.read_bytes()
    rows = (tmp_path / "scaling.csv").read_text().splitlines()
    assert rows[0] == "kind,gpus,predicted_tokens_per_second,predicted_efficiency"
    assert {row.split(",")[0] for row in rows[1:]} == {"strong", "weak"}


def test_recipes_are_found_among_the_arguments_and_lists_are_written_out() -> None:
    argv = ["--gpus", "8", "--config", "a", "b.yaml", "--data.path", "x", "--config=c"]
    assert recipe_arguments(argv) == ["--config", "a", "b.yaml", "--config=c"]
    best = tiny_config(parallel={"pipeline": 2, "pipeline_layout": [1, 3]})
    words = command_line(tiny_config(), best, [])
    assert words == ["pretrain", "--parallel.pipeline", "2", "--parallel.pipeline_layout", "1", "3"]


@pytest.mark.slow
def test_a_printed_command_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        "model: {num_layers: 4, hidden_size: 64, num_attention_heads: 4}\n"
        "data: {row_tokens: 256, max_sequence_length: 80}\n"
        "optim: {warmup_steps: 2}\n"
        "train: {num_steps: 2, global_batch_rows: 8, eval_rows: 4}\n"
    )
    corpus = write_domains(tmp_path / "corpus")
    run = ["--data.path", str(corpus), "--run.dir", str(tmp_path / "run")]
    search = ["--search.tensor", "2", "--search.pipeline", "2", "--search.recompute", "full"]
    words = planned(capsys, "--config", str(recipe), "--gpus", "4", *search, *run)["command"]
    launched = [sys.executable, "-m", "megaprot.tools.cli", "launch", "local", "--nproc", "4", "--", *words[1:]]
    done = subprocess.run(launched, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "checkpoints" / "step_00000002").is_dir()
