"""Distil a protein encoder: a smaller one learns from a bigger one's logits and hidden states.

The student begins as every k-th layer of the teacher (DistilBERT, Sanh et al. 2019), or narrower, with random weights.
Its loss is that of masked residues: cross-entropy with the truth, Kullback-Leibler divergence from the teacher's
distribution at a temperature (Hinton et al. 2015), and the mean squared difference of hidden states, both normalised by
token, a narrower student's after a learned projection (TinyBERT, Jiao et al. 2020).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from megaprot.common.counter_random import key, keys, uniform_bits
from megaprot.common.errors import InputError
from megaprot.common.files import folder_written_whole
from megaprot.common.masking import MaskingConfig
from megaprot.common.packing import UnmaskedRow
from megaprot.common.vocabulary import Vocabulary
from megaprot.finetune.batch import Batch, pack
from megaprot.finetune.batching import centred_window
from megaprot.finetune.config import HeadConfig, LabelConfig
from megaprot.finetune.config_distillation import LossConfig
from megaprot.finetune.encoder import Encoder
from megaprot.finetune.hugging_face import copy_tokenizer, fingerprint, load_encoder
from megaprot.finetune.masked_rows import mask_row
from megaprot.finetune.metrics import Weighted
from megaprot.finetune.task import Outcome, Task

_LAYER = re.compile(r"(.*encoder\.layer\.)(\d+)(\..*)")
_MASKS, _CUTS = int.from_bytes(b"distmask"), int.from_bytes(b"distcuts")


def chosen_layers(num_teacher: int, num_student: int) -> list[int]:
    """Return the teacher's layers, from 1, that the student's stand for: evenly spaced, the last one the last."""
    return [round((place + 1) * num_teacher / num_student) for place in range(num_student)]


def make_student(teacher: Path, folder: Path, num_layers: int, hidden_size: int, seed: int) -> None:
    """Write a student with its teacher's tokenizer as a Hugging Face folder.

    Args:
        teacher: The teacher's folder.
        folder: Where to; nothing must be there.
        num_layers: The student's layers.
        hidden_size: Its width; 0 takes the teacher's, and its weights. Heads keep their size, feed-forward layers their
            ratio.
        seed: Of random weights.

    Raises:
        InputError: The teacher cannot be used, or has fewer layers or another size of heads.
    """
    import transformers

    whole: Any = load_encoder(teacher, with_head=True).model
    config = whole.config.__class__.from_dict(whole.config.to_dict())
    if not 1 <= num_layers <= config.num_hidden_layers:
        raise InputError(f"--layers {num_layers}: the teacher has {config.num_hidden_layers}; give 1 to as many.")
    config.num_hidden_layers = num_layers
    if hidden_size and hidden_size != config.hidden_size:
        size_of_head = config.hidden_size // config.num_attention_heads
        if hidden_size % size_of_head:
            raise InputError(f"--hidden_size {hidden_size}: the teacher's heads have {size_of_head}; give a multiple.")
        config.intermediate_size = config.intermediate_size * hidden_size // config.hidden_size
        config.num_attention_heads = hidden_size // size_of_head
        config.hidden_size = hidden_size
    torch.manual_seed(seed)
    student = transformers.AutoModelForMaskedLM.from_config(config)
    if config.hidden_size == whole.config.hidden_size:
        chosen = chosen_layers(whole.config.num_hidden_layers, num_layers)
        student.load_state_dict(_kept(whole.state_dict(), chosen), strict=False)
    with folder_written_whole(folder) as partial:
        student.save_pretrained(partial)
        copy_tokenizer(teacher, partial)


def _kept(state: dict[str, Tensor], chosen: Sequence[int]) -> dict[str, Tensor]:
    """Return the teacher's weights, of the layers only those chosen, under their new numbers."""
    number_of = {layer - 1: number for number, layer in enumerate(chosen)}
    kept = {}
    for name, tensor in state.items():
        found = _LAYER.fullmatch(name)
        if found is None:
            if "contact_head" not in name:  # ESM's: its size goes with the layers, and nothing here calls it
                kept[name] = tensor
        elif int(found[2]) in number_of:
            kept[f"{found[1]}{number_of[int(found[2])]}{found[3]}"] = tensor
    return kept


@dataclass(frozen=True)
class MaskedProteins:
    """Proteins with some residues masked.

    Attributes:
        batch: The row as student and teacher see it.
        places: Masked places in the row, int64 [num_masked].
        truth: What stood there, int64 [num_masked].
    """

    batch: Batch
    places: Tensor
    truth: Tensor

    def to(self, device: torch.device) -> MaskedProteins:
        """Return the same on a device."""
        return MaskedProteins(self.batch.to(device), self.places.to(device), self.truth.to(device))


