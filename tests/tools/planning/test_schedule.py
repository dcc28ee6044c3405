"""What is in flight in a pipeline, against closed forms and megatron-core's own order of passes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.pipeline_parallel.schedules import get_schedule_table

from megaprot.tools.planning.schedule import num_warm_up_passes, peak_in_flight


@given(st.integers(1, 6), st.integers(1, 20), st.data())
def test_plain_1f1b_holds_as_many_rows_as_stages_follow(pipeline: int, rows: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, pipeline - 1))
    assert peak_in_flight(rank, pipeline, rows, [3.0]) == 3.0 * min(pipeline - rank, rows)


@given(st.integers(2, 4), st.integers(2, 4), st.integers(1, 6), st.data())
def test_interleaved_passes_are_those_of_megatron_core(
    pipeline: int, num_chunks: int, groups: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, pipeline - 1))
    sizes = data.draw(st.lists(st.integers(1, 9).map(float), min_size=num_chunks, max_size=num_chunks))
    rows = groups * pipeline
    forward = [chunk for _, chunk in get_schedule_table(rows, num_chunks, pipeline)]
    backward = [num_chunks - 1 - chunk for chunk in forward]
    warm_up = num_warm_up_passes(rank, pipeline, num_chunks, rows)
    held = peak = 0.0
    for number, chunk in enumerate(forward):
        held += sizes[chunk]
        peak = max(peak, held)
        if number >= warm_up:
            held -= sizes[backward[number - warm_up]]
    assert peak_in_flight(rank, pipeline, rows, sizes) == peak


def test_few_rows_end_the_warm_up_early() -> None:
    assert num_warm_up_passes(0, 8, 1, 3) == 3
    assert num_warm_up_passes(0, 4, 2, 4) == 8


@pytest.mark.parametrize(("rank", "passes"), [(0, 10), (1, 8), (3, 4)])
def test_a_hand_worked_warm_up(rank: int, passes: int) -> None:
    assert num_warm_up_passes(rank, 4, 2, 16) == passes
