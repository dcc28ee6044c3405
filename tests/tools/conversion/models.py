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


def fair_esm_of(theirs: nn.Module) -> nn.Module:
    """fair-esm's ESM2 with the weights of a transformers ``EsmForMaskedLM``, whose feed-forward layer is 4 wide."""
    from esm.model.esm2 import ESM2

    config: Any = theirs.config
    fair = ESM2(config.num_hidden_layers, config.hidden_size, config.num_attention_heads, "ESM-1b", token_dropout=True)
    parts = {"self_attn_layer_norm": "attention.LayerNorm", "self_attn.out_proj": "attention.output.dense"}
    parts |= {"final_layer_norm": "LayerNorm", "fc1": "intermediate.dense", "fc2": "output.dense"}
    parts |= {f"self_attn.{name[0]}_proj": f"attention.self.{name}" for name in ("query", "key", "value")}
    outside = {
        "emb_layer_norm_after": "esm.encoder.emb_layer_norm_after",
        "embed_tokens": "esm.embeddings.word_embeddings",
    }
    state, given = fair.state_dict(), theirs.state_dict()
    for name in state:
        module, _, kind = name.rpartition(".")
        if module.startswith("layers."):
            _, number, part = module.split(".", 2)
            there = f"esm.encoder.layer.{number}.{parts[part]}" if part in parts else "rotary frequencies"
        else:
            there = outside.get(module, module if module.startswith("lm_head") else f"esm.{module}")
        found = "esm.embeddings.word_embeddings.weight" if name == "lm_head.weight" else f"{there}.{kind}"
        if "rot_emb" not in name:
            state[name] = given[found]
    fair.load_state_dict(state)
    return fair.eval()


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
