"""A small text encoder with random weights, and a small data folder whose labels follow from the sequences."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megaprot.common.vocabulary import STANDARD_RESIDUES
from megaprot.finetune.config import FinetuneConfig, HeadConfig, OptimConfig, TrainConfig, TuningConfig
from megaprot.finetune.config_function import FunctionConfig, SplitConfig
from tests.finetune.folders import esm_folder

WORDS = [
    "binding", "catalysis", "transport", "of", "protein", "lipid", "sugar", "metal", "ion", "membrane",
    "nucleus", "cell", "process", "function", "component", "biological", "molecular", "cellular",
    "regulation", "kinase", ".", "(", ")", "_",
]  # fmt: skip


def text_folder(folder: Path, **config: Any) -> Path:
    """A BERT of words, as BioBERT and MiniLM are."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder.mkdir(parents=True)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(tokens))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    small = {"vocab_size": len(tokens), "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 64, "max_position_embeddings": 32, "hidden_dropout_prob": 0.0,
             "attention_probs_dropout_prob": 0.0}  # fmt: skip
    torch.manual_seed(3)
    BertModel(BertConfig(**small | config)).save_pretrained(folder)
    return folder


ROOTS = (("GO:0000001", "biological process", "biological_process"),
         ("GO:0000002", "cellular component", "cellular_component"),
         ("GO:0000003", "molecular function", "molecular_function"))  # fmt: skip


def small_ontology() -> tuple[str, list[tuple[str, str, int]]]:
    """An OBO file of three roots with a tree of ten terms each, and (term, aspect, its place) of the leaves."""
    text, leaves, number = "format-version: 1.2\n", [], 10
    for place, (root, name, namespace) in enumerate(ROOTS):
        text += _record(root, name, namespace, "")
        for branch in range(3):
            number += 1
            parent = f"GO:{number:07d}"
            text += _record(parent, f"{WORDS[branch]} {WORDS[4 + place]}", namespace, f"is_a: {root}\n")
            for leaf in range(2):
                number += 1
                term = f"GO:{number:07d}"
                link = f"is_a: {parent}\n" if leaf else f"relationship: part_of {parent}\n"
                text += _record(term, f"{WORDS[branch]} of {WORDS[6 + leaf]} {WORDS[4 + place]}", namespace, link)
                leaves.append((term, ("BPO", "CCO", "MFO")[place], 2 * branch + leaf))
    text += "\n[Term]\nid: GO:0000099\nname: obsolete thing\nnamespace: molecular_function\nis_obsolete: true\n"
    return text, leaves


def _record(term: str, name: str, namespace: str, links: str) -> str:
    definition = f'def: "The {name} of a cell." [GOC:test]\n'
    return f"\n[Term]\nid: {term}\nname: {name}\nnamespace: {namespace}\n{definition}{links}"


def function_folder(folder: Path, num_proteins: int = 60) -> Path:
    """Proteins in which one residue prevails, which decides on the leaves they have; no two are alike."""
    folder.mkdir(parents=True)
    text, leaves = small_ontology()
    (folder / "go-basic.obo").write_text(text)
    random = np.random.default_rng(7)
    fasta, rows = [], ["EntryID\tterm\taspect"]
    for number in range(num_proteins):
        kind = number % 6
        letters = random.choice(list(STANDARD_RESIDUES), 30)
        letters[random.random(30) < 0.5] = STANDARD_RESIDUES[kind]
        fasta.append(f">P{number:05d}\n{''.join(letters)}\n")
        rows += [f"P{number:05d}\t{term}\t{aspect}" for term, aspect, place in leaves if place == kind]
    (folder / "train_sequences.fasta").write_text("".join(fasta))
    (folder / "train_terms.tsv").write_text("\n".join(rows) + "\n")
    return folder


def config_of(folder: Path, output: str = "out", **sections: Any) -> FinetuneConfig:
    """A short run on what :func:`inputs` made in ``folder``."""
    train = {"num_steps": 2, "batch_size": 12, "max_tokens": 120, "log_interval": 1, "eval_interval": 2}
    return FinetuneConfig(
        task="function",
        model=str(folder / "model"),
        text_model=str(folder / "text"),
        data=str(folder / "data"),
        output=str(folder / output),
        head=HeadConfig(**{"hidden_size": 16, "dropout": 0.0} | sections.pop("head", {})),
        tuning=TuningConfig(**{"mode": "frozen"} | sections.pop("tuning", {})),
        optim=OptimConfig(lr=1e-2),
        train=TrainConfig(**train | sections.pop("train", {})),
        function=FunctionConfig(**{"size": 8, "num_terms": 20, "split": SPLIT} | sections.pop("function", {})),
    )


SPLIT = SplitConfig(least_positives=2, valid_proteins=0.2, test_proteins=0.2, unseen_terms=0.2)


def inputs(folder: Path) -> Path:
    """A protein encoder, a text encoder and data."""
    esm_folder(folder / "model", hidden_size=64, token_dropout=False, initializer_range=0.02)
    text_folder(folder / "text")
    function_folder(folder / "data")
    return folder
