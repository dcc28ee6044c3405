"""Batches over all cores: in order, a bounded number ahead, errors told, threads given back."""

import threading

import pytest
import torch

from megaprot.finetune.batch_workers import batch_workers


@pytest.fixture(params=[1, 3])
def num_threads(request: pytest.FixtureRequest) -> int:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    request.addfinalizer(lambda: torch.set_num_threads(before))
    return int(request.param)


def test_results_come_in_order(num_threads: int) -> None:
    with batch_workers(torch.device("cpu")) as run_all:
        assert list(run_all(lambda number: number * number, list(range(50)))) == [n * n for n in range(50)]
    assert torch.get_num_threads() == num_threads


def test_at_most_two_batches_a_core_wait(num_threads: int) -> None:
    started: list[int] = []
    with batch_workers(torch.device("cpu")) as run_all:
        for taken, _ in enumerate(run_all(started.append, list(range(50)))):
            assert len(started) <= taken + 1 + 2 * num_threads


def test_an_error_of_a_batch_is_raised_and_the_threads_end(num_threads: int) -> None:
    def fail(number: int) -> None:
        if number == 3:
            raise RuntimeError("the third")

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="the third"), batch_workers(torch.device("cpu")) as run_all:
        list(run_all(fail, list(range(50))))
    assert threading.active_count() == before
    assert torch.get_num_threads() == num_threads
