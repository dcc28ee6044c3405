"""Turn proteins into vectors with a Hugging Face encoder, and store them under their accessions."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megaprot.common.errors import InputError
from megaprot.common.sequence_readers import Columns, SequenceFormat

if TYPE_CHECKING:  # imported when used: `megaprot embed --help` does without
    from megaprot.finetune.encoder import Encoder
    from megaprot.tools.embedding.parts import Parts
    from megaprot.tools.embedding.proteins import Census, Proteins


@dataclass
class EmbedConfig:
    """What ``megaprot embed`` can be told.

    Attributes:
        model: Hugging Face folder: of ``megaprot convert``, ESM-2, ProtBert, ...
        input: File of sequences: FASTA, Stockholm, tables and more, plain or compressed.
        output: File that ends with .h5, .hdf5, .npz or .safetensors.
        per_residue: Store a vector a residue instead of their mean.
        layer: Layers to take: 0 is what enters the first, n what leaves the n-th, -1 the last with its final norm.
            Several are stored as one array, layer by layer.
        dtype: Type of the stored numbers.
        max_length: Residues kept of each protein; 0 keeps all of every protein.
        max_tokens: Tokens of a batch; 0 takes 1,024 on a CPU and 32,768 on a GPU.
        precision: Type of the weights; bf16 on recent GPUs runs flash attention.
        format: Format of the input; auto tells it by its content.
        columns: Which columns of a table are read.
        on_bad_record: ``stop`` at the first record that cannot be used, or ``skip`` such and count them.
    """

    model: str
    input: str
    output: str
    per_residue: bool = False
    layer: list[int] = field(default_factory=lambda: [-1])
    dtype: Literal["fp32", "fp16"] = "fp32"
    max_length: int = 0
    max_tokens: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    format: SequenceFormat = "auto"
    columns: Columns = field(default_factory=Columns)
    on_bad_record: Literal["stop", "skip"] = "stop"


CONFIG = EmbedConfig


def run(config: EmbedConfig) -> None:
    """Embed as ``config`` says; under ``torchrun`` on all processes, which share the output's folder.

    Raises:
        InputError: Model, input or output cannot be used.
        RunError: A vector is not finite, or the disk is full.
    """
    from megaprot.finetune.hugging_face import load_encoder
    from megaprot.tools.embedding.output import check_output
    from megaprot.tools.embedding.parts import Parts
    from megaprot.tools.embedding.proteins import Proteins

    output = Path(config.output)
    check_output(output)
    if config.max_length < 0 or config.max_tokens < 0:
        raise InputError("--max_length and --max_tokens are 0 or more.")
    with _processes() as (rank, world_size, barrier):
        encoder = load_encoder(Path(config.model), device=_device(), precision=config.precision)
        _check_layers(config.layer, encoder.num_layers)
        if config.per_residue:
            encoder.vocabulary.require_per_residue("--per_residue")
        skip_bad = config.on_bad_record == "skip"
        proteins = Proteins(
            config.input, config.format, config.columns, encoder.vocabulary, config.max_length, skip_bad
        )
        census = proteins.check(encoder.longest)
        parts = Parts(output, rank)
        settings = _settings(config, census.sha256) if rank == 0 else {}
        if rank == 0:
            parts.begin(settings)
            print("\n".join(_described(encoder, census)), file=sys.stderr)
        barrier()
        _embed_missing(encoder, proteins, census, config, parts, (rank, world_size))
        barrier()
        if rank == 0:
            _publish(parts, census, settings, output)


def _embed_missing(
    encoder: Encoder, proteins: Proteins, census: Census, config: EmbedConfig, parts: Parts, place: tuple[int, int]
) -> None:
    """Embed what falls to this process and is in no part yet."""
    import torch
    from tqdm import tqdm

    from megaprot.tools.embedding.parts import Entry
    from megaprot.tools.embedding.vectors import VectorSettings, embed

    rank, world_size = place
    done = parts.places()
    mine = (one for one in proteins if one.number % world_size == rank and one.key not in done)
    dtype = torch.float16 if config.dtype == "fp16" else torch.float32
    settings = VectorSettings(config.layer, config.per_residue, dtype, config.max_tokens)
    if rank == 0 and done:
        print(f"{len(done):,} of {len(census.keys):,} proteins were embedded before; going on", file=sys.stderr)
    total = census.num_residues // world_size if not done else None
    hidden = None if rank == 0 else True
    with tqdm(total=total, desc="embed", unit="res", unit_scale=True, disable=hidden) as progress:
        for protein, vectors in embed(encoder, mine, settings, progress.update):
            parts.add(Entry(protein.key, protein.identifier, vectors))
    parts.flush()


def _publish(parts: Parts, census: Census, settings: dict[str, Any], output: Path) -> None:
    """Make the output of all parts, remove them and print what was written."""
    from megaprot.tools.embedding.output import write_output

    entries = parts.entries(census.keys)
    write_output(output, entries, parts.infos(census.keys), settings)
    parts.remove()
    print(f"{output}: {len(census.keys):,} proteins, {census.num_residues:,} residues")


def _settings(config: EmbedConfig, input_sha256: str) -> dict[str, Any]:
    """Return what the vectors depend on: a run goes on only where it is the same."""
    from megaprot.finetune.hugging_face import fingerprint

    model = {"model": Path(config.model).resolve().name, "model_sha256": fingerprint(Path(config.model))}
    model["input_sha256"] = input_sha256
    names = ("per_residue", "layer", "dtype", "max_length", "precision")
    return model | {name: getattr(config, name) for name in names}


def _described(encoder: Encoder, census: Census) -> list[str]:
    """Return the lines a run begins with."""
    padded = "in padded batches (its class in this transformers has no attention interface)"
    how = "padding-free" if encoder.is_padding_free else padded
    size = f"{len(census.keys):,} proteins, {census.num_residues:,} residues"
    lines = [f"{size}; the model runs {how} on {encoder.device}"]
    if census.num_cut:
        lines.append(f"proteins cut, as --max_length says: {census.num_cut:,}")
    if census.num_windowed:
        how = "read in windows that share a quarter and averaged by residue"
        lines.append(f"proteins longer than the model's {encoder.longest:,} residues, {how}: {census.num_windowed:,}")
    return lines + census.lines()


def _check_layers(layers: list[int], num_layers: int) -> None:
    if not layers:
        raise InputError("--layer names no layer; give -1 for the last.")
    for layer in layers:
        if not -num_layers - 1 <= layer <= num_layers:
            raise InputError(f"--layer {layer}: the model has {num_layers} layers; give 0 to {num_layers}, or -1.")


def _device() -> Any:
    """Return this process's GPU, or the CPU where there is none."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def _processes() -> Iterator[tuple[int, int, Any]]:
    """Join the processes of ``torchrun``; give rank, their number and a barrier. Alone, nothing is joined."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield 0, 1, lambda: None
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))  # a barrier waits for the slowest
    try:
        yield dist.get_rank(), world_size, dist.barrier
    finally:
        dist.destroy_process_group()
