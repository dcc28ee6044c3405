"""Run a command as a Slurm job: ``megaprot launch slurm --nodes 4 --gpus_per_node 8 --time 24:00:00 -- pretrain ...``.

A script is made from a template (see ``launch/slurm``), filed beside the job's logs and submitted. The script checks
the command once, runs it, starts again after faults, and requeues itself when Slurm warns of the time limit.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from megaprot.launch import templates
from megaprot.launch.commands import RUN_FOLDER_FLAGS, asks_only, require_launchable, value_of
from megaprot.launch.options import Parser, fail, number, split_at_dashes
from megaprot.launch.templates import words

_EPILOG = """\
example: megaprot launch slurm --nodes 4 --gpus_per_node 8 --time 24:00:00 --partition gpu --account lab \\
             -- pretrain --config esm2_650m --data.path /shared/corpus --run.dir /shared/runs/650m

--dry_run prints the script; docs/slurm.md explains it."""


def main(argv: list[str]) -> int:
    """Read ``[OPTIONS] -- COMMAND ARGUMENTS``, make the script, submit it, and return the exit status.

    Wrong arguments exit with status 2 after one sentence; so does a machine without Slurm. Status 1: Slurm refused.
    """
    own, command = split_at_dashes(argv)
    options = _parser().parse_args(own)
    require_launchable(command)
    if asks_only(command):
        fail(f"{command[0]} would only print something; call megaprot {shlex.join(command)} here")
    script = render(options, command)
    if options.gpu:
        _ask_planner(options, command)
    if options.dry_run:
        print(script, end="")
        return 0
    return submit(options, log_folder(options, command), script)


def _parser() -> Parser:
    parser = Parser(
        prog="megaprot launch slurm",
        description=(__doc__ or "").split("\n")[0],
        epilog=_EPILOG,
        usage="%(prog)s --time T [OPTIONS] -- COMMAND [ARGUMENTS]",
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.option
    add("--nodes", "N", "nodes, or a range such as 2-4 to take what is free (1)", default="1")
    add("--gpus_per_node", "N", "GPUs of each node, one rank each", type=number(1), default=0)
    add("--gpu_type", "NAME", "kind of GPU, as the site calls it", default="")
    add("--gpu", "NAME", "what they are (h100, a100-80, ...): a layout that cannot fit them is refused", default="")
    add("--nproc", "N", "ranks of each node, where there are no GPUs", type=number(1), default=0)
    add("--cpus_per_rank", "N", "cores of each rank (8 with a GPU, else 1)", type=number(1), default=0)
    add("--time", "T", "time limit, as sbatch takes it: 24:00:00 or 2-00:00:00", required=True)
    add("--partition", "NAME", "partition", default="")
    add("--account", "NAME", "account", default="")
    add("--directive", "OPTION", "another option for sbatch, such as --qos=high; may be repeated", action="append")
    add("--job_name", "NAME", "name of the job (the run folder's)", default="")
    add("--setup", "LINE", "shell line before all else, such as 'module load cuda'; may be repeated", action="append")
    add("--env", "NAME=VALUE", "variable for all ranks, NCCL's for instance; may be repeated", action="append")
    add("--python", "PATH", "interpreter on the nodes (this one; python3 in a container)", default="")
    add("--container_image", "IMAGE", "run in this container", default="")
    add("--container_runtime", "NAME", "pyxis (enroot, the default) or apptainer", default="pyxis")
    add("--container_mounts", "A:B,...", "folders of the node to see in the container", default="")
    add("--warning_seconds", "S", "time before the limit at which the run saves (300)", type=number(10), default=300)
    add("--max_restarts", "N", "starts after faults, within the job (3)", type=number(0), default=3)
    add("--hang_seconds", "S", "longest time without a step (600)", type=number(1), default=600)
    add("--silent_seconds", "S", "longest time without a sign of life (60)", type=number(3), default=60)
    add(
        "--chain",
        "N",
        "submit N jobs, each going on where the last ended, instead of requeueing",
        type=number(1),
        default=0,
    )
    add("--sweep", "FILE", "an array of jobs: each takes the words of one line more", default="")
    add("--sweep_at_once", "N", "jobs of the sweep that may run at one time (all)", type=number(1), default=0)
    add("--template", "FILE", "a script of your own in place of the shipped one", default="")
    add("--log_dir", "DIR", "folder for the script and the logs (logs in the run folder)", default="")
    parser.switch("--dry_run", "print the script and stop")
    parser.switch("--test_only", "let Slurm check the script (sbatch --test-only) and stop")
    return parser


def render(options: argparse.Namespace, command: list[str]) -> str:
    """Return the script for the options and the command; wrong ones end with one sentence and status 2."""
    _check(options, command)
    ranks = options.gpus_per_node or options.nproc
    sweep = _sweep_lines(options)
    name = "array_sweep" if sweep else ("pretrain" if command[0] == "pretrain" else "finetune")
    template = Path(options.template) if options.template else templates.FOLDER / f"{name}.sbatch"
    at_once = f"%{options.sweep_at_once}" if options.sweep_at_once else ""
    watch = ["--hang_seconds", str(options.hang_seconds), "--silent_seconds", str(options.silent_seconds)]
    watch += ["--grace_seconds", str(max(options.warning_seconds - 15, 5)), "--bind_cores"]
    values = {
        "job_name": options.job_name or (Path(run_folder(command)).name if run_folder(command) else command[0]),
        "nodes": options.nodes,
        "cpus_per_node": str(ranks * (options.cpus_per_rank or (8 if options.gpus_per_node else 1))),
        "time": options.time,
        "warning_seconds": str(options.warning_seconds),
        "log_folder": str(log_folder(options, command)),
        "directives": "\n".join(f"#SBATCH {directive}" for directive in _directives(options)),
        "setup": "\n".join(options.setup or ()),
        "exports": "\n".join(_exports(options)),
        "ranks_per_node": str(ranks),
        "max_restarts": str(options.max_restarts),
        "run_folder": words([run_folder(command)]),
        "requeues": "0" if options.chain else "1",
        "program": words([options.python or ("python3" if options.container_image else sys.executable), "-m"]),
        "watch": words(watch),
        "command": words(command),
        "container": words(_container(options)),
        "array": f"0-{len(sweep) - 1}{at_once}",
        "sweep": "\n".join(f"    {shlex.quote(line)}" for line in sweep),
    }
    values["job_name"] = re.sub(r"[^\w.+-]", "_", values["job_name"].replace("{task}", "").rstrip("_-")) or command[0]
    return templates.fill(template, values)


def _ask_planner(options: argparse.Namespace, command: list[str]) -> None:
    """End with the planner's sentence and exit status where the layout does not fit the GPUs of the fewest nodes.

    The planner knows the model, which this room does not: it is asked as a user would ask it.
    """
    if command[0] != "pretrain" or not options.gpus_per_node:
        fail("--gpu is for pretrain on GPUs: leave it out, or give --gpus_per_node N")
    num_gpus = int(options.nodes.partition("-")[0]) * options.gpus_per_node
    asked = ["plan", *command[1:], "--check", "true", "--gpus", str(num_gpus), "--gpu", options.gpu]
    done = subprocess.run([sys.executable, "-m", "megaprot.tools.cli", *asked], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(done.returncode)


def run_folder(command: list[str]) -> str:
    """Return the run folder the command names, absolute; empty for a command that has none."""
    flag = RUN_FOLDER_FLAGS.get(command[0], "")
    value = value_of(flag, command) if flag else ""
    return os.path.abspath(value) if value else ""


def log_folder(options: argparse.Namespace, command: list[str]) -> Path:
    """Return where the script and the logs go: ``--log_dir``, or ``logs`` in the run folder."""
    before, task, _ = run_folder(command).partition("{task}")
    beside = f"{before.rstrip('_-/')}_logs" if task else f"{before or '.'}/logs"
    return Path(os.path.abspath(options.log_dir or beside))


def _check(options: argparse.Namespace, command: list[str]) -> None:
    """End with one sentence for options that contradict each other or that the script could not hold."""
    if bool(options.gpus_per_node) == bool(options.nproc):
        fail("give --gpus_per_node N (one rank a GPU), or --nproc N where there are no GPUs")
    if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)?", options.nodes):
        fail(f"--nodes must be a number or a range such as 2-4, but got {options.nodes!r}")
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", options.time):
        fail(f"--time must be as sbatch takes it, such as 24:00:00 or 2-00:00:00, but got {options.time!r}")
    if options.warning_seconds + 120 > _seconds(options.time):  # Slurm may warn a minute early; a start takes another
        fail(
            f"--time {options.time} is too short for a warning {options.warning_seconds} s before its end: the job "
            "would be stopped as it starts; lengthen it or lower --warning_seconds"
        )
    if options.container_runtime not in ("pyxis", "apptainer"):
        fail(f"--container_runtime must be pyxis or apptainer, but got {options.container_runtime!r}")
    if options.container_mounts and not options.container_image:
        fail("--container_mounts needs --container_image")
    if options.chain and options.sweep:
        fail("--chain and --sweep exclude each other: the jobs of a sweep requeue themselves")
    flag = RUN_FOLDER_FLAGS.get(command[0], "")
    if flag and not run_folder(command):
        fail(f"the command must name its folder with --{flag}, on a file system all nodes share; the script needs it")
    if options.sweep and flag and "{task}" not in run_folder(command):
        fail(f"each job of a sweep needs a folder of its own: write {{task}} into --{flag}, as in runs/sweep_{{task}}")
    for path in (str(log_folder(options, command)), *(options.directive or ())):
        if re.search(r"[\s'\"\\%]", path):
            fail(f"{path!r} cannot stand in a #SBATCH line: use a name without blanks, quotes and %, such as --log_dir")
    for assignment in options.env or ():
        if not re.fullmatch(r"[A-Za-z_]\w*=.*", assignment, re.DOTALL):
            fail(f"--env must be NAME=VALUE, but got {assignment!r}")
    for directive in options.directive or ():
        if not directive.startswith("-"):
            fail(f"--directive must be an option of sbatch such as --directive=--qos=high, but got {directive!r}")


def _seconds(time: str) -> int:
    """Return the seconds of a time as sbatch takes it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(part * unit for part, unit in zip(parts, units, strict=False))


