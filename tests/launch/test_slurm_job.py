"""Slurm scripts: what is written for typical sites (golden files), clean to shellcheck, and what is refused.

After a wanted change of a template: MEGAPROT_WRITE_GOLDEN=1 pytest tests/launch/test_slurm_job.py, then read the diff.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from megaprot.launch import __main__ as launch_program
from megaprot.launch import binding, node, templates
from megaprot.launch.commands import value_of
from megaprot.launch.supervisor import Ending, Node

GOLDEN = Path(__file__).parent / "golden"
PRETRAIN = ["pretrain", "--config", "esm2_650m", "--data.path", "/shared/corpus", "--run.dir", "/shared/runs/650m"]
SITES: dict[str, tuple[list[str], list[str]]] = {
    "eight_gpus_a_node": (
        [
            *("--nodes", "4", "--gpus_per_node", "8", "--time", "24:00:00", "--partition", "gpu", "--account", "lab"),
            *("--setup", "module load cuda/12.8", "--setup", "source /shared/venv/bin/activate"),
            *("--env", "NCCL_SOCKET_IFNAME=ib0", "--directive=--exclusive"),
        ],
        PRETRAIN,
    ),
    "pyxis": (
        [
            *("--nodes", "2-4", "--gpus_per_node", "8", "--gpu_type", "h100", "--time", "2-00:00:00"),
            *("--container_image", "/shared/megaprot.sqsh", "--container_mounts", "/shared:/shared"),
        ],
        PRETRAIN,
    ),
    "apptainer_chain": (
        [
            *("--gpus_per_node", "4", "--time", "12:00:00", "--chain", "3", "--container_runtime", "apptainer"),
            *("--container_image", "/shared/megaprot.sif"),
        ],
        PRETRAIN,
    ),
    "cpu_nodes": (
        ["--nodes", "2", "--nproc", "4", "--time", "60", "--log_dir", "/shared/logs"],
        [*PRETRAIN, "--run.dir", "/shared/runs/it's here"],
    ),
    "one_node": (["--gpus_per_node", "1", "--time", "60", "--log_dir", "/shared/logs"], ["evaluate", "--model", "m"]),
    "sweep": (
        ["--gpus_per_node", "1", "--time", "4:00:00", "--sweep", "SWEEP", "--sweep_at_once", "8"],
        [*PRETRAIN, "--run.dir", "/shared/runs/sweep_{task}"],
    ),
}
SWEEP = "# learning rates\n--optim.lr 1e-4\n\n--optim.lr 2e-4 --run.wandb_project 'two words'\n"


@pytest.fixture(autouse=True)
def sweep_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("SWEEP").write_text(SWEEP)


def script(options: list[str], command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What --dry_run prints."""
    assert launch_program.main(["slurm", *options, "--python", "/venv/bin/python", "--dry-run", "--", *command]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("site", SITES)
def test_the_script_of_a_site_is_the_one_filed_here(site: str, capsys: pytest.CaptureFixture[str]) -> None:
    options, command = SITES[site]
    text = script(options, command, capsys)
    golden = GOLDEN / f"{site}.sbatch"
    if os.environ.get("MEGAPROT_WRITE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()
    assert "{{" not in text.replace("{{ }}", "")


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="no shellcheck here (Debian: apt-get install shellcheck)"
)
def test_all_scripts_are_clean_to_shellcheck() -> None:
    local = [Path(templates.__file__).parent / "local" / name for name in ("one_machine.sh", "several_machines.sh")]
    files = [*GOLDEN.glob("*.sbatch"), *local]
    assert len(files) == len(SITES) + 2
    done = subprocess.run(["shellcheck", "-e", "SC1091", *map(str, files)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("template", sorted(templates.FOLDER.glob("*.sbatch")), ids=lambda path: path.name)
def test_every_template_is_used_and_ends_with_the_common_part(template: Path) -> None:
    assert template.read_text().rstrip().endswith("{{supervise}}")
    first = template.read_text().splitlines()[1]
    assert any(first in golden.read_text() for golden in GOLDEN.glob("*.sbatch"))


@pytest.mark.parametrize(
    ("options", "command", "sentence"),
    [
        (["--nproc", "1"], PRETRAIN, "required: --time"),
        (["--time", "60"], PRETRAIN, "give --gpus_per_node N (one rank a GPU), or --nproc N"),
        (["--time", "60", "--nproc", "1", "--gpus_per_node", "1"], PRETRAIN, "give --gpus_per_node N"),
        (["--time", "6", "--nproc", "1"], PRETRAIN, "--time 6 is too short for a warning 300 s before its end"),
        (["--time", "0:06:59", "--nproc", "1"], PRETRAIN, "is too short"),
        (["--time", "tomorrow", "--nproc", "1"], PRETRAIN, "--time must be as sbatch takes it"),
        (["--time", "60", "--nproc", "1", "--nodes", "0"], PRETRAIN, "--nodes must be a number or a range"),
        (["--time", "60", "--nproc", "1"], ["pretrain"], "the command must name its folder with --run.dir"),
        (["--time", "60", "--nproc", "1"], ["plot"], "'plot' does not run in several processes"),
        (["--time", "60", "--nproc", "1"], ["pretrain", "--help"], "would only print something"),
        (["--time", "60", "--nproc", "1", "--env", "A B"], PRETRAIN, "--env must be NAME=VALUE, but got 'A B'"),
        (["--time", "60", "--nproc", "1", "--container_mounts", "/a:/a"], PRETRAIN, "needs --container_image"),
        (["--time", "60", "--nproc", "1", "--container_runtime", "docker"], PRETRAIN, "pyxis or apptainer"),
        (["--time", "60", "--nproc", "1", "--directive", "qos"], PRETRAIN, "--directive must be an option of sbatch"),
        (["--time", "60", "--nproc", "1", "--log_dir", "a b"], PRETRAIN, "cannot stand in a #SBATCH line"),
        (["--time", "60", "--nproc", "1", "--sweep", "absent"], PRETRAIN, "write {task} into --run.dir"),
        (["--time", "60", "--nproc", "1", "--template", "absent"], PRETRAIN, "the template absent cannot be read"),
        (
            ["--time", "60", "--nproc", "1", "--template", "odd"],
            PRETRAIN,
            "odd line 2 has {{absent}}, which is not filled",
        ),
    ],
)
def test_wrong_options_end_with_one_sentence(
    options: list[str], command: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("odd").write_text("#!/bin/bash\n{{absent}}\n")
    with pytest.raises(SystemExit) as stopped:
        launch_program.main(["slurm", *options, "--dry_run", "--", *command])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("megaprot launch: error: ")
    assert sentence in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("content", ["", "# nothing\n", "--run.seed 'open\n"])
def test_a_sweep_without_lines_or_with_an_open_quote_is_refused(
    content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("SWEEP").write_text(content)
    with pytest.raises(SystemExit):
        launch_program.main(["slurm", *SITES["sweep"][0], "--dry_run", "--", *SITES["sweep"][1]])
    assert "--sweep SWEEP" in capsys.readouterr().err


def test_a_machine_without_slurm_is_told_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit) as stopped:
        launch_program.main(["slurm", "--nproc", "1", "--time", "9", "--", "pretrain", "--run.dir", "run"])
    assert stopped.value.code == 2
    assert "there is no sbatch here; submit on a login node" in capsys.readouterr().err


def test_a_chain_submits_each_job_after_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in = tmp_path / "bin" / "sbatch"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/sh\necho "$@" >> calls\necho $((100 + $(wc -l < calls)))\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}:{os.environ['PATH']}")
    assert (
        launch_program.main(["slurm", "--nproc", "1", "--time", "9", "--chain", "3", "--", *PRETRAIN[:-1], "run"]) == 0
    )
    calls = Path("calls").read_text().splitlines()
    assert [call.split()[1] for call in calls[1:]] == ["--dependency=afterany:101", "--dependency=afterany:102"]
    assert len({call.split()[-1] for call in calls}) == 1
    assert "requeues=0" in Path(calls[0].split()[-1]).read_text()
    assert capsys.readouterr().out.count("submitted job 10") == 3


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--run.dir", "a"], "a"),
        (["--run.dir=a"], "a"),
        (["--run.dir", "a", "--run.dir", "b"], "b"),
        (["--run.seed", "3"], ""),
        (["--run.dir"], ""),
    ],
)
def test_a_flag_of_the_command_is_found(words: list[str], value: str) -> None:
    assert value_of("run.dir", ["pretrain", *words]) == value


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        (Ending(), 0),
        (Ending(2, "", is_on_purpose=True), 2),
        (Ending(1, "", is_on_purpose=True), 5),
        (Ending(137, ""), 4),
        (Ending(1, ""), 4),
        (Ending(3, ""), 3),
        (Ending(143, "", is_by_signal=True), 3),
    ],
)
def test_a_node_tells_the_script_what_to_do(ending: Ending, status: int) -> None:
    assert node.status_of(ending) == status


