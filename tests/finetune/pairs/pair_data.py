"""Small splits of pairs that can be learned: acidic proteins bind basic ones."""

from pathlib import Path

import numpy as np

ACIDIC, BASIC = b"DEGSA", b"KRGSA"


def charged_proteins(num_proteins: int, seed: int = 0, longest: int = 30) -> dict[str, bytes]:
    """Proteins ``A0``, ``A1``, ... of acidic and ``B0``, ``B1``, ... of basic residues."""
    generator = np.random.default_rng(seed)
    found = {}
    for number in range(num_proteins):
        for name, letters in (("A", ACIDIC), ("B", BASIC)):
            length = int(generator.integers(8, longest))
            found[f"{name}{number}"] = generator.choice(np.frombuffer(letters, np.uint8), length).tobytes()
    return found


def pair_folder(folder: Path, sizes: dict[str, int], num_proteins: int = 12, longest: int = 30) -> Path:
    """``train.tsv`` and others with ``sequences.fasta``; half of the pairs bind: one acidic and one basic protein."""
    folder.mkdir(parents=True)
    proteins = charged_proteins(num_proteins, longest=longest)
    (folder / "sequences.fasta").write_text("".join(f">{name} x\n{text.decode()}\n" for name, text in proteins.items()))
    for seed, (split, size) in enumerate(sizes.items()):
        generator = np.random.default_rng([7, seed])
        lines = []
        for number in range(size):
            one, other = generator.choice(num_proteins, 2, replace=False)
            kinds = ("AB", "BA", "AA", "BB")[int(generator.integers(2)) + 2 * (number % 2)]
            lines.append(f"{kinds[0]}{one}\t{kinds[1]}{other}\t{1 - number % 2}\n")
        (folder / f"{split}.tsv").write_text("".join(lines))
    return folder
