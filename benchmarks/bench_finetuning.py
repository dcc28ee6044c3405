"""Fine-tuning steps a second against TAPE's model and collate function in a plain loop, the same size and data.

Both take batches of 8 Pfam domains of the shipped cut, at most 400 residues long (TAPE keeps all attention maps of all
layers, which fills memory with longer ones), in the same random order, with a class for each residue, and do
forward pass, backward pass, clipping and AdamW in fp32. TAPE's own runner needs CUDA; its model, head and collate
function are used as they are (pip install tape-proteins).
"""

import argparse
import itertools
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore")

import numpy as np
import torch
from measure import CUT, compared, rates_in_turn, record

from megaprot.common.sequence_readers import read_fasta
from megaprot.common.vocabulary import get_vocabulary
from megaprot.finetune.config import EngineConfig, HeadConfig, LabelConfig, OptimConfig, TrainConfig
from megaprot.finetune.engine import Engine
from megaprot.finetune.examples import Example
from megaprot.finetune.hugging_face import load_encoder
from megaprot.finetune.micro_batches import share, training_tokens
from megaprot.finetune.processes import Place, processes
from megaprot.finetune.residues import encode
from megaprot.finetune.tasks import open_task

BATCH_SIZE, NUM_PROTEINS, LONGEST = 8, 1024, 400
SIZES = {
    "hidden_size": 320,
    "num_hidden_layers": 6,
    "num_attention_heads": 20,
    "intermediate_size": 1280,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,  # as ESM-2, for both
}


def proteins() -> list[tuple[str, np.ndarray]]:
    """Return sequences and a class for each residue: what their letters like to be."""
    table = {letter: number for number, letters in enumerate(("AELMQKRH", "VIYCWFT")) for letter in letters}
    sequences = [one.sequence.decode() for one in read_fasta(CUT) if len(one.sequence) <= LONGEST]
    chosen = np.random.default_rng(0).permutation(len(sequences))[:NUM_PROTEINS]
    return [
        (sequences[place], np.array([table.get(letter, 2) for letter in sequences[place]])) for place in chosen.tolist()
    ]


def megaprot_step(data: list[tuple[str, np.ndarray]], place: Place, head: str, folder: Path) -> Callable[[], int]:
    """Return one step of ours, which returns the residues it read."""
    encoder = load_encoder(esm_folder(folder))
    task = open_task("secondary_structure", LabelConfig())
    model = task.build_model(encoder, task.build_head(HeadConfig(name=head), encoder), False)
    train = TrainConfig()
    engine = Engine(model, task, OptimConfig(), train, EngineConfig(), place)
    examples = [
        Example(
            number,
            number,
            str(number),
            encode(encoder.vocabulary, text.encode()),
            text,
            np.stack((labels, labels >= 0)),
        )
        for number, (text, labels) in enumerate(data)
    ]
    lengths = [len(one.residues) + 2 for one in examples]
    numbers = itertools.cycle(range(0, NUM_PROTEINS, BATCH_SIZE))

    def step() -> int:
        first = next(numbers)
        members = list(range(first, first + BATCH_SIZE))
        batches = share(members, lengths, training_tokens(0, place.device.type), True, 0, 1)
        weight = sum(len(examples[member].residues) for member in members)
        return engine.take_step(examples, batches, float(weight), 1e-4, 0).num_residues

    return step


def esm_folder(folder: Path, token_dropout: bool = False) -> Path:
    """Write a random ESM-2 of the 8M shape."""
    from transformers import EsmConfig, EsmForMaskedLM, EsmTokenizer

    vocabulary = get_vocabulary("esm")
    (folder / "vocab.txt").write_text("\n".join(vocabulary.tokens))
    EsmTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = EsmConfig(
        vocab_size=vocabulary.size, pad_token_id=vocabulary.pad, mask_token_id=vocabulary.mask, layer_norm_eps=1e-5,
        position_embedding_type="rotary", token_dropout=token_dropout, **SIZES,
    )  # fmt: skip
    EsmForMaskedLM(config).save_pretrained(folder)
    return folder


def tape_step(data: list[tuple[str, np.ndarray]]) -> Callable[[], int]:
    """Return one step of TAPE's model and collate function in a plain loop."""
    from tape import ProteinBertConfig, TAPETokenizer
    from tape.datasets import SecondaryStructureDataset
    from tape.models.modeling_bert import ProteinBertForSequenceToSequenceClassification

    dataset: Any = SecondaryStructureDataset.__new__(SecondaryStructureDataset)  # without its files
    tokenizer = TAPETokenizer("iupac")
    items = []
    for text, labels in data:
        tokens = np.asarray(tokenizer.encode(text))
        items.append((tokens, np.ones_like(tokens), np.pad(labels, (1, 1), "constant", constant_values=-1)))
    model = ProteinBertForSequenceToSequenceClassification(ProteinBertConfig(num_labels=3, **SIZES)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    numbers: Iterator[int] = itertools.cycle(range(0, NUM_PROTEINS, BATCH_SIZE))

    def step() -> int:
        first = next(numbers)
        batch = dataset.collate_fn(items[first : first + BATCH_SIZE])
        (loss, _), *_ = model(**batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return sum(len(text) for text, _ in data[first : first + BATCH_SIZE])

    return step


def main() -> None:
    """Measure in turn and record the ratio."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--seconds", type=float, default=5.0)
    given = options.parse_args()
    data = proteins()
    with tempfile.TemporaryDirectory() as folder, processes(5.0) as place:
        contenders = {"megaprot": megaprot_step(data, place, "tape", Path(folder)), "TAPE": tape_step(data)}
        rates = rates_in_turn(contenders, given.rounds, given.seconds)
    claim = "fine-tuning secondary structure, 8M encoder, TAPE's head, fp32, batches of 8 Pfam domains"
    record(
        "finetuning", [compared(claim, "residues/s", rates)], ["torch", "transformers", "deepspeed", "tape-proteins"]
    )


if __name__ == "__main__":
    main()
