"""Keep a library's warnings off the terminal."""

import logging
import warnings


def quiet(package: str) -> None:
    """Show no warnings and only errors of ``package`` and what it imports from itself; call before importing it.

    megatron-core warns at import of every optional package it does not find; a run's first lines say what is used.
    """
    warnings.filterwarnings("ignore", module=package)
    logging.getLogger(package).setLevel(logging.ERROR)
