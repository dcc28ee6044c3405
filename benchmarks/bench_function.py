"""Pairs of a protein and a function a second: a block of 200 x 200 at once against every pair encoded anew.

The pair-by-pair way is that of the public two-tower sketch: batches of 32 pairs, both texts and proteins padded and run
through transformers' own modules, one perceptron over (p, g, |p - g|). Both sides have the same towers (random weights:
six layers of 128 for proteins, four of 256 for texts), the same 200 Pfam domains and 200 texts, and the same
fusion, in fp32. Scoring is the forward pass alone; training takes gradients of all weights of both towers.
"""

import itertools
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore")

import numpy as np
import torch
from bench_finetuning import SIZES, esm_folder
from measure import CUT, compared, rates_in_turn, record
from torch import Tensor
from torch.nn import functional

from megaprot.common.sequence_readers import read_fasta
from megaprot.finetune.batching import plan_batches
from megaprot.finetune.function.term_graph import TermBlock
from megaprot.finetune.function.text_tower import TextTower, load_text_tower
from megaprot.finetune.function.two_towers import ProteinPart, TextPart, TowersHead, TwoTowers, VectorBlock
from megaprot.finetune.gradient_caching import Block, cached_step
from megaprot.finetune.hugging_face import load_encoder
from megaprot.finetune.protein_states import gather_proteins
from megaprot.finetune.residues import encode

NUM, PAIRS, LONGEST, TOKENS = 200, 32, 120, 2048
WORDS = [f"word{number}" for number in range(500)]


def text_folder(folder: Path) -> Path:
    """Write a small random BERT with a vocabulary of words."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(vocab_size=len(WORDS) + 5, hidden_size=256, num_hidden_layers=4, num_attention_heads=8,
                        intermediate_size=1024)  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def built(folder: Path) -> TwoTowers:
    """Return two towers of which all weights learn."""
    (folder / "protein").mkdir()
    SIZES.update(hidden_size=128, num_attention_heads=8, intermediate_size=512)
    encoder, text = load_encoder(esm_folder(folder / "protein")), load_text_tower(text_folder(folder / "text"))
    head = TowersHead("concat", "mean", "none", encoder.hidden_size, text.hidden_size, 256, 256, 0.0)
    return TwoTowers(encoder, text, head, False, False, lambda: None, lambda: None)  # type: ignore[arg-type, return-value]


def block_step(model: TwoTowers, proteins: list[np.ndarray], texts: list[str], learns: bool) -> Callable[[], int]:
    """Return a pass over the whole block, which returns its pairs."""
    batches = plan_batches([len(one) + 2 for one in proteins], TOKENS, True)
    labels = torch.rand(NUM, NUM, generator=torch.Generator().manual_seed(1)) < 0.1
    ids = model.text.encode(texts).ids
    text_batches = model.text.batches(model.text.encode(texts), TOKENS)
    order = torch.tensor([member for batch in batches for member in batch]).argsort()
    text_order = torch.tensor([member for batch in text_batches for member in batch]).argsort()
    terms = TermBlock(np.arange(NUM), NUM, torch.zeros(2, 0, dtype=torch.long))
    parts: list[Any] = [
        ProteinPart(gather_proteins(model.encoder.vocabulary, 0, [proteins[one] for one in batch]), np.array(batch))
        for batch in batches
    ]
    parts += [TextPart(model.text.pad([ids[one] for one in batch])) for batch in text_batches]

    def join(vectors: list[Tensor]) -> VectorBlock:
        of_proteins = torch.cat(vectors[: len(batches)])[order]
        of_texts = torch.cat(vectors[len(batches) :])[text_order]
        return VectorBlock(of_proteins, of_texts, terms, labels, torch.ones_like(labels))

    def train() -> int:
        block = Block(parts, [True] * len(parts), join, [], False)
        cached_step(model, block, loss_of, lambda loss, is_last: loss.backward(), torch.device("cpu"))
        model.zero_grad()
        return NUM * NUM

    def loss_of(outputs: Any) -> Tensor:
        return functional.binary_cross_entropy_with_logits(outputs.logits, labels.float())

    def score() -> int:
        with torch.no_grad():
            model(join([model(part) for part in parts]))
        return NUM * NUM

    return train if learns else score


def pair_step(
    model: TwoTowers, sequences: list[str], texts: list[str], folder: Path, learns: bool
) -> Callable[[], int]:
    """Return a pass over one batch of pairs, each encoded anew."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "protein")
    protein_model, text_model = (AutoModel.from_pretrained(folder / name) for name in ("protein", "text"))
    tower: TextTower = model.text
    random = np.random.default_rng(0)
    pairs = [(int(one), int(other)) for one, other in random.integers(NUM, size=(4096, 2))]
    batches = itertools.cycle([pairs[first : first + PAIRS] for first in range(0, len(pairs), PAIRS)])

    def step() -> int:
        batch = next(batches)
        proteins = tokenizer([sequences[one] for one, _ in batch], padding=True, return_tensors="pt")
        written = tower.tokenizer([texts[other] for _, other in batch], padding=True, return_tensors="pt")
        with torch.set_grad_enabled(learns):
            left = model.head.protein(protein_model(**proteins).last_hidden_state.mean(dim=1))
            right = model.head.text(text_model(**written).last_hidden_state.mean(dim=1))
            fusion: Any = model.head.fusion
            hidden = functional.relu(fusion.first(torch.cat([left, right, (left - right).abs()], dim=1)))
            logits = fusion.last(hidden).squeeze(1)
            if learns:
                functional.binary_cross_entropy_with_logits(logits, torch.zeros(len(batch))).backward()
                for part in (protein_model, text_model, model):
                    part.zero_grad()
        return len(batch)

    return step


def main() -> None:
    """Measure in turn and record the ratios."""
    random = np.random.default_rng(0)
    sequences = [one.sequence.decode() for one in read_fasta(CUT) if len(one.sequence) <= LONGEST][:NUM]
    texts = [" ".join(random.choice(WORDS, random.integers(10, 40))) for _ in range(NUM)]
    results = []
    with tempfile.TemporaryDirectory() as name:
        model = built(Path(name))
        proteins = [encode(model.encoder.vocabulary, one.encode()) for one in sequences]
        for learns, what, rounds in ((False, "scoring", 3), (True, "a training step on", 1)):
            contenders = {
                "megaprot": block_step(model, proteins, texts, learns),
                "pair by pair": pair_step(model, sequences, texts, Path(name), learns),
            }
            rates = rates_in_turn(contenders, rounds=rounds, seconds=2.0)
            claim = f"{what} a block of {NUM} proteins x {NUM} functions, towers of 6 x 128 and 4 x 256, fp32"
            results.append(compared(claim, "pairs/s", rates))
    record("function_throughput", results, ["torch", "transformers"])


if __name__ == "__main__":
    main()
