"""``megaprot vocabulary``: train a SentencePiece vocabulary on a sample of sequence files."""

import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

from megaprot.common import sentencepiece_model
from megaprot.common.errors import InputError, RunError
from megaprot.common.files import atomic_write
from megaprot.common.sentencepiece_model import LARGEST_SIZE, SMALLEST_SIZE, SampledSequences
from megaprot.common.sequence_readers import Columns, SequenceFormat, open_sequences
from megaprot.common.vocabulary import MODEL_SUFFIX, get_vocabulary
from megaprot.tools.preprocessing.parts import BadRecords

LETTERS = "iupac"  # the vocabulary whose letter policy sequences go through: its letters are those of the pieces
NUM_MEASURED = 1000  # sequences of the sample whose tokens are counted


@dataclass
class VocabularyConfig:
    """Train a SentencePiece vocabulary (byte-pair encoding), whose tokens are pieces of several residues.

    Args:
        input: Sequence files, plain or compressed; ``-`` is standard input.
        output: The model's file, which must end with ``.model`` and not exist; ``--vocabulary FILE`` then names it.
        format: Format of the input; ``auto`` tells it by content.
        columns: Columns of csv, tsv and parquet files.
        size: Number of tokens, the 5 special ones and the 25 letters among them; ids take one byte up to 256.
        num_sequences: At most this many sequences, drawn at random, are trained on (100,000 take 10 s and 1 GB).
        seed: Another seed draws another sample.
        on_bad_record: ``stop`` ends at the first record that cannot be read; ``skip`` leaves such out and counts them.
    """

    input: list[str]
    output: str
    format: SequenceFormat = "auto"
    columns: Columns = field(default_factory=Columns)
    size: int = 4096
    num_sequences: int = 200_000
    seed: int = 1234
    on_bad_record: Literal["stop", "skip"] = "stop"


CONFIG = VocabularyConfig


def run(config: VocabularyConfig) -> None:
    """Train, write the model and print a line.

    Raises:
        InputError: for wrong settings or input; RunError where the model cannot be written. Neither leaves a file.
    """
    output = Path(config.output)
    _check(config, output)
    bad_records = BadRecords(config.on_bad_record == "stop")
    sample = _sample(config, bad_records)
    for message in bad_records.messages:
        print(f"skipped: {message}", file=sys.stderr)
    model = sentencepiece_model.train(sample.sequences, config.size)
    try:
        with atomic_write(output) as stream:
            stream.write(model)
    except OSError as error:
        raise RunError(f"{output}: cannot be written ({error.strerror}): make room or name another file.") from None
    print(_summary(config, sample, bad_records))


def _check(config: VocabularyConfig, output: Path) -> None:
    """Raise InputError for settings that cannot work, before any file is read."""
    if not config.input:
        raise InputError("input names no file: give at least one sequence file.")
    if output.suffix != MODEL_SUFFIX:
        raise InputError(f"output is {output}: give a name that ends with {MODEL_SUFFIX}, as --vocabulary expects it.")
    if output.exists():
        raise InputError(f"{output}: exists already: remove it or name another output.")
    if not output.absolute().parent.is_dir():
        raise InputError(f"{output}: its folder does not exist: make it first.")
    if not SMALLEST_SIZE <= config.size <= LARGEST_SIZE:
        raise InputError(f"size is {config.size}: give a number from {SMALLEST_SIZE} to {LARGEST_SIZE}.")
    if config.num_sequences < 1:
        raise InputError(f"num_sequences is {config.num_sequences}: give 1 or more.")


def _sample(config: VocabularyConfig, bad_records: BadRecords) -> SampledSequences:
    """Return a sample of the sequences of all files, as the letter policy leaves them."""
    sample = SampledSequences(config.num_sequences, config.seed)
    letters_of = get_vocabulary(LETTERS)
    for path in config.input:
        reader = open_sequences(path, config.format, config.columns, bad_records.report)
        for block in reader.blocks():
            encoded = letters_of.encode_block(block.letters, block.bounds)
            for record, reason in encoded.bad:
                where = reader.where(int(block.lines[record]))
                bad_records.report(f"{where}: record '{block.identifier(record)}' {reason}")
            text = encoded.ids.tobytes().translate(letters_of.letter_table).decode()
            for start, end in pairwise(encoded.bounds.tolist()):
                sample.add(text[start:end])
    if not sample.sequences:
        raise InputError("no input file holds a sequence that can be used: name files with sequences of residues.")
    return sample


def _summary(config: VocabularyConfig, sample: SampledSequences, bad_records: BadRecords) -> str:
    """Return the line that is printed."""
    vocabulary = get_vocabulary(config.output)
    texts = [sequence.encode() for sequence in sample.sequences[:NUM_MEASURED]]
    num_tokens = sum(len(vocabulary.encode(text)[0]) for text in texts)
    return (
        f"{config.output}: {vocabulary.size:,} tokens from {len(sample.sequences):,} of {sample.num_seen:,} sequences, "
        f"{sum(map(len, texts)) / num_tokens:.2f} residues a token"
        + (f"; skipped: {bad_records.num_skipped:,} bad records" if bad_records.num_skipped else "")
    )
