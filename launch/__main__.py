"""``megaprot launch local|slurm|node``: start a command on this machine, on a Slurm cluster, or as one of its nodes."""

import importlib
import sys

from megaprot.launch.options import fail

PLACES = {
    "local": ("megaprot.launch.local_job", "several processes on this machine"),
    "slurm": ("megaprot.launch.slurm_job", "a job on a Slurm cluster: nodes, time, preemption, restarts"),
    "node": ("megaprot.launch.node", "one node of several; what the Slurm script runs on each"),
}
"""{where: (module, what it starts)}; each module has ``main(argv)``."""


def main(argv: list[str]) -> int:
    """Read where to start the processes, hand the rest on, and return the exit status."""
    if argv and argv[0] in ("-h", "--help"):
        print("usage: megaprot launch WHERE [OPTIONS] -- COMMAND [ARGUMENTS]\n")
        print("\n".join(f"  {name:<8}{text}" for name, (_, text) in PLACES.items()))
        print("\nmegaprot launch WHERE --help lists the options.")
        return 0
    if not argv or argv[0] not in PLACES:
        got = f"not {argv[0]!r}" if argv else "but got none"
        fail(f"the first argument is where to start the processes, one of {', '.join(PLACES)}: {got}")
    return int(importlib.import_module(PLACES[argv[0]][0]).main(argv[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
