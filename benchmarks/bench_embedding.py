"""Residues a second of `megaprot embed`'s encoder beside plain transformers loops over the same domains and model.

``python benchmarks/bench_embedding.py [--residues 10000] [--rounds 3] [--seconds 5]``: the shipped cut of Pfam in a
random order, an ESM-2 of the 8M shape with random weights, mean embeddings. The peers pad batches of 8 sequences: as
they come, and sorted by length.
"""

import argparse
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from measure import CUT, compared, rates_in_turn, record
from transformers import AutoModel, AutoTokenizer, EsmConfig, EsmForMaskedLM

from megaprot.common.sequence_readers import open_sequences
from megaprot.common.vocabulary import get_vocabulary
from megaprot.finetune.hugging_face import load_encoder
from megaprot.finetune.residues import encode
from megaprot.tools.conversion.tokenizer import write_tokenizer
from megaprot.tools.embedding.proteins import Protein
from megaprot.tools.embedding.vectors import VectorSettings, embed

PEER_BATCH = 8


def write_model(folder: Path) -> None:
    """Write an ESM-2 of the 8M shape with random weights."""
    vocabulary = get_vocabulary("esm")
    config = EsmConfig(
        vocab_size=vocabulary.size,
        hidden_size=320,
        num_hidden_layers=6,
        num_attention_heads=20,
        intermediate_size=1280,
        position_embedding_type="rotary",
        token_dropout=True,
        layer_norm_eps=1e-5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=vocabulary.pad,
        mask_token_id=vocabulary.mask,
    )
    EsmForMaskedLM(config).save_pretrained(folder)
    write_tokenizer(vocabulary, folder, 0)


def shuffled_cut(num_residues: int) -> list[str]:
    """Return domains of the shipped cut in a random order, about so many residues."""
    proteins = [record.sequence.decode() for record in open_sequences(str(CUT))]
    random.Random(0).shuffle(proteins)
    taken, total = [], 0
    for protein in proteins:
        if total >= num_residues:
            break
        taken.append(protein)
        total += len(protein)
    return taken


def peer(folder: Path, proteins: list[str], device: torch.device) -> Callable[[], int]:
    """Return a pass of a plain loop: tokenize eight sequences, pad, run, average; it returns the residues."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval().to(device)

    def run() -> int:
        with torch.inference_mode():
            for start in range(0, len(proteins), PEER_BATCH):
                batch = proteins[start : start + PEER_BATCH]
                encoded = tokenizer(batch, padding=True, return_tensors="pt").to(device)
                states = model(**encoded).last_hidden_state
                [state[1 : 1 + len(protein)].mean(0).cpu() for state, protein in zip(states, batch, strict=True)]
        return sum(map(len, proteins))

    return run


def ours(folder: Path, proteins: list[str], device: torch.device) -> Callable[[], int]:
    """Return a pass of Megaprot's embedding; it returns the residues."""
    encoder = load_encoder(folder, device=device)
    settings = VectorSettings(layers=[-1], per_residue=False, dtype=torch.float32)

    def run() -> int:
        encoded = [
            Protein(number, str(number), str(number), encode(encoder.vocabulary, protein.encode()))
            for number, protein in enumerate(proteins)
        ]
        return sum(len(protein.residues) for protein, _ in embed(encoder, encoded, settings, lambda _: None))

    return run


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--residues", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    proteins = shuffled_cut(arguments.residues)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder)
        shuffled, by_length = "padded batches of 8, shuffled", "padded batches of 8, by length"
        contenders = {
            "megaprot": ours(folder, proteins, device),
            shuffled: peer(folder, proteins, device),
            by_length: peer(folder, sorted(proteins, key=len), device),
        }
        rates = rates_in_turn(contenders, arguments.rounds, arguments.seconds)
    claim = (
        f"mean embeddings of {len(proteins):,} shuffled domains, ESM-2 8M shape, {device.type}: at least 3 times the "
    )
    claim += "shuffled loop and 1.3 times the sorted one"
    record("embedding", [compared(claim, "residues_a_second", rates)], ["torch", "transformers"])


if __name__ == "__main__":
    main()
