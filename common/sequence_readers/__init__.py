"""Streaming readers of sequence files of all formats people have: records one by one, or columns of many at once."""

from megaprot.common.sequence_readers.block import SequenceBlock
from megaprot.common.sequence_readers.fasta import FastaReader, read_fasta
from megaprot.common.sequence_readers.formats import SequenceFormat, open_sequences
from megaprot.common.sequence_readers.reader import SequenceReader
from megaprot.common.sequence_readers.record import Record, stop_at_bad_record
from megaprot.common.sequence_readers.source import GZIP_MAGIC
from megaprot.common.sequence_readers.tables import Columns

__all__ = [
    "GZIP_MAGIC",
    "Columns",
    "FastaReader",
    "Record",
    "SequenceBlock",
    "SequenceFormat",
    "SequenceReader",
    "open_sequences",
    "read_fasta",
    "stop_at_bad_record",
]
