"""What the tests of `megaprot preprocess` share: made input, runs, and corpora as letters."""

import random
from pathlib import Path
from typing import Any

from megaprot.pretrain.corpus import Corpus
from megaprot.tools.preprocess import ExcludeConfig, PreprocessConfig, SplitConfig, run

EXAMPLES = Path(__file__).parents[2] / "examples" / "pfam"
CUT = EXAMPLES / "Pfam-A.cut.fasta.gz"
CLANS = EXAMPLES / "Pfam-A.clans.cut.tsv"


def texts(corpus: Corpus) -> list[str]:
    """Return the sequences of a corpus as letters."""
    tokens = corpus.vocabulary.tokens
    return ["".join(tokens[i] for i in corpus.sequence(index)) for index in range(corpus.num_sequences)]


def made_sequences(num_sequences: int, seed: int = 0) -> list[str]:
    choose = random.Random(seed)
    return ["".join(choose.choices("ACDEFGHIKLMNPQRSTVWY", k=choose.randint(5, 40))) for _ in range(num_sequences)]


def write_fasta(path: Path, sequences: list[str], families: list[int] | None = None) -> str:
    """Write sequences s0, s1, ... of the given Pfam families, if any."""
    of = [f" PF{family:05d}.3;x;" for family in families] if families else [""] * len(sequences)
    path.write_text("".join(f">s{index}{of[index]}\n{text}\n" for index, text in enumerate(sequences)))
    return str(path)


def settings(inputs: list[str], output: Path, **values: Any) -> PreprocessConfig:
    """Return settings; keys of a section are given as ``split={...}``."""
    sections = {"split": SplitConfig, "exclude": ExcludeConfig}
    built = {name: sections[name](**value) if name in sections else value for name, value in values.items()}
    return PreprocessConfig(input=inputs, output=str(output), **built)


def preprocess(inputs: list[str], output: Path, **values: Any) -> dict[str, Corpus]:
    """Run and return the corpora by split."""
    run(settings(inputs, output, **values))
    return opened(output)


def opened(folder: Path) -> dict[str, Corpus]:
    return {path.stem: Corpus.open(path.with_suffix("")) for path in folder.glob("*.json")}


def contents(folder: Path) -> dict[str, bytes]:
    """Return {name: bytes} of all files in a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