def mask_proteins(
    vocabulary: Vocabulary,
    residues: Sequence[NDArray[np.integer]],
    sequence_keys: NDArray[np.uint64],
    masking: MaskingConfig,
) -> MaskedProteins:
    """Return proteins as one row on the CPU with residues masked as in pretraining.

    Args:
        vocabulary: The model's.
        residues: Ids of each protein's residues.
        sequence_keys: Of each protein's masks, uint64 [num_proteins].
        masking: How many, and by what.
    """
    batch = pack(vocabulary, residues)
    row = UnmaskedRow(batch.tokens.numpy(), batch.positions.numpy(), batch.cu_seqlens.numpy(), batch.num_sequences)
    tokens, places, truth = mask_row(row, sequence_keys, masking, vocabulary)
    return MaskedProteins(replace(batch, tokens=tokens), places, truth)


class Pupil(nn.Module):
    """A student beside its teacher, which is no part of what is trained or saved.

    Args:
        encoder: The student, with its head.
        head: Projections of the student's hidden states to the teacher's width.
        teacher: The teacher, with its head.
        loss: What is learned.
    """

    def __init__(self, encoder: Encoder, head: nn.ModuleList, teacher: Encoder, loss: LossConfig) -> None:
        super().__init__()
        self.encoder, self.head, self.loss = encoder, head, loss
        self._teacher = [teacher.requires_grad_(False).eval()]  # in a list, torch does not see it
        self._layers = chosen_layers(teacher.num_layers, encoder.num_layers)

    def forward(self, inputs: MaskedProteins) -> dict[str, Tensor]:
        """Return each protein's sums over masked residues (``truth``, ``logits``), over tokens (``hidden``), the number
        of masked residues, and the teacher's own ``teacher_truth``; all fp32 [num_proteins].
        """
        batch, teacher = inputs.batch, self._teacher[0]
        layers = list(range(1, self.encoder.num_layers + 1))
        states = self.encoder(batch, layers=layers)
        with torch.no_grad():
            taught = teacher(batch, layers=self._layers)
            wanted = teacher.logits(taught[-1][inputs.places]).float()
        logits = self.encoder.logits(states[-1][inputs.places]).float()
        owner = batch.sequence[inputs.places]
        temperature = self.loss.temperature
        divergence = (
            functional.kl_div(
                functional.log_softmax(logits / temperature, dim=1),
                functional.log_softmax(wanted / temperature, dim=1),
                reduction="none",
                log_target=True,
            ).sum(dim=1)
            * temperature**2
        )
        masked = {
            "truth": functional.cross_entropy(logits, inputs.truth, reduction="none"),
            "teacher_truth": functional.cross_entropy(wanted, inputs.truth, reduction="none"),
            "logits": divergence,
            "num_masked": torch.ones_like(divergence),
        }
        sums = {name: _by_protein(values, owner, batch.num_sequences) for name, values in masked.items()}
        hidden = sum(
            (_normalised(project(own)) - _normalised(theirs)).square().mean(dim=1)
            for project, own, theirs in zip(self.head, states, taught, strict=True)
        )
        assert isinstance(hidden, Tensor)
        sums["hidden"] = _by_protein(hidden / len(layers), batch.sequence, batch.num_sequences)
        return sums


def _by_protein(values: Tensor, owner: Tensor, num_proteins: int) -> Tensor:
    return torch.zeros(num_proteins, device=values.device).index_add(0, owner, values.float())


def _normalised(states: Tensor) -> Tensor:
    return functional.layer_norm(states.float(), states.shape[-1:])