def test_a_port_in_use_is_named_before_ranks_start() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} of here cannot be used" in node.port_problem(Node([], 1, address="here", port=port))
    assert not node.port_problem(Node([], 1, address="here", port=port))


def test_ranks_get_whole_cores_of_one_socket(tmp_path: Path) -> None:
    # Two sockets of four cores of two threads, numbered as Linux does: 0-3 and 4-7, then their second threads.
    for cpu in range(16):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(str(cpu % 8 // 4))
        (folder / "core_id").write_text(str(cpu % 4))
    assert binding.shares(set(range(16)), 4, tmp_path) == [{0, 8, 1, 9}, {2, 10, 3, 11}, {4, 12, 5, 13}, {6, 14, 7, 15}]
    assert binding.shares({0, 1}, 4, tmp_path) == [{0, 1}] * 4
    assert binding.shares({5, 3}, 2, tmp_path / "absent") == [{3}, {5}]


def test_a_layout_that_cannot_fit_is_refused_before_the_job_is_queued(capfd: pytest.CaptureFixture[str]) -> None:
    job = ["--gpus_per_node", "8", "--gpu", "h100", "--time", "60", "--dry_run", "--"]
    launch_program.main(["slurm", *job, *PRETRAIN])
    assert capfd.readouterr().out.startswith("#!/usr/bin/env bash")
    with pytest.raises(SystemExit) as ended:
        launch_program.main(["slurm", *job, *PRETRAIN, "--config", "esm2_15b"])
    assert ended.value.code == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert "no room is left for gradients" in printed.err
    with pytest.raises(SystemExit):
        launch_program.main(["slurm", *SITES["cpu_nodes"][0], "--gpu", "h100", "--dry_run", "--", *PRETRAIN])
    assert "--gpu is for pretrain on GPUs" in capfd.readouterr().err
