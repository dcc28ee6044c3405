"""The time model: hand-worked parts, properties any such model has, and published runs it was not fitted to."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaprot.pretrain.config import ModelConfig
from megaprot.pretrain.throughput import training_flops
from megaprot.tools.planning import published, step_time
from megaprot.tools.planning.gpus import GPUS, Gpu
from megaprot.tools.planning.step_time import Work

# Round figures: 100 TFLOP/s all reached, 1 TB/s memory, 100 GB/s links, 10 GB/s network.
ROUND = Gpu(80.0, 100.0, 1000.0, 100.0, 10.0, 8, 1.0)


def work(**changed: object) -> Work:
    """A small run, some fields changed."""
    base = Work(
        num_layers=(12,),
        hidden=1024,
        wide=4096,
        tokens=8192,
        sequence_length=512.0,
        head_columns=1152,
        head_tokens=1500.0,
        last_tokens=1500.0,
        num_micro_batches=8,
        tensor=1,
        virtual_pipeline=1,
        data=1,
        sequence=False,
        distributed_optimizer=False,
        overlap=False,
        recompute="none",
        layer_bytes=3e8,
        last_bytes=1.5e8,
        stage_parameters=(150_000_000,),
    )
    return replace(base, **changed)  # type: ignore[arg-type]


def test_a_matrix_product_takes_its_arithmetic_over_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_time, "HALF_SIZE", 0.0)
    assert step_time.matrix_seconds(1000, 2000, 500, ROUND) == pytest.approx(2e9 / 1e14)


def test_a_dimension_of_half_size_halves_the_rate() -> None:
    large = 1e12
    slow = step_time.matrix_seconds(large, large, step_time.HALF_SIZE, ROUND) / step_time.HALF_SIZE
    assert slow == pytest.approx(2 * 2 * large * large / 1e14)


def test_arithmetic_is_what_the_run_itself_counts() -> None:
    model = ModelConfig(num_layers=12, hidden_size=1024, num_attention_heads=16)
    expected = training_flops(model, 128, 8192.0, 8192 * 512.0, 1500.0)
    assert work().flops == pytest.approx(8 * expected)


def test_tensor_messages_by_hand() -> None:
    one = work(tensor=4)
    volume = 8192 * 1024 * 2 * 3 / 4
    expected = 8 * (volume / 75e9 + step_time.LATENCY_SECONDS / 2)
    assert step_time.tensor_seconds(one, ROUND) == pytest.approx(expected)
    assert step_time.tensor_seconds(work(), ROUND) == 0.0
    assert step_time.tensor_seconds(work(tensor=16), ROUND) > 9 * step_time.tensor_seconds(one, ROUND)


def test_gradients_by_hand_inside_a_machine_and_across() -> None:
    latency = 2 * step_time.LATENCY_SECONDS * 3
    inside = step_time.data_seconds(work(data=8, distributed_optimizer=True), ROUND, 1.0)
    assert inside == pytest.approx(150e6 * (4 + 2) * 7 / 8 / 75e9 + latency)
    whole = step_time.data_seconds(work(data=8), ROUND, 1.0)
    assert whole == pytest.approx(150e6 * 8 * 7 / 8 / 75e9 + latency)
    assert step_time.data_bandwidth(work(data=16), ROUND) == pytest.approx(0.75 * 80e9)
    assert step_time.data_bandwidth(work(data=16, tensor=8), ROUND) == pytest.approx(0.75 * 10e9)


def test_overlap_hides_what_fits_beside_one_row() -> None:
    run = work(data=16, distributed_optimizer=True, overlap=True)
    assert step_time.data_seconds(run, ROUND, 10.0) == 0.0
    shown = step_time.data_seconds(replace(run, overlap=False), ROUND, 0.01)
    assert 0.0 < step_time.data_seconds(run, ROUND, 0.01) < shown


def test_the_bubble_is_that_of_the_schedule() -> None:
    like_others = {"head_tokens": 1e-9, "last_tokens": 8192.0, "last_bytes": 3e8}
    run = work(num_layers=(3, 3, 3, 3), stage_parameters=(40_000_000,) * 4, **like_others)
    plain = step_time.step_time(run, ROUND)
    assert plain.bubble / plain.busy == pytest.approx(3 / 8, rel=1e-3)
    chunks = step_time.step_time(replace(run, virtual_pipeline=3), ROUND)
    assert chunks.bubble / chunks.busy == pytest.approx(3 / 8 / 3, rel=1e-3)


def test_parts_add_up_and_mfu_is_arithmetic_over_the_data_sheet() -> None:
    run = work(num_layers=(6, 6), stage_parameters=(80_000_000,) * 2, data=4, tensor=2, sequence=True)
    time = step_time.step_time(run, ROUND)
    parts = [time.computation, time.tensor_messages, time.pipeline_messages, time.bubble, time.data_messages]
    assert time.total == pytest.approx(sum(parts) + time.optimizer)
    mfu = step_time.model_flops_utilisation(run, ROUND, time.total)
    assert mfu == pytest.approx(run.flops / time.total / 16 / 1e14)
    assert 0.0 < mfu < 1.0


@given(st.sampled_from([256, 1024, 4096]), st.integers(1, 32), st.sampled_from(["none", "selective", "full"]))
def test_more_work_never_takes_less_time(tokens: int, rows: int, recompute: str) -> None:
    one = work(tokens=tokens, num_micro_batches=rows, recompute=recompute)
    total = step_time.step_time(one, ROUND).total
    assert step_time.step_time(replace(one, num_micro_batches=rows + 1), ROUND).total > total
    assert step_time.step_time(replace(one, tokens=2 * tokens), ROUND).total >= total
    assert step_time.step_time(replace(one, last_tokens=2 * one.last_tokens), ROUND).total >= total
    assert step_time.step_time(replace(one, recompute="none"), ROUND).total <= total


def test_tiny_models_cannot_outrun_the_launching_of_kernels() -> None:
    tiny = work(hidden=64, wide=256, tokens=128, layer_bytes=1e5)
    assert step_time.layer_seconds(tiny, GPUS["h100"]) == step_time.KERNELS_A_LAYER * step_time.KERNEL_SECONDS


def test_published_runs_that_were_not_fitted_are_predicted_to_15_percent() -> None:
    runs = published.published_runs()
    held = [run for run in runs if not run.fitted]
    assert len(held) >= 10
    assert len(held) >= len(runs) / 2
    assert published.median_error(held) < 0.15
    assert max(abs(run.error(GPUS[run.gpu])) for run in runs) < 0.30


def test_published_rates_are_as_printed() -> None:
    rows = {run.name: run.tflops for run in published.published_runs() if run.source == published.BIONEMO}
    printed = {"650M, 16 x h100": 424, "3B, 16 x h100": 487, "15B, 64 x h100": 389, "650M, 16 x a100-80": 189}
    for name, tflops in printed.items():
        assert rows[f"ESM-2 {name}"] == pytest.approx(tflops, rel=0.01)


@pytest.mark.parametrize("size", ["1.7B", "70B", "462B"])
def test_assumed_shapes_have_the_published_parameters(size: str) -> None:
    row = next(run for run in published.published_runs() if f"GPT {size}" in run.name)
    parameters = sum(row.work.num_layers) * 12 * row.work.hidden**2 + row.work.head_columns * row.work.hidden
    assert parameters == pytest.approx(float(size[:-1]) * 1e9, rel=0.03)