class Distillation(Task):
    """Masked residues, with a teacher. An epoch goes over proteins; longer ones than are read at once are cut.

    Args:
        teacher: Folder of the teacher.
        loss: What is learned.
        max_residues: Most residues of a protein that are read; a window is drawn in training, the middle is scored.
        device: Where the teacher is.
        precision: Type of the teacher's weights.
    """

    name = folder = "distillation"
    heads = ("projection",)
    metric = "perplexity"
    higher_is_better = False
    needs_lm_head = True

    def __init__(
        self, teacher: Path, loss: LossConfig, max_residues: int, device: torch.device, precision: str = "fp32"
    ) -> None:
        super().__init__(LabelConfig())
        self.settings, self.max_residues = loss, max_residues
        self.teacher = load_encoder(teacher, with_head=True, device=device, precision=precision)
        self.masking = MaskingConfig(mask_probability=loss.mask_rate)
        self._what = f"{fingerprint(teacher)} {loss} {max_residues}".encode()

    def build_head(self, config: HeadConfig, encoder: Encoder) -> nn.Module:
        """Return a projection for each of the student's layers, nothing where both have one width."""
        sizes = encoder.hidden_size, self.teacher.hidden_size
        is_needed = sizes[0] != sizes[1]
        return nn.ModuleList(nn.Linear(*sizes) if is_needed else nn.Identity() for _ in range(encoder.num_layers))

    def build_model(self, encoder: Encoder, head: nn.Module, is_frozen: bool) -> nn.Module:
        """Return the student beside its teacher."""
        assert isinstance(head, nn.ModuleList)
        return Pupil(encoder, head, self.teacher, self.settings)

    def num_tokens(self, example: Any, encoder: Encoder) -> int:
        """Return how many tokens are read of a protein."""
        return min(len(example.residues), self._longest(encoder)) + encoder.vocabulary.num_boundary_tokens

    def _longest(self, encoder: Encoder) -> int:
        return min(limit for limit in (encoder.longest, self.max_residues, 1 << 30) if limit)

    def notes(self, examples: Sequence[Any], encoder: Encoder) -> list[str]:
        """Return how many proteins are cut."""
        longest = self._longest(encoder)
        num_cut = sum(len(one.residues) > longest for one in examples)
        return [f"{num_cut:,} proteins are longer than {longest:,} residues: a window is read"] if num_cut else []

    def digest_of(self, example: Any) -> bytes:
        """Return bytes of residues, teacher and settings, which are what a run goes on with."""
        return self._what + example.residues.tobytes()  # type: ignore[no-any-return]

    def collate(self, encoder: Encoder, examples: Sequence[Any], seed: int | None) -> Any:
        """Return masked proteins; scored ones have masks that no seed changes."""
        numbers = np.array([one.number for one in examples], dtype=np.int64)
        prefix = key(_MASKS) if seed is None else key(_MASKS, seed)
        longest = self._longest(encoder)
        cut = []
        for one in examples:
            num_residues = len(one.residues)
            start, end = centred_window(num_residues // 2, num_residues, longest)
            if seed is not None and num_residues > longest:
                draw = uniform_bits(keys(key(_CUTS, seed), np.array([one.number])), np.zeros(1, dtype=np.int64))[0]
                start = int(draw % np.uint64(num_residues - longest + 1))
                end = start + longest
            cut.append(one.residues[start:end])
        return mask_proteins(encoder.vocabulary, cut, keys(prefix, numbers), self.masking)

    def weight(self, example: Any) -> float:
        """Return the residues that are masked on average."""
        return max(1.0, self.settings.mask_rate * min(len(example.residues), self.max_residues or 1 << 30))

    def loss(self, outputs: Any, examples: Sequence[Any]) -> Tensor:
        """Return the weighted sum of the three losses, as if each were of masked residues."""
        settings = self.settings
        total: Tensor = (
            settings.truth_weight * outputs["truth"].sum()
            + settings.logits_weight * outputs["logits"].sum()
            + settings.hidden_weight * settings.mask_rate * outputs["hidden"].sum()
        )
        return total

    def outcomes(self, outputs: Any, examples: Sequence[Any]) -> list[Outcome]:
        """Return each protein's sums."""
        names = list(outputs)
        table = torch.stack([outputs[name] for name in names]).double().cpu().numpy()
        return [dict(zip(names, column[:, None], strict=True)) for column in table.T]

    def metrics(self, examples: Sequence[Any], outcomes: Sequence[Outcome]) -> dict[str, Weighted]:
        """Return the perplexities of student and teacher, and their divergence."""
        sums = {name: np.array([float(one[name][0]) for one in outcomes]) for name in outcomes[0]}
        counts = sums["num_masked"]

        def mean(name: str) -> Weighted:
            return lambda weights: float(weights @ sums[name] / max(weights @ counts, 1e-9))

        return {
            "perplexity": lambda weights: float(np.exp(mean("truth")(weights))),
            "teacher_perplexity": lambda weights: float(np.exp(mean("teacher_truth")(weights))),
            "divergence": mean("logits"),
        }

    def definitions(self) -> dict[str, str]:
        """Return what the metrics are."""
        return {
            "perplexity": "exp of the student's mean cross-entropy over masked residues.",
            "teacher_perplexity": "The same of the teacher, with the same masks.",
            "divergence": "Mean divergence from the teacher's distribution at the temperature, times its square, nats.",
        }

    def columns(self) -> tuple[str, ...]:
        """Return the columns of a protein's sums."""
        return ("cross_entropy", "num_masked")

    def rows(self, example: Any, outcome: Outcome) -> Iterable[tuple[str, ...]]:
        """Yield a protein's sums."""
        yield f"{outcome['truth'][0]:.6g}", f"{outcome['num_masked'][0]:.0f}"