def _directives(options: argparse.Namespace) -> list[str]:
    """Return sbatch's options that not every job has."""
    kind = f"{options.gpu_type}:" if options.gpu_type else ""
    given = {
        "partition": options.partition,
        "account": options.account,
        "gpus-per-node": f"{kind}{options.gpus_per_node}" if options.gpus_per_node else "",
    }
    requeue = "--no-requeue" if options.chain else "--requeue"
    return [*(f"--{name}={value}" for name, value in given.items() if value), requeue, *(options.directive or ())]


def _exports(options: argparse.Namespace) -> list[str]:
    pairs = (assignment.partition("=") for assignment in options.env or ())
    return [f"export {name}={shlex.quote(value)}" for name, _, value in pairs]


def _container(options: argparse.Namespace) -> list[str]:
    """Return the words between ``srun ...`` and the program: options of srun for pyxis, a command for apptainer."""
    image, mounts = options.container_image, options.container_mounts
    if not image:
        return []
    if options.container_runtime == "pyxis":
        return [f"--container-image={image}", *([f"--container-mounts={mounts}"] if mounts else [])]
    nvidia = ["--nv"] if options.gpus_per_node else []
    return ["apptainer", "exec", *nvidia, *(["--bind", mounts] if mounts else []), image]


def _sweep_lines(options: argparse.Namespace) -> list[str]:
    """Return the lines of the sweep's file as a shell reads them, without blank ones and comments."""
    if not options.sweep:
        return []
    try:
        text = Path(options.sweep).read_text(encoding="utf-8")
        lines = [words(shlex.split(line, comments=True)) for line in text.splitlines()]
    except (OSError, ValueError) as error:
        fail(f"--sweep {options.sweep} cannot be read ({error}); give a text file with the words of one job a line")
    lines = [line for line in lines if line]
    if not lines:
        fail(f"--sweep {options.sweep} holds no line; give the words of one job a line, such as --optim.lr 1e-4")
    return lines


def submit(options: argparse.Namespace, folder: Path, script: str) -> int:
    """File the script in ``folder``, hand it to Slurm (several times for a chain), and return the exit status."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"submitted_{os.getpid()}.sbatch"
        file.write_text(script, encoding="utf-8")
    except OSError as error:
        fail(f"{folder} cannot be written ({error.strerror}); name another folder with --log_dir")
    previous = ""
    for _ in range(options.chain or 1):
        after = [f"--dependency=afterany:{previous}"] if previous else []
        test = ["--test-only"] if options.test_only else ["--parsable"]
        try:
            done = subprocess.run(["sbatch", *test, *after, str(file)], capture_output=True, text=True)
        except FileNotFoundError:
            fail("there is no sbatch here; submit on a login node of the cluster, or --dry_run prints the script")
        if done.returncode:
            problem = " ".join((done.stderr or done.stdout).split()).replace("sbatch: error: ", "")
            print(f"megaprot launch: error: Slurm refused {file}: {problem}", file=sys.stderr)
            return 1
        if options.test_only:
            print(done.stderr.strip())
            return 0
        previous = done.stdout.strip().split(";")[0]
        print(f"submitted job {previous}; its log will be in {folder}")
    return 0
