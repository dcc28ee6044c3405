"""One node of several: starts this node's ranks of a run and watches them. A Slurm script runs it once on every node.

Its exit status tells the script what to do: 0 done or saved, 2 wrong input, 5 a rank gave up, 4 a fault worth a
restart, 3 the same seen from a node whose ranks only lost their peers or were told to end. ``srun`` returns the highest
of all nodes, so that the cause's wins.
"""

import os
import socket
import sys

from megaprot.launch.commands import program, require_launchable
from megaprot.launch.local_job import add_watch_options, added_environment
from megaprot.launch.options import Parser, number, split_at_dashes
from megaprot.launch.supervisor import LOST_PEERS, WRONG_INPUT, Ending, Node, Signals, run_ranks

FAULT, GAVE_UP = 4, 5


def main(argv: list[str]) -> int:
    """Read ``--nodes N --nproc G --address HOST --port P [OPTIONS] -- COMMAND``, run, return the status above."""
    parser = Parser(prog="megaprot launch node", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.option("--nodes", "N", "nodes of the run", type=number(1), required=True)
    parser.option("--node", "I", "number of this node (default: Slurm's)", type=number(0), default=-1)
    parser.option("--nproc", "N", "processes (ranks) of each node", type=number(1), required=True)
    parser.option("--address", "HOST", "host of node 0, as the others reach it", required=True)
    parser.option("--port", "PORT", "port on which the ranks meet there", type=number(1), required=True)
    add_watch_options(parser)
    parser.switch("--bind_cores", "give each rank its own share of the cores")
    own, command = split_at_dashes(argv)
    options = parser.parse_args(own)
    require_launchable(command)
    index = options.node if options.node >= 0 else int(os.environ.get("SLURM_NODEID", "0"))
    node = Node(
        program(command),
        options.nproc,
        index,
        options.nodes,
        options.address,
        options.port,
        options.log_dir,
        options.bind_cores,
        options.grace_seconds,
        options.silent_seconds,
        options.hang_seconds,
    )
    with Signals() as signals:
        problem = "" if index else port_problem(node)
        added = added_environment(options.nproc, os.environ)
        ending = Ending(FAULT, problem) if problem else run_ranks(node, os.environ | added, signals)
    if ending.message:
        print(f"megaprot launch: {ending.message}", file=sys.stderr, flush=True)
    return status_of(ending)


def status_of(ending: Ending) -> int:
    """Return the exit status that tells the script what to do."""
    if ending.status in (0, WRONG_INPUT):
        return ending.status
    if ending.is_on_purpose:
        return GAVE_UP
    return FAULT if ending.is_fault and ending.status != LOST_PEERS else LOST_PEERS


def port_problem(node: Node) -> str:
    """Return why the ranks cannot meet on this, the first, node, or nothing."""
    try:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("", node.port))
            listener.listen()
    except OSError as error:
        return f"port {node.port} of {node.address} cannot be used ({error.strerror}); the next start takes another one"
    return ""
