"""Joint training steps (class and masked-language loss) on pairs against PLM-interact's, rebuilt in a plain loop.

Both take batches of 8 pairs in the same random order, lengths drawn as in Bernett's training split and cut at its
recipe's 3,570 tokens, with a random ESM-2 of the 8M shape and PLM-interact's head; forward and backward pass, clipping
and AdamW, in fp32 and in bf16 (ours: bf16 weights with fp32 copies; theirs: autocast). PLM-interact takes two passes of
transformers' own model over padded batches, one for each loss; its published loop works with one pair at a time only,
so that padding costs it nothing: the second figure is that loop, 8 pairs to a step. Rates are by processor time of one
thread.
usage: python benchmarks/bench_ppi.py [--precisions bf16 fp32] [--pairs_at_once 1 8]
"""

import argparse
import itertools
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore")

import numpy as np
import torch
from bench_finetuning import esm_folder
from measure import compared, rates_in_turn, record
from torch.nn import functional

from megaprot.finetune.batch import pack_pairs
from megaprot.finetune.config import EngineConfig, FinetuneConfig, HeadConfig, LabelConfig, OptimConfig, TrainConfig
from megaprot.finetune.config_ppi import PpiConfig
from megaprot.finetune.engine import Engine
from megaprot.finetune.hugging_face import load_encoder
from megaprot.finetune.micro_batches import share, training_tokens
from megaprot.finetune.pairs.cuts import longest_first
from megaprot.finetune.pairs.files import PairExample
from megaprot.finetune.processes import Place, processes
from megaprot.finetune.tasks.ppi import Ppi

BATCH_SIZE, NUM_PAIRS, MAX_LENGTH, MASK_RATE, POS_WEIGHT = 8, 8, 3570, 0.15, 1.0
PEERS = {1: "PLM-interact, one pair at a time", BATCH_SIZE: "PLM-interact, padded batches of 8"}
QUANTILES = (
    54, 191, 241, 286, 342, 395, 437, 482, 530, 588, 635, 703, 758, 810, 903, 982, 1121, 1297, 1608, 2027, 4200
)  # fmt: skip
"""Lengths of the proteins in Bernett's training pairs at 0, 5, ... 100 %; the last, 14,507, is cut in any case."""


def pairs() -> list[PairExample]:
    """Return pairs of random residues, half of them labelled 1."""
    random = np.random.default_rng(0)
    lengths = np.interp(random.random((NUM_PAIRS, 2)), np.linspace(0, 1, len(QUANTILES)), QUANTILES).astype(int)
    found = []
    for number, both in enumerate(lengths.tolist()):
        kept = longest_first(*both, MAX_LENGTH - 3)
        residues = [random.integers(4, 24, length).astype(np.uint8) for length in kept]
        found.append(PairExample(number, number, f"a{number}", f"b{number}", residues[0], residues[1], number % 2))
    return found


def num_residues(example: PairExample) -> int:
    """Return the residues of both proteins."""
    return len(example.residues_first) + len(example.residues_second)


def in_turn(examples: list[PairExample]) -> Iterator[list[int]]:
    """Yield the pairs of each step: first the shortest alone, to warm up, then batches, again and again."""
    yield [min(range(NUM_PAIRS), key=lambda number: num_residues(examples[number]))]
    for first in itertools.cycle(range(0, NUM_PAIRS, BATCH_SIZE)):
        yield list(range(first, first + BATCH_SIZE))


def megaprot_step(examples: list[PairExample], place: Place, folder: Path, precision: Any) -> Callable[[], int]:
    """Return one step of ours, which returns the residues it read."""
    config = FinetuneConfig("ppi", str(folder), "", "", head=HeadConfig(name="plm-interact"),
                            ppi=PpiConfig(max_length=MAX_LENGTH, mask_rate=MASK_RATE))  # fmt: skip
    task = Ppi(LabelConfig())
    task.configure(config)
    task.pos_weight = POS_WEIGHT
    encoder = load_encoder(folder, with_head=True)
    model = task.build_model(encoder, task.build_head(config.head, encoder), False)
    engine = Engine(model, task, OptimConfig(), TrainConfig(precision=precision), EngineConfig(), place)
    lengths = [task.num_tokens(one, encoder) for one in examples]
    batches_of_pairs, seeds = in_turn(examples), itertools.count()

    def step() -> int:
        members = next(batches_of_pairs)
        batches = share(members, lengths, training_tokens(0, place.device.type), True, 0, 1)
        return engine.take_step(examples, batches, float(len(members)), 1e-4, next(seeds)).num_residues

    return step


def plm_interact_step(
    examples: list[PairExample], folder: Path, precision: str, pairs_at_once: int
) -> Callable[[], int]:
    """Return one step of PLM-interact's loss in a plain loop; gradients of ``pairs_at_once`` pairs are accumulated."""
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling, EsmForMaskedLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASK_RATE)
    vocabulary = load_encoder(folder).vocabulary
    features = [{"input_ids": pack_pairs(vocabulary, [(one.residues_first, one.residues_second)]).tokens.tolist()}
                for one in examples]  # fmt: skip
    model = EsmForMaskedLM.from_pretrained(folder).train()
    classifier = torch.nn.Linear(model.config.hidden_size, 1)
    parameters = [*model.parameters(), *classifier.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01)
    batches_of_pairs = in_turn(examples)

    def backward(members: list[int], num_pairs: int) -> None:
        batch = collator([features[member] for member in members])
        labels = torch.tensor([float(examples[member].label) for member in members])
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            mlm_loss = model(**batch).loss
            masked = {name: batch[name] for name in ("input_ids", "attention_mask")}
            first = model.base_model(**masked).last_hidden_state[:, 0]
            logits = classifier(torch.relu(first)).squeeze(1).float()
        weight = torch.tensor(POS_WEIGHT)
        class_loss = functional.binary_cross_entropy_with_logits(logits, labels, pos_weight=weight)
        ((10.0 * class_loss + mlm_loss) * len(members) / num_pairs).backward()

    def step() -> int:
        members = next(batches_of_pairs)
        optimizer.zero_grad()
        for start in range(0, len(members), pairs_at_once):
            backward(members[start : start + pairs_at_once], len(members))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return sum(num_residues(examples[member]) for member in members)

    return step


def main() -> None:
    """Measure in turn and record the ratios."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--pairs_at_once", nargs="+", type=int, choices=(1, BATCH_SIZE), default=[1])
    options.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["bf16"])
    given = options.parse_args()
    torch.set_num_threads(1)
    examples, results = pairs(), []
    with tempfile.TemporaryDirectory() as folder, processes(5.0) as place:
        model = esm_folder(Path(folder), token_dropout=True)
        for precision in given.precisions:
            contenders = {
                PEERS[number]: plm_interact_step(examples, model, precision, number) for number in given.pairs_at_once
            }
            contenders["megaprot"] = megaprot_step(examples, place, model, precision)
            claim = f"joint training on pairs of proteins, 8M encoder, {precision}, 8 pairs a step, Bernett's lengths"
            rates = rates_in_turn(contenders, 1, 1.0, time.process_time)
            results.append(compared(claim, "residues/s of a thread", rates))
    record("ppi", results, ["torch", "transformers", "deepspeed"])


if __name__ == "__main__":
    main()
