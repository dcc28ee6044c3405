"""torchrun with a short ending: the same arguments, one line instead of a banner, and the failed rank's exit status.

torchrun itself answers any failed rank with a traceback of its own, a table, and exit status 1; a rank that has already
said in one sentence what is wrong is then hard to find. Used as ``python -m megaprot.launch.ranks TORCHRUN-ARGUMENTS``.
"""

import logging
import signal
import sys


def main(argv: list[str]) -> int:
    """Run the processes torchrun's arguments ask for and return the exit status.

    That is 0 when all ranks end well, the status of the rank that failed first otherwise, and 128 + N when signal N was
    sent to this process; it is passed on to all ranks, which have the shutdown time-out to save and end.
    """
    try:
        from torch.distributed.elastic.multiprocessing import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import parse_args, run

        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # its report is made below
        try:
            run(parse_args(argv))
        except ChildFailedError as error:
            exit_codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            # torch times failures in whole seconds; a rank it ended with SIGTERM itself did not fail first
            times = {rank: (exit_codes[rank] == -signal.SIGTERM, error.failures[rank].timestamp) for rank in exit_codes}
            first = min(times, key=lambda rank: times[rank])
            return _report(first, exit_codes[first])
        except SignalException as error:
            print(f"megaprot launch: ended by {signal.Signals(error.sigval).name}", file=sys.stderr)
            return 128 + error.sigval
    except KeyboardInterrupt:
        return 130
    return 0


def _report(rank: int, exit_code: int) -> int:
    """Say which rank failed first and how; return the exit status for it."""
    if exit_code < 0:
        how = f"was killed by {signal.Signals(-exit_code).name}"
        if -exit_code == signal.SIGKILL:
            how += " (often for using too much memory)"
    else:
        how = f"ended with exit status {exit_code}; its message is above"
    print(f"megaprot launch: rank {rank} {how}", file=sys.stderr)
    return 128 - exit_code if exit_code < 0 else exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
