"""The shipped pretrain script on a real Slurm of two nodes: warned, requeued, robbed of a rank and of a node, ended."""

import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from megaprot.common.config_yaml import config_to_yaml
from tests.distributed.launched import Launched
from tests.pretrain.runs import rows_of, small_config
from tests.pretrain.tiny import write_domains
from tests.slurm.jobs import Job, launch_slurm, slurm

pytestmark = pytest.mark.slow

TP2 = {"tensor": 2}
CONSTANT = {"decay": "constant"}  # the length of the run then changes nothing
OPTIONS = ["--nodes", "2", "--nproc", "2", "--time", "20", "--warning_seconds", "120", "--silent_seconds", "30"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """The first shipped Pfam domains."""
    return write_domains(tmp_path / "corpus", 200)


def rank_of(job: Job, number: int) -> psutil.Process:
    """The process of one rank."""
    for process in job.processes():
        try:
            environment = process.environ()
        except psutil.Error:
            continue
        if environment.get("RANK") == str(number) and "megaprot.tools.cli" in process.cmdline():
            return process
    raise AssertionError(f"no rank {number}:\n{job.log[-3000:]}")


def test_whatever_happens_to_a_job_its_losses_are_those_of_an_uninterrupted_run(
    cluster: Path, corpus: Path, tmp_path: Path
) -> None:
    train = {"num_steps": 100_000, "save_interval": 10, "eval_interval": 0, "keep_checkpoints": 2}
    config = small_config(corpus, tmp_path / "run", parallel=TP2, optim=CONSTANT, train=train)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config_to_yaml(config))
    job = Job(tmp_path / "run", *OPTIONS, "--", "pretrain", "--config", str(recipe), "--run.dir", config.run.dir)

    job.wait_for_start(1)
    assert "layout    4 x CPU (gloo): TP 2, PP 1 (layers a chunk 2), DP 2" in job.log
    rank_of(job, 3).send_signal(signal.SIGKILL)
    job.wait_for(lambda: "starting again from the last save (1 of at most 3)" in job.log, "restart within the job")
    assert job.log.count("was killed by SIGKILL") == 1
    assert "megaprot launch: rank 3 on node2 was killed by SIGKILL, after step " in job.log

    job.wait_for_start(2)
    # Between one and two minutes are left: Slurm's warning is due, and comes when it next looks, each half minute.
    slurm("scontrol", "update", f"JobId={job.number}", f"TimeLimit={job.minutes() + 2}")
    job.wait_for(lambda: "asked to stop: saved at step " in job.log, "save before the limit")
    job.wait_for(lambda: "megaprot launch: requeueing the job: step " in job.log, "requeue by the script")
    slurm("scontrol", "update", f"JobId={job.number}", "TimeLimit=20")

    job.wait_for_start(3)
    assert f"job {job.number}, start 2: 2 node(s) node[1-2], 2 ranks each" in job.log
    slurm("scontrol", "requeue", job.number)

    job.wait_for_start(4)
    slurm("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    job.wait_for(lambda: job.state == "PENDING", "requeue by Slurm")
    subprocess.run(["scontrol", "update", "NodeName=node2", "State=RESUME"], capture_output=True)  # unless it is back

    job.wait_for_start(5)
    slurm("scancel", job.number)
    job.wait_for(lambda: job.state == "CANCELLED", "end")
    job.wait_for(lambda: not job.processes(), "end of all processes", 40)
    assert job.log.count("asked to stop: saved at step ") >= 2  # a requeue or a lost node, too, may leave time to save
    assert job.log.count("requeueing") == 1
    assert "Traceback" not in job.log

    last = job.step()
    train |= {"num_steps": last, "save_interval": 0}
    whole = small_config(corpus, tmp_path / "whole", parallel=TP2, optim=CONSTANT, train=train)
    uninterrupted = Launched(whole, 4)
    assert uninterrupted.finish() == 0, uninterrupted.output
    expected = [row for row in rows_of(tmp_path / "whole") if "loss" in row]
    assert rows_of(tmp_path / "run") == expected
    assert len(expected) == last > 20


def test_the_next_job_of_a_chain_goes_on_where_the_one_before_was_stopped(
    cluster: Path, corpus: Path, tmp_path: Path
) -> None:
    train = {"num_steps": 100_000, "save_interval": 0, "eval_interval": 0}
    config = small_config(corpus, tmp_path / "run", optim=CONSTANT, train=train)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config_to_yaml(config))
    options = ["--nodes", "2", "--nproc", "1", "--time", "20", "--chain", "2"]
    first = Job(tmp_path / "run", *options, "--", "pretrain", "--config", str(recipe), "--run.dir", config.run.dir)
    second = first.next_of_chain()
    first.wait_for_start(1)
    assert second.state == "PENDING"
    slurm("scancel", "--signal=USR1", "--batch", first.number)  # what Slurm sends ahead of the limit
    first.wait_for(lambda: first.state == "COMPLETED", "end of the first job")
    saved = first.step()
    assert f"megaprot launch: stopped at step {saved}; the next job goes on" in first.log
    second.wait_for_start(1)
    assert f"resumed from {tmp_path / 'run'}/checkpoints/step_{saved:08d}" in second.log
    slurm("scancel", second.number)
    second.wait_for(lambda: second.state == "CANCELLED", "end of the second job")
    second.wait_for(lambda: not second.processes(), "end of all processes", 40)
    steps = [row["step"] for row in rows_of(tmp_path / "run") if "loss" in row]
    assert steps == list(range(1, len(steps) + 1)), "a step was lost or taken twice"
    assert len(steps) >= saved + 4


