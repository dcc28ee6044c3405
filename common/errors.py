"""The two ways a command ends badly, and nothing else: wrong input (exit 2) and a failed run (exit 1)."""


class MegaprotError(Exception):
    """An error whose text is one sentence for the person at the terminal, with the remedy in it.

    ``exit_status`` is what the process returns.
    """

    exit_status = 1


class InputError(MegaprotError):
    """What was given is wrong: a file, a key, a layout. The text names it and says what to do (exit 2)."""

    exit_status = 2


class RunError(MegaprotError):
    """The run itself failed: too many skipped steps, a lost process, a save that could not be written (exit 1)."""

    exit_status = 1


class LostPeersError(RunError):
    """Another process of the run failed or went away, and this one cannot go on: not the cause, but a victim (exit 3).

    Launchers name the cause, and start all again.
    """

    exit_status = 3
