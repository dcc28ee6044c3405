"""Small splits that can be learned: labels that follow from the sequence."""

import json
from pathlib import Path

import numpy as np

from tests.finetune.folders import random_proteins

HELIX, STRAND = b"AELMQKRH", b"VIYCWFT"


def secondary_structure(folder: Path, sizes: dict[str, int], longest: int = 40) -> Path:
    """TAPE's layout; residues that like helices are H, those that like strands E, others C."""
    place = folder / "secondary_structure"
    place.mkdir(parents=True)
    for seed, (name, size) in enumerate(sizes.items()):
        lengths = np.random.default_rng(seed).integers(5, longest, size).tolist()
        records = []
        for protein in random_proteins(lengths, seed):
            labels = [0 if letter in HELIX else 1 if letter in STRAND else 2 for letter in protein]
            records.append({"primary": protein.decode(), "ss3": labels})
        (place / f"secondary_structure_{name}.json").write_text(json.dumps(records))
    return folder


def regression_table(path: Path, num_rows: int) -> Path:
    """FLIP's layout; the target is the share of alanine."""
    lines = ["sequence,target,set,validation"]
    for number, protein in enumerate(random_proteins([20] * num_rows, 9)):
        split = ("train,False", "train,True", "test,")[0 if number % 4 < 2 else number % 4 - 1]
        lines.append(f"{protein.decode()},{protein.count(b'A') / 20},{split}")
    path.write_text("\n".join(lines) + "\n")
    return path
