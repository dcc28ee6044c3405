"""One conversion from end to end: find out what the input is, write the result, compare, publish it whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megaprot.common.errors import InputError, RunError
from megaprot.common.files import folder_written_whole, require_absent_or_empty
from megaprot.common.vocabulary import get_vocabulary
from megaprot.pretrain.config import ParallelConfig
from megaprot.pretrain.engine import PRECISIONS
from megaprot.pretrain.validation import check_model
from megaprot.tools.conversion import plm_interact, tape, verify
from megaprot.tools.conversion.hugging_face_config import architecture_of, read_json
from megaprot.tools.conversion.hugging_face_reader import CONFIG, read_hugging_face
from megaprot.tools.conversion.hugging_face_writer import write_hugging_face
from megaprot.tools.conversion.legacy import legacy_folder_of, read_legacy
from megaprot.tools.conversion.megatron_reader import read_megatron, step_folder_of
from megaprot.tools.conversion.megatron_writer import write_megatron
from megaprot.tools.conversion.model_card import write_card
from megaprot.tools.conversion.names import WORDS
from megaprot.tools.conversion.source_model import SourceModel

if TYPE_CHECKING:
    from megaprot.tools.convert import ConvertConfig


def convert(config: ConvertConfig) -> None:
    """Convert ``config.input`` to the folder ``config.output``, which appears when it is complete.

    Raises:
        InputError: The input is damaged or of no known kind, or cannot become what was asked for.
        RunError: The result could not be written, or ``--verify`` found a difference.
    """
    given, output = Path(config.input), Path(config.output)
    if not given.exists():
        raise InputError(f"--input {given} does not exist; name a folder or file to convert.")
    require_absent_or_empty(output)
    try:
        if (given / CONFIG).is_file() and tape.is_tape(read_json(given / CONFIG)):
            _convert_tape(config, given, output)
            return
        source = _read(config, given)
        check_model(source.model, ParallelConfig())
        if config.vocabulary and get_vocabulary(config.vocabulary) != source.vocabulary:
            raise InputError(f"{given} has the vocabulary {source.vocabulary.name}; leave out --vocabulary.")
        with folder_written_whole(output) as partial:
            lines = _write(config, given, source, partial)
    except OSError as error:
        named = error.filename or output
        raise RunError(f"{named}: {error.strerror}; free the disk or allow access to it, and try again.") from error
    for line in lines:
        print(line)
    print(f"wrote {output}")


def _read(config: ConvertConfig, given: Path) -> SourceModel:
    """Return the model that the input holds, whatever its format."""
    legacy = legacy_folder_of(given) if given.is_dir() else None
    if legacy is not None:
        return read_legacy(legacy, config.legacy_version, config.vocabulary or "proteinlm")
    if config.legacy_version >= 0:
        raise InputError(f"{given} is no Megatron-LM checkpoint; leave out --legacy_version.")
    if given.is_file() or plm_interact.is_folder(given):
        return plm_interact.read_plm_interact(given)
    step = step_folder_of(given)
    if step is not None:
        return read_megatron(step)
    if (given / CONFIG).is_file():
        return read_hugging_face(given, config.vocabulary)
    raise InputError(
        f"--input {given} is no run folder or checkpoint of megaprot pretrain, no Hugging Face folder (config.json) "
        "and no Megatron-LM checkpoint (mp_rank_00/model_optim_rng.pt); name one of those."
    )


def _write(config: ConvertConfig, given: Path, source: SourceModel, folder: Path) -> list[str]:
    """Write the result into ``folder`` and return lines about it for the terminal."""
    saved = source.tensors.infos[WORDS].dtype
    dtype = saved if config.dtype == "as_saved" else PRECISIONS[config.dtype]
    if config.to == "megatron":
        write_megatron(source, folder, dtype)
    else:
        write_hugging_face(source, folder, dtype)
        plm_interact.write_pair_model(source, folder)
    lines = _compare(config, given, source, folder, dtype)
    if config.to == "hf":
        write_card(folder, source, architecture_of(source), config.licence, lines)
    return lines


def _compare(config: ConvertConfig, given: Path, source: SourceModel, folder: Path, dtype: torch.dtype) -> list[str]:
    """Return lines on how source and result differ; what the classes themselves differ in is always measured.

    Raises:
        RunError: ``--verify`` found another difference.
    """
    # MegatronBert has the layers' activation in its LM head too; ProteinBert has erf there.
    is_tanh = source.model.activation == "gelu_tanh"
    heads_differ = is_tanh and source.tanh_head == (config.to == "megatron")
    if not (config.verify or heads_differ):
        return []
    sequences = verify.random_sequences(source.vocabulary, source.num_positions)
    ours = source if config.to == "hf" else read_megatron(folder)
    outputs = verify.run_megatron(ours, dtype, sequences)
    as_theirs = verify.with_tanh_head(ours, dtype, outputs) if is_tanh else outputs
    lines = []
    if config.verify:
        theirs = folder if config.to == "hf" else given
        line = (
            verify.require_equal(as_theirs, verify.run_hugging_face(theirs, dtype, sequences))
            if (theirs / CONFIG).is_file()
            else verify.require_equal(outputs, verify.run_megatron(source, dtype, sequences))
        )
        lines.append(line + (" (with the same GELU in both LM heads)" if heads_differ else ""))
    if heads_differ:
        now, before = ("tanh", "erf") if config.to == "hf" else ("erf", "tanh")
        lines.append(
            f"the LM head had {before} GELU in the source and has {now} in the result, whose class knows no other; on "
            f"random sequences its logits change by at most {verify.difference(outputs.logits, as_theirs.logits)}, the "
            "last hidden states do not."
        )
    return lines


def _convert_tape(config: ConvertConfig, given: Path, output: Path) -> None:
    """Convert TAPE's BERT, which is no ProteinBert."""
    if config.to == "megatron":
        raise InputError(f"{given} is TAPE's BERT, which normalises after each block; it can only become --to hf.")
    if config.verify:
        raise InputError("--verify has no model of TAPE's to run; convert without it.")
    if config.dtype != "as_saved" or config.vocabulary or config.legacy_version >= 0:
        raise InputError("TAPE's weights keep their type and vocabulary; leave out --dtype, --vocabulary and others.")
    with folder_written_whole(output) as partial:
        line = tape.convert_tape(given, partial, config.licence)
    print(line)
    print(f"wrote {output}")
