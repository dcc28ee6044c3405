"""What a search for layouts tries."""

from __future__ import annotations

from dataclasses import dataclass, field

from megaprot.common.errors import InputError

RECOMPUTE = ("none", "selective", "full")


@dataclass
class SearchConfig:
    """What is tried; an empty list tries everything that is valid.

    Attributes:
        tensor: Tensor-parallel sizes.
        pipeline: Numbers of pipeline stages.
        virtual_pipeline: Chunks a stage.
        row_tokens: Tokens of a row; the tokens of a global batch stay as the configuration has them. Empty: a quarter
            to four times the configuration's.
        recompute: Recomputation: none, selective, full.
    """

    tensor: list[int] = field(default_factory=list)
    pipeline: list[int] = field(default_factory=list)
    virtual_pipeline: list[int] = field(default_factory=list)
    row_tokens: list[int] = field(default_factory=list)
    recompute: list[str] = field(default_factory=list)


def check_search(search: SearchConfig) -> None:
    """Raise InputError for sizes that no layout has."""
    for name in ("tensor", "pipeline", "virtual_pipeline", "row_tokens"):
        for value in getattr(search, name):
            if value < 1:
                raise InputError(f"--search.{name} {value}: give numbers of 1 or more.")
    for value in search.recompute:
        if value not in RECOMPUTE:
            raise InputError(f"--search.recompute {value!r}: choose of {', '.join(RECOMPUTE)}.")
