"""Run random sequences through source and result, and the difference of LM heads that no class of transformers has."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.nn import functional

from megaprot.common.errors import InputError, RunError
from megaprot.common.packing import PackedRow, to_tensors
from megaprot.common.vocabulary import Vocabulary
from megaprot.pretrain import parallel
from megaprot.pretrain.config import DataConfig, ParallelConfig, PretrainConfig, TrainConfig
from megaprot.pretrain.engine import build_model, transformer_config
from megaprot.pretrain.model.initialisation import SHARDING_METADATA
from megaprot.tools.conversion.names import BIAS, WORDS
from megaprot.tools.conversion.source_model import SourceModel

_LENGTHS = (6, 40, 120)  # tokens, boundary tokens included
_MASKED = 0.15
_TIMEOUT_MINUTES = 10.0
HEAD = tuple(f"lm_head.{module}.{kind}" for module in ("dense", "layer_norm") for kind in ("weight", "bias"))
LARGEST_RELATIVE = 1e-4


@dataclass(frozen=True)
class Outputs:
    """What a model makes of the sequences, fp32, one tensor a sequence.

    Attributes:
        hidden: Last hidden states [tokens, hidden_size].
        logits: Logits of the true vocabulary [tokens, vocabulary].
    """

    hidden: list[Tensor]
    logits: list[Tensor]


@dataclass(frozen=True)
class Difference:
    """The largest difference of two models' outputs, and that over the largest output."""

    absolute: float
    relative: float

    def __str__(self) -> str:
        return f"{self.absolute:.2e} (relative {self.relative:.2e})"


def difference(first: list[Tensor], second: list[Tensor]) -> Difference:
    """Return by how much two models' outputs differ; a difference that is no number counts as infinite."""
    absolute = max(float((one - other).abs().max()) for one, other in zip(first, second, strict=True))
    largest = max(float(one.abs().max()) for one in first)
    if not absolute < float("inf"):
        return Difference(float("inf"), float("inf"))
    return Difference(absolute, absolute / largest if largest else absolute)


def random_sequences(vocabulary: Vocabulary, num_positions: int) -> list[list[int]]:
    """Return the sequences to compare on, as token ids: random residues, some masked; always the same."""
    generator = torch.Generator().manual_seed(1)
    residues = torch.tensor(vocabulary.replacements)
    sequences = []
    for length in _LENGTHS:
        tokens = residues[torch.randint(len(residues), (min(length, num_positions),), generator=generator)]
        tokens[torch.rand(len(tokens), generator=generator) < _MASKED] = vocabulary.mask
        tokens[0] = vocabulary.begin
        if vocabulary.end >= 0:
            tokens[-1] = vocabulary.end
        sequences.append(tokens.tolist())
    return sequences


def run_megatron(source: SourceModel, dtype: torch.dtype, sequences: list[list[int]]) -> Outputs:
    """Return what ProteinBert computes with weights rounded to ``dtype``, in fp32, in this process alone."""
    config = PretrainConfig(
        model=replace(source.model, hidden_dropout=0.0, attention_dropout=0.0),
        data=DataConfig(max_sequence_length=source.num_positions),
        train=TrainConfig(precision="fp32"),
    )
    hidden: list[Tensor] = []
    with parallel.processes(ParallelConfig(), _TIMEOUT_MINUTES) as place:
        model = build_model(config, transformer_config(config), source.vocabulary, place)[0].module.eval()
        with torch.no_grad():
            for part in model.sharded_state_dict(metadata=dict(SHARDING_METADATA)).values():
                if isinstance(part, ShardedTensor):
                    part.data.copy_(source.tensors.read(part.key).to(dtype))
            model.encoder.register_forward_hook(lambda module, arguments, output: hidden.append(output[:, 0].cpu()))
            logits = [_logits(model, sequence, place.device) for sequence in sequences]
    return Outputs(hidden, [one[:, : source.vocabulary.size].cpu() for one in logits])


def _logits(model: torch.nn.Module, sequence: list[int], device: torch.device) -> Tensor:
    """Return ProteinBert's logits [tokens, padded vocabulary] at every place of one sequence."""
    number, places = len(sequence), np.arange(len(sequence))
    row = PackedRow(
        tokens=np.array(sequence, dtype=np.int64),
        positions=places,
        cu_seqlens=np.array([0, number], dtype=np.int32),
        num_sequences=1,
        masked_positions=places,  # where logits are asked for
        labels=np.zeros(number, dtype=np.int64),
        masked_kind=np.zeros(number, dtype=np.uint8),
        num_residues=number,
    )
    logits: Tensor = model(to_tensors(row, device))
    return logits


@torch.no_grad()
def run_hugging_face(folder: Path, dtype: torch.dtype, sequences: list[list[int]]) -> Outputs:
    """Return what transformers computes with a folder's weights rounded to ``dtype``, in fp32.

    Raises:
        InputError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise InputError("--verify needs transformers; pip install transformers, or do without it.") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    for parameter in model.parameters():  # not the buffers, whose rotary frequencies stay exact
        parameter.copy_(parameter.to(dtype))
    hidden, logits = [], []
    for sequence in sequences:
        inputs = {
            "input_ids": torch.tensor([sequence]),
            "attention_mask": torch.ones((1, len(sequence)), dtype=torch.long),
        }
        hidden.append(model.base_model(**inputs).last_hidden_state[0])
        logits.append(model(**inputs).logits[0])
    return Outputs(hidden, logits)


@torch.no_grad()
def with_tanh_head(source: SourceModel, dtype: torch.dtype, outputs: Outputs) -> Outputs:
    """Return what a model's outputs are if its LM head has tanh GELU in place of erf.

    Megatron's LM head has erf GELU whatever its layers have; MegatronBert has one activation for both.

    Args:
        source: The model.
        dtype: Data type its weights are rounded to.
        outputs: What ProteinBert, whose head has erf, makes of it.
    """
    weights = {name: source.tensors.read(name).to(dtype).float() for name in (*HEAD, WORDS, BIAS)}
    dense, dense_bias, norm, norm_bias = (weights[name] for name in HEAD)
    logits = []
    for states in outputs.hidden:
        activated = functional.gelu(functional.linear(states, dense, dense_bias), approximate="tanh")
        normal = functional.layer_norm(activated, norm.shape, norm, norm_bias, source.model.layer_norm_epsilon)
        logits.append(functional.linear(normal, weights[WORDS], weights[BIAS])[:, : source.vocabulary.size])
    return Outputs(outputs.hidden, logits)


def require_equal(source: Outputs, result: Outputs) -> str:
    """Return a line about the differences of two models' outputs.

    Args:
        source: Outputs of what was converted.
        result: Outputs of what it became.

    Raises:
        RunError: They differ by more than 1e-4 of the largest output.
    """
    found = {
        "last hidden states": difference(source.hidden, result.hidden),
        "logits": difference(source.logits, result.logits),
    }
    line = ", ".join(f"{name} {one}" for name, one in found.items())
    worst = max(one.relative for one in found.values())
    if not worst <= LARGEST_RELATIVE:
        raise RunError(f"source and result differ: {line}, more than {LARGEST_RELATIVE} relative; nothing was written.")
    return f"largest difference of source and result on random sequences: {line}"