def test_a_sweep_runs_each_line_in_a_folder_of_its_own(cluster: Path, corpus: Path, tmp_path: Path) -> None:
    train = {"num_steps": 2, "save_interval": 0, "eval_interval": 0}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config_to_yaml(small_config(corpus, tmp_path / "unused", train=train)))
    lines = tmp_path / "sweep.txt"
    lines.write_text("# learning rates\n--optim.lr 1e-3\n\n--optim.lr 2e-3 --run.seed 7\n")
    sweep = ["--nproc", "1", "--time", "20", "--sweep", str(lines), "--log_dir", str(tmp_path / "logs")]
    command = ["pretrain", "--config", str(recipe), "--run.dir", f"{tmp_path}/lr_{{task}}"]
    job = Job(tmp_path, *sweep, "--", *command)
    folders = [tmp_path / f"lr_{task}" for task in (0, 1)]
    job.wait_for(lambda: all((folder / "checkpoints" / "step_00000002").exists() for folder in folders), "both runs")
    rates = [rows_of(folder)[0]["learning_rate"] for folder in folders]
    assert rates == [pytest.approx(0.5e-3), pytest.approx(1e-3)]  # the first of two steps of warm-up
    assert (tmp_path / "logs" / f"job-{job.number}_1.log").exists()


SITES = {
    "CPU nodes": ["--nodes", "2", "--nproc", "4", "--time", "30"],
    "GPU nodes": ["--nodes", "2", "--gpus_per_node", "8", "--time", "1-00:00:00", "--partition", "gpu"],
    "named GPUs": ["--gpus_per_node", "4", "--gpu_type", "h100", "--cpus_per_rank", "12", "--time", "24:00:00"],
    "a range of nodes": ["--nodes", "1-2", "--gpus_per_node", "8", "--time", "60"],
    "a container": [
        *("--gpus_per_node", "8", "--time", "60", "--container_image", "image.sif"),
        *("--container_runtime", "apptainer", "--container_mounts", "/data:/data"),
    ],
    "more options": ["--nproc", "1", "--time", "60", "--directive=--exclusive", "--directive=--mem=4G"],
    "a sweep": ["--gpus_per_node", "1", "--time", "60", "--sweep", "SWEEP", "--sweep_at_once", "2"],
    "a chain": ["--gpus_per_node", "1", "--time", "60", "--chain", "3"],
}


@pytest.mark.parametrize("command", ["pretrain", "evaluate"])
@pytest.mark.parametrize("site", SITES)
def test_slurm_accepts_the_scripts_of_typical_sites(site: str, command: str, cluster: Path, tmp_path: Path) -> None:
    (tmp_path / "sweep.txt").write_text("--run.seed 1\n--run.seed 2\n--run.seed 3\n")
    options = [str(tmp_path / "sweep.txt") if word == "SWEEP" else word for word in SITES[site]]
    words = ["pretrain", "--run.dir", f"{tmp_path}/run_{{task}}"] if command == "pretrain" else ["evaluate"]
    done = launch_slurm(*options, "--log_dir", str(tmp_path / "logs"), "--test_only", "--", *words)
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stdout


def test_what_slurm_refuses_is_said_in_one_sentence(cluster: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = ["--", "pretrain", "--run.dir", str(folder)]
    done = launch_slurm("--nproc", "1", "--time", "20", "--partition", "absent", *command)
    assert done.returncode == 1
    assert done.stderr.startswith("megaprot launch: error: Slurm refused ")
    assert "invalid partition" in done.stderr.lower()
    assert done.stderr.count("\n") == 1


def test_wrong_input_ends_the_job_before_any_rank_starts(cluster: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    job = Job(
        folder, "--nproc", "3", "--time", "20", "--", "pretrain", "--run.dir", str(folder), "--parallel.tensor", "2"
    )
    job.wait_for(lambda: job.state in ("FAILED", "COMPLETED"), "end")
    assert "megaprot pretrain: error: " in job.log
    assert "ExitCode=2:0" in slurm("scontrol", "show", "job", job.number)
    assert "requeueing" not in job.log
