"""Which layouts are found, which fit, and what is said of those that do not."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from megaprot.common.command_line import parse_config
from megaprot.common.errors import InputError
from megaprot.pretrain.__main__ import RECIPES
from megaprot.pretrain.config import ModelConfig, ParallelConfig, PretrainConfig
from megaprot.pretrain.validation import validate
from megaprot.tools.planning.gpus import GPUS, GpuFigures, gpu_of
from megaprot.tools.planning.layouts import check_valid, valid_layouts
from megaprot.tools.planning.planner import (
    PARTS,
    estimates,
    fitting,
    nearest_fitting,
    planned_backend,
    refuse_unless_fits,
    simplest_first,
)
from megaprot.tools.planning.scaling import scaling_points
from megaprot.tools.planning.search import SearchConfig, check_search
from tests.pretrain.tiny import tiny_config, write_domains

H100, EVERYTHING = GPUS["h100"], SearchConfig()


def recipe(name: str, *flags: str) -> PretrainConfig:
    """A shipped recipe."""
    return parse_config(PretrainConfig, ["--config", name, *flags], program="", description="", recipes=RECIPES)


def key_of(config: PretrainConfig) -> tuple[object, ...]:
    """What tells layouts apart."""
    p = config.parallel
    return p.tensor, p.pipeline, p.virtual_pipeline, p.sequence, config.data.row_tokens, config.train.recompute


def test_the_layouts_are_all_that_pretraining_accepts_and_no_other(tmp_path: Path) -> None:
    config = tiny_config(
        train={"precision": "bf16", "global_batch_rows": 8},
        data={"path": str(write_domains(tmp_path / "corpus"))},
        run={"dir": str(tmp_path / "run")},
    )
    accepted = set()
    for tensor, pipeline, virtual, sequence in product(range(1, 9), range(1, 9), range(1, 5), (False, True)):
        layout = ParallelConfig(tensor, pipeline, virtual, [], sequence)
        try:
            validate(replace(config, parallel=layout), 8)
        except InputError:
            continue
        accepted.add((tensor, pipeline, virtual, sequence))
    search = SearchConfig(row_tokens=[128], recompute=["none"])
    found = {key_of(run)[:4] for run, _ in valid_layouts(config, 8, 8, search)}
    assert found == accepted
    assert len(found) > 10


def test_row_lengths_keep_the_tokens_of_a_batch() -> None:
    config = recipe("esm2_650m")
    for run, data_size in valid_layouts(config, 64, 8, EVERYTHING):
        assert run.data.row_tokens * run.train.global_batch_rows == 16384 * 128
        assert run.parallel.distributed_optimizer == (data_size > 1)
        assert data_size * run.parallel.tensor * run.parallel.pipeline == 64
        assert run.parallel.tensor <= 8


def test_the_search_can_be_narrowed() -> None:
    search = SearchConfig(tensor=[2], pipeline=[4], virtual_pipeline=[1], row_tokens=[8192], recompute=["full"])
    assert {key_of(run) for run, _ in valid_layouts(recipe("esm2_3b"), 64, 8, search)} == {
        (2, 4, 1, sequence, 8192, "full") for sequence in (False, True)
    }


def test_estimates_are_sorted_and_parts_add_up() -> None:
    found = estimates(recipe("esm2_3b"), 64, H100, 33, 512.0, EVERYTHING)
    rates = [one.tokens_per_second for one in found]
    assert rates == sorted(rates, reverse=True)
    for one in found[:50]:
        assert sum(getattr(one.memory, part) for part in PARTS) == pytest.approx(one.memory.total)
        assert bool(one.too_large) == (one.memory.total > H100.memory_bytes)
    assert all(not one.too_large for one in fitting(found))


def test_the_best_is_the_simplest_of_those_that_cannot_be_told_apart() -> None:
    config = recipe("esm2_3b")
    fit = fitting(estimates(config, 128, H100, 33, 512.0, EVERYTHING))
    best, *others = simplest_first(fit, config)
    assert sorted(map(id, [best, *others])) == sorted(map(id, fit))
    assert best.tokens_per_second > 0.97 * fit[0].tokens_per_second
    assert key_of(best.config) == (1, 1, 1, False, 8192, "none")
    rates = [one.tokens_per_second for one in others]
    assert rates == sorted(rates, reverse=True)


def test_what_cannot_fit_anywhere_names_the_part() -> None:
    with pytest.raises(InputError, match=r"nothing fits: even .*: no room is left for optimizer"):
        fitting(estimates(recipe("esm2_15b"), 2, H100, 33, 512.0, SearchConfig(recompute=["full"])))


def test_a_layout_that_cannot_fit_is_refused_with_the_nearest_that_does() -> None:
    config = recipe("esm2_15b")
    with pytest.raises(InputError, match=r"no room is left for gradients; the nearest that fits: --parallel.tensor 2 "):
        refuse_unless_fits(config, 128, H100)
    asked = replace(config, parallel=ParallelConfig(tensor=8, sequence=True, distributed_optimizer=True))
    assert not refuse_unless_fits(asked, 128, H100).too_large


def test_the_nearest_changes_as_little_as_it_can() -> None:
    config = replace(recipe("esm2_15b"), parallel=ParallelConfig(tensor=2, sequence=True))
    found = estimates(config, 128, H100, 33, 512.0, EVERYTHING)
    nearest = nearest_fitting(config, found)
    assert (nearest.config.parallel.tensor, nearest.config.parallel.pipeline) == (2, 1)
    assert nearest.config.parallel.distributed_optimizer


def test_too_long_rows_are_told_from_too_large_weights() -> None:
    config = recipe("esm2_3b", "--parallel.distributed_optimizer", "true", "--data.row_tokens", "262144")
    with pytest.raises(InputError, match="no room is left for activations"):
        refuse_unless_fits(config, 64, H100)


@pytest.mark.parametrize(
    ("flags", "num_gpus", "sentence"),
    [
        (["--model.attention_backend", "cpu"], 8, "is for the CPU"),
        (["--model.num_attention_heads", "7"], 8, "not divisible by model.num_attention_heads"),
        (["--train.global_batch_rows", "127"], 7, "cannot be dealt to 7 data-parallel ranks"),
    ],
)
def test_wrong_runs_are_refused_in_a_sentence(flags: list[str], num_gpus: int, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        estimates(recipe("esm2_8m", *flags), num_gpus, H100, 33, 512.0, EVERYTHING)


def test_overlap_can_be_planned_where_there_is_no_gpu() -> None:
    config = recipe("esm2_8m", "--parallel.overlap_communication", "true")
    assert check_valid(config, 8) == 8
    assert all(run.parallel.overlap_communication for run, _ in valid_layouts(config, 8, 8, EVERYTHING))


def test_own_figures_replace_the_data_sheet_or_stand_alone() -> None:
    assert gpu_of("h100", GpuFigures(memory_gb=40.0)) == replace(H100, memory_gb=40.0)
    with pytest.raises(InputError, match=r"--gpu own needs --figures.memory_gb"):
        gpu_of("own", GpuFigures())
    with pytest.raises(InputError, match=r"--figures.tflops is -1"):
        gpu_of("h100", GpuFigures(tflops=-1.0))
    assert gpu_of("own", GpuFigures(1, 2, 3, 4, 5, 6, 0.7)).gpus_per_node == 6


def test_wrong_searches_are_refused() -> None:
    with pytest.raises(InputError, match=r"--search.tensor 0"):
        check_search(SearchConfig(tensor=[0]))
    with pytest.raises(InputError, match=r"--search.recompute 'some'"):
        check_search(SearchConfig(recompute=["some"]))


def test_the_kernel_is_flash_attention_wherever_it_can_run() -> None:
    assert planned_backend(ModelConfig(), "bf16") == "varlen"
    assert planned_backend(ModelConfig(attention_dropout=0.1), "bf16") == "sdpa"
    assert planned_backend(ModelConfig(hidden_size=60, num_attention_heads=5), "bf16") == "sdpa"
    assert planned_backend(ModelConfig(attention_backend="te"), "bf16") == "te"


def test_weak_scaling_loses_less_than_strong_scaling_and_both_lose() -> None:
    best = fitting(estimates(recipe("esm2_650m"), 64, H100, 33, 512.0, SearchConfig(tensor=[2])))[0]
    points = scaling_points(best, 33, 512.0)
    by_kind = {kind: [one for one in points if one.kind == kind] for kind in ("weak", "strong")}
    assert by_kind["weak"][-1].num_gpus >= 4096
    assert by_kind["strong"][-1].efficiency < by_kind["weak"][-1].efficiency <= 1.0
    for many in by_kind.values():
        assert [one.num_gpus for one in many] == sorted(one.num_gpus for one in many)
        assert all(one.tokens_per_second > 0 for one in many)
