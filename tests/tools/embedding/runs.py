"""The command ``megaprot embed`` in this process, and a plain transformers loop to compare with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from megaprot.tools import cli
from tests.finetune.folders import hidden_alone


def write_fasta(path: Path, proteins: Mapping[str, str | bytes]) -> Path:
    texts = {name: text if isinstance(text, str) else text.decode() for name, text in proteins.items()}
    path.write_text("".join(f">{name} a protein\n{text}\n" for name, text in texts.items()))
    return path


def embed(model: Path, source: Path, output: Path, *more: str) -> int:
    return cli.main(["embed", "--model", str(model), "--input", str(source), "--output", str(output), *more])


def refused(capsys: pytest.CaptureFixture[str], model: Path, source: Path, output: Path, *more: str) -> str:
    """What the command says in refusing its input: one sentence, exit status 2 and nothing written."""
    before = sorted(output.absolute().parent.iterdir()) if output.parent.is_dir() else []
    capsys.readouterr()
    assert embed(model, source, output, *more) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, said
    assert (sorted(output.parent.iterdir()) if output.parent.is_dir() else []) == before
    return said[0]


def read_hdf5(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path) as file:
        return {key: np.array(dataset) for key, dataset in file.items()}


def expected_means(
    folder: Path, proteins: Mapping[str, bytes], layer: int = -1, **options: Any
) -> dict[str, np.ndarray]:
    """The mean over residues of each protein by itself; boundary tokens are the first and the last."""
    found = {}
    for name, protein in proteins.items():
        states = hidden_alone(folder, protein.decode(), **options)[layer]
        found[name] = states[1:-1].mean(dim=0).numpy()
    return found


def assert_close(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], tolerance: float = 1e-5) -> None:
    assert list(found) == sorted(expected) or list(found) == list(expected)
    for key, vectors in expected.items():
        assert found[key].shape == vectors.shape
        assert np.abs(found[key].astype(np.float64) - vectors).max() < tolerance, key


def windowed(folder: Path, protein: bytes, bounds: Sequence[tuple[int, int]], end_tokens: int = 1) -> torch.Tensor:
    """Vectors of a protein's residues [num_residues, hidden_size], each the mean over the windows that hold it."""
    spaces = "bert" in folder.name
    rows: list[list[torch.Tensor]] = [[] for _ in protein]
    for start, end in bounds:
        states = hidden_alone(folder, protein[start:end].decode(), spaces)[-1][1 : 1 + end - start]
        for place, vector in enumerate(states, start=start):
            rows[place].append(vector)
    return torch.stack([torch.stack(row).mean(dim=0) for row in rows])
