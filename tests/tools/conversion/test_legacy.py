"""Checkpoints of old Megatron-LM versions become models with the same last hidden states."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.tools.conversion import old_megatron
from tests.tools.conversion.models import converted, largest_difference, loaded, refused

WEIGHTS = old_megatron.random_weights()
SEQUENCES = [[2, 6, 7, 1, 30, 28, 9], [2, *range(6, 31), 1, 1, 12]]


def expected(index: int, gelu: str = "tanh", head: str = "erf") -> list[torch.Tensor]:
    """Hidden states (0) or logits (1) of the plain forward pass."""
    return [old_megatron.forward(WEIGHTS, sequence, gelu, head)[index] for sequence in SEQUENCES]


@torch.no_grad()
def hidden_states(model: nn.Module) -> list[torch.Tensor]:
    """Last hidden states that transformers computes."""
    return [model.base_model(input_ids=torch.tensor([one])).last_hidden_state[0] for one in SEQUENCES]


@torch.no_grad()
def logits(model: nn.Module) -> list[torch.Tensor]:
    """Logits that transformers computes."""
    return [model(input_ids=torch.tensor([one])).logits[0] for one in SEQUENCES]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("version", [0, 1.0, 2.0])
def test_every_version_and_number_of_ranks_gives_the_same_states(version: float, ranks: int, tmp_path: Path) -> None:
    saved = old_megatron.save(WEIGHTS, tmp_path / "old", version, ranks)
    found = loaded(converted(saved, tmp_path / "hf", "hf"))
    assert largest_difference(hidden_states(found), expected(0)) < 1e-5


def test_pipeline_stages_are_put_together(tmp_path: Path) -> None:
    saved = old_megatron.save(WEIGHTS, tmp_path / "old", 3.0, ranks=2, stages=2)
    found = loaded(converted(saved / "iter_0001000", tmp_path / "hf", "hf"))
    assert largest_difference(hidden_states(found), expected(0)) < 1e-5


def test_the_difference_of_the_lm_heads_is_measured_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = old_megatron.save(WEIGHTS, tmp_path / "old", 3.0)
    folder = converted(saved, tmp_path / "hf", "hf", "--verify")
    said = capsys.readouterr().out.splitlines()
    assert "last hidden states" in said[0]
    assert "logits change by at most" in said[1]
    assert said[1] in (folder / "README.md").read_text()
    # With transformers' one activation for layers and head, the logits are those of a head with tanh.
    assert largest_difference(logits(loaded(folder)), expected(1, head="tanh")) < 1e-4
    assert largest_difference(expected(1), expected(1, head="tanh")) > 1e-5


def test_openai_gelu_is_tanh_in_the_head_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"args": {"openai_gelu": True, "bias_gelu_fusion": False}}
    saved = old_megatron.save(WEIGHTS, tmp_path / "old", 3.0, changes=changes)
    found = loaded(converted(saved, tmp_path / "hf", "hf", "--verify"))
    assert largest_difference(logits(found), expected(1, head="tanh")) < 1e-4
    assert "LM head" not in capsys.readouterr().out


def test_without_fusion_gelu_is_erf_and_everything_agrees(tmp_path: Path) -> None:
    saved = old_megatron.save(WEIGHTS, tmp_path / "old", 3.0, changes={"args": {"bias_gelu_fusion": False}})
    found = loaded(converted(saved, tmp_path / "hf", "hf", "--verify"))
    assert type(found).__name__ == "EsmForMaskedLM"
    assert largest_difference(hidden_states(found), expected(0, gelu="erf")) < 1e-5
    assert largest_difference(logits(found), expected(1, gelu="erf")) < 1e-4


def test_training_can_go_on_from_an_old_checkpoint(tmp_path: Path) -> None:
    saved = old_megatron.save(WEIGHTS, tmp_path / "old", 1.0, ranks=2)
    step = converted(saved, tmp_path / "megatron", "megatron", "--verify")
    found = loaded(converted(step, tmp_path / "hf", "hf"))
    assert largest_difference(hidden_states(found), expected(0)) < 1e-5


def test_a_missing_version_must_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = old_megatron.save(WEIGHTS, tmp_path / "old", 1.0, changes={"checkpoint_version": None})
    assert "--legacy_version" in refused(saved, tmp_path / "hf", "hf", capsys)
    found = loaded(converted(saved, tmp_path / "hf", "hf", "--legacy-version", "1.0"))
    assert largest_difference(hidden_states(found), expected(0)) < 1e-5


def test_another_version_than_the_file_says_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = old_megatron.save(WEIGHTS, tmp_path / "old", 1.0)
    assert "has checkpoint_version 1.0, not 2.0" in refused(
        saved, tmp_path / "x", "hf", capsys, "--legacy_version", "2.0"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"args": None}, "holds no args"),
        ({"args": {"num_layers": 3}}, "holds the tensor"),
        ({"args": {"hidden_size": 64}}, "has the shape"),
        ({"args": {"layernorm_epsilon": None}}, "args in"),
        ({"args": {"tensor_model_parallel_size": 2}}, "instead of 2"),
        ({"args": {"apply_residual_connection_post_layernorm": True}}, "after LayerNorm"),
        ({"checkpoint_version": 9.0}, "unknown"),
        ({"model": None}, "holds no model"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = old_megatron.save(WEIGHTS, tmp_path / "old", 3.0, changes=changes)
    assert words in refused(saved, tmp_path / "hf", "hf", capsys)


def test_missing_and_short_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = old_megatron.save(WEIGHTS, tmp_path / "old", 3.0, ranks=2)
    second = saved / "iter_0001000" / "mp_rank_01"
    whole = (second / "model_optim_rng.pt").read_bytes()
    (second / "model_optim_rng.pt").write_bytes(whole[: len(whole) // 2])
    assert "mp_rank_01" in refused(saved, tmp_path / "hf", "hf", capsys)
    shutil.rmtree(second)
    assert "instead of 2" in refused(saved, tmp_path / "hf", "hf", capsys)
    (saved / "latest_checkpointed_iteration.txt").write_text("2000")
    assert "iter_0002000 is not there" in refused(saved, tmp_path / "hf", "hf", capsys)


class _Trap:
    """What writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_code_in_a_checkpoint_never_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trap = tmp_path / "the code ran"
    saved = old_megatron.save(WEIGHTS, tmp_path / "old", 3.0, changes={"optimizer": _Trap(trap)})
    assert "was not loaded" in refused(saved, tmp_path / "hf", "hf", capsys)
    assert not trap.exists()
