"""Models of other libraries to convert, folders of them, and the command itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megaprot.pretrain.config import ModelConfig
from megaprot.tools import cli

SMALL = ModelConfig(num_layers=4, hidden_size=64, num_attention_heads=4, ffn_hidden_size=128)


def convert(source: Path, output: Path, to: str, *more: str) -> int:
    """``megaprot convert`` in this process; returns its exit status."""
    return cli.main(["convert", "--input", str(source), "--output", str(output), "--to", to, *more])


def converted(source: Path, output: Path, to: str, *more: str) -> Path:
    """The folder that the command wrote."""
    assert convert(source, output, to, *more) == 0
    return output


def refused(source: Path, output: Path, to: str, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """What the command says in refusing its input: one sentence, exit status 2 and nothing written."""
    before = sorted(output.parent.iterdir())
    assert convert(source, output, to, *more) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, said
    assert sorted(output.parent.iterdir()) == before, "something was left"
    return said[0]


def loaded(folder: Path) -> nn.Module:
    """The masked-language model that transformers loads from a folder, fp32."""
    from transformers import AutoModelForMaskedLM

    model: nn.Module = AutoModelForMaskedLM.from_pretrained(folder, torch_dtype=torch.float32)
    return model.eval()


def assert_same_tensors(found: nn.Module, expected: nn.Module) -> None:
    """Two models have the same tensors bit for bit."""
    ours, theirs = found.state_dict(), expected.state_dict()
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def largest_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest absolute difference of two lists of tensors."""
    return max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True))


def tensors_of(step: Path) -> dict[str, Any]:
    """The model's tensors of a checkpoint, read with torch alone."""
    from tests.pretrain.runs import saved_tensors

    return {name: part for name, part in saved_tensors(step).items() if not name.startswith("optimizer.")}
