"""A real Slurm on this machine: two virtual nodes that claim 128 cores and eight GPUs each."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")
CONTROLLER_PORT, NODE_PORT = 16917, 16921
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
ReturnToService=2
SlurmUser=root
SlurmdUser=root
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/controller.log
SlurmdLogFile={folder}/log/slurmd-%n.log
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
KillWait=20
NodeName=DEFAULT CPUs=128 RealMemory=64000 Gres=gpu:h100:8
NodeName=node[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first_port}-{last_port}]
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE
PartitionName=gpu Nodes=ALL MaxTime=2-00:00:00 State=UP
"""


def _write_configuration(folder: Path) -> None:
    for name in ("state", "log", "munge"):
        (folder / name).mkdir(mode=0o700)
    (folder / "munge" / "key").write_bytes(os.urandom(128))
    (folder / "munge" / "key").chmod(0o600)
    for number in range(8):
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"NodeName=node[1-2] Name=gpu Type=h100 File={folder}/gpu[0-7]\n")
    ports = {"controller_port": CONTROLLER_PORT, "first_port": NODE_PORT, "last_port": NODE_PORT + 1}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(host=socket.gethostname(), folder=folder, **ports))


def _start(folder: Path) -> None:
    munge = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    options = [f"--{option}={folder / 'munge' / name}" for option, name in munge.items()]
    configuration = str(folder / "slurm.conf")
    for command in (
        ["munged", "--force", *options],
        ["slurmctld", "-f", configuration],
        ["slurmd", "-N", "node1", "-f", configuration],
        ["slurmd", "-N", "node2", "-f", configuration],
    ):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=30)


def _nodes() -> str:
    return subprocess.run(["sinfo", "-h", "-p", "debug", "-o", "%D %T"], capture_output=True, text=True).stdout


def _stop(folder: Path) -> None:
    for file in (*folder.glob("slurmd-*.pid"), folder / "controller.pid", folder / "munge" / "pid"):
        if file.exists():
            try:
                daemon = psutil.Process(int(file.read_text()))
                daemon.terminate()
                daemon.wait(10)
            except psutil.TimeoutExpired:
                daemon.kill()
            except (psutil.Error, ValueError):
                continue


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A running cluster; SLURM_CONF is set to its configuration. Skips where Slurm cannot be started."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.skip(f"no Slurm here: {', '.join(missing)} missing (Debian: apt-get install slurm-wlm munge)")
    if os.geteuid() != 0:
        pytest.skip("starting a Slurm takes root")
    folder = tmp_path_factory.mktemp("slurm")
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    try:
        _write_configuration(folder)
        _start(folder)
        end = time.monotonic() + 60
        while (
            "2 idle"
            not in subprocess.run(["sinfo", "-h", "-p", "debug", "-o", "%D %T"], capture_output=True, text=True).stdout
        ):
            if time.monotonic() > end:
                pytest.skip(f"Slurm does not start: {(folder / 'log' / 'controller.log').read_text()[-2000:]}")
            time.sleep(0.3)
        yield folder
    except (subprocess.SubprocessError, OSError) as error:
        pytest.skip(f"Slurm cannot be started: {error}")
    finally:
        subprocess.run(["scancel", "--user=root"], capture_output=True)
        time.sleep(1)
        _stop(folder)
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before
