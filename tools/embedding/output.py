"""The files embeddings are published in: HDF5 as UniProt has them, numpy's .npz, safetensors."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megaprot.common.errors import InputError, RunError
from megaprot.common.files import sync_folder
from megaprot.tools.conversion.safetensors_files import write_file
from megaprot.tools.conversion.tensor_source import TensorInfo
from megaprot.tools.embedding.parts import Entry


def _write_hdf5(
    path: Path, entries: Iterable[Entry], infos: Mapping[str, TensorInfo], settings: Mapping[str, Any]
) -> None:
    """One dataset a protein; ``original_id`` holds the identifier where the key is not it."""
    import h5py

    with h5py.File(path, "w") as file:
        file.attrs.update({name: json.dumps(value) for name, value in settings.items()})
        for entry in entries:
            dataset = file.create_dataset(entry.key, data=entry.vectors.numpy())
            if entry.key != entry.identifier:
                dataset.attrs["original_id"] = entry.identifier


def _write_npz(
    path: Path, entries: Iterable[Entry], infos: Mapping[str, TensorInfo], settings: Mapping[str, Any]
) -> None:
    """One array a protein, written as it comes, which ``numpy.savez`` cannot."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for entry in entries:
            with archive.open(f"{entry.key}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, entry.vectors.numpy(), allow_pickle=False)


def _write_safetensors(
    path: Path, entries: Iterable[Entry], infos: Mapping[str, TensorInfo], settings: Mapping[str, Any]
) -> None:
    """One tensor a protein; the settings are in the header."""
    metadata = {name: json.dumps(value) for name, value in settings.items()}
    write_file(path, ((entry.key, entry.vectors) for entry in entries), infos, metadata)


WRITERS: dict[str, Callable[[Path, Iterable[Entry], Mapping[str, TensorInfo], Mapping[str, Any]], None]] = {
    ".h5": _write_hdf5,
    ".hdf5": _write_hdf5,
    ".npz": _write_npz,
    ".safetensors": _write_safetensors,
}
"""{end of the file's name: how it is written}."""


def check_output(output: Path) -> None:
    """Raise InputError for an output of no known kind, that exists, or whose folder does not."""
    if output.suffix not in WRITERS:
        raise InputError(f"--output {output}: its name must end with one of {', '.join(WRITERS)}.")
    if output.exists():
        raise InputError(f"--output {output} exists; remove it or name another.")
    if not output.absolute().parent.is_dir():
        raise InputError(f"--output {output}: its folder does not exist; make it first.")


def write_output(
    output: Path, entries: Iterable[Entry], infos: Mapping[str, TensorInfo], settings: Mapping[str, Any]
) -> None:
    """Write all vectors; the file appears when it is whole.

    Args:
        output: File with an ending of ``WRITERS``.
        entries: Vectors, in the order of ``infos``.
        infos: Type and shape of each.
        settings: What they were made with, stored beside them (not in .npz, which has no place for it).

    Raises:
        RunError: The disk is full, say; the parts are still there then.
    """
    partial = output.with_name(f".{output.name}.writing")
    try:
        WRITERS[output.suffix](partial, entries, infos, settings)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, output)
        sync_folder(output.absolute().parent)
    except OSError as error:
        raise RunError(f"{output} could not be written ({error}); make room and run the command again.") from None
    finally:
        partial.unlink(missing_ok=True)
