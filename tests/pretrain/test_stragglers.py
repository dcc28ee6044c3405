"""Slow ranks are told from healthy ones, and named once, when they were slow twice in a row."""

from collections.abc import Iterator

import pytest
import torch

from megaprot.pretrain import stragglers
from megaprot.pretrain.parallel import Place
from megaprot.pretrain.stragglers import Stragglers, probe_seconds, slow_ranks

NAMED = "straggler: rank 1 on there computes 9.0 times slower than the median"
EVEN = [0.010, 0.011, 0.010, 0.012]


def test_a_rank_is_slow_by_its_probe_or_by_its_wait_for_rows() -> None:
    assert slow_ranks(EVEN, [0.0] * 4, 10.0) == {}
    assert slow_ranks([0.010, 0.025, 0.010, 0.010], [0.0] * 4, 10.0) == {1: "computes 2.5 times slower than the median"}
    assert slow_ranks(EVEN, [0.1, 0.1, 0.1, 4.0], 10.0) == {3: "waited 4.0 of 10.0 s for its rows"}


def test_ranks_that_all_wait_alike_are_no_stragglers() -> None:
    assert slow_ranks(EVEN, [4.0, 4.1, 4.0, 4.2], 10.0) == {}


def test_shared_cores_need_a_clearer_sign() -> None:
    assert slow_ranks([0.010, 0.030, 0.010], [0.0] * 3, 10.0, is_cpu=True) == {}
    assert list(slow_ranks([0.010, 0.050, 0.010], [0.0] * 3, 10.0, is_cpu=True)) == [1]


def test_the_probe_takes_a_time() -> None:
    assert 0 < probe_seconds(torch.device("cpu")) < 10


def watch_of_three(monkeypatch: pytest.MonkeyPatch, measured: Iterator[list[float]]) -> Stragglers:
    """Return the watch of three ranks; of each pair measured rank 1 has the first number, the others the second."""

    def gather_hosts(found: list[str], mine: str) -> None:
        found[:] = ["here", "there", "elsewhere"]

    def gather(found: list[torch.Tensor], mine: torch.Tensor) -> None:
        slow, rest = next(measured)
        for rank, tensor in enumerate(found):
            tensor.copy_(torch.tensor([slow if rank == 1 else rest, 0.0]))

    monkeypatch.setattr(stragglers.dist, "all_gather_object", gather_hosts)
    monkeypatch.setattr(stragglers.dist, "all_gather", gather)
    return Stragglers(Place(0, 3, 0, 3, 0, 0, 1, torch.device("cpu")))


def test_a_straggler_is_named_with_its_host_at_the_second_slow_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = watch_of_three(monkeypatch, iter([[9.0, 1.0], [9.0, 1.0], [9.0, 1.0], [1.0, 1.0], [9.0, 1.0]]))
    said = [watch.look(10.0) for _ in range(5)]
    assert said == [[], [NAMED], [], [], []]


def test_nobody_is_judged_while_a_save_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = watch_of_three(monkeypatch, iter([[9.0, 1.0], [9.0, 1.0]]))
    assert [watch.look(10.0, is_saving=True) for _ in range(3)] == [[], [], []]
    assert watch.look(10.0) == []
    watch.seconds_waited = 9.0
    assert watch.look(10.0, is_saving=True) == []
    assert watch.seconds_waited == 0.0, "a wait is of its own interval"
    assert watch.look(10.0) == [NAMED]
