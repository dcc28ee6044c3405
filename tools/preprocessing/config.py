"""The settings of ``megaprot preprocess``."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from megaprot.common.sequence_readers import Columns, SequenceFormat


@dataclass
class SplitConfig:
    """How sequences are divided.

    Args:
        by: What is kept together: ``random`` the sequence itself (so that exact duplicates never straddle two splits),
            ``family`` its Pfam family, ``clan`` its Pfam clan (its family where that has no clan), ``cluster`` its
            cluster.
        valid: Fraction of the keys (not of the sequences) for validation; 0 writes no such split.
        test: Fraction of the keys for the test split; 0 writes no such split unless something is held out.
        hold_out: What goes to the test split whatever ``by`` says: Pfam families (PF00067), clans (CL0001), ``tape``
            (TAPE's hold-out clans and families), or files of such accessions or of sequence identifiers, one a line.
        clans: Pfam-A.clans.tsv, plain or gzip-compressed; needed by ``clan`` and by clans held out.
        clusters: MMseqs2's table, ``cluster<TAB>member`` identifiers, plain or gzip-compressed: the corpora get a table
            of clusters for cluster sampling.
        seed: Another seed gives another division.
    """

    by: Literal["random", "family", "clan", "cluster"] = "random"
    valid: float = 0.05
    test: float = 0.0
    hold_out: list[str] = field(default_factory=list)
    clans: str = ""
    clusters: str = ""
    seed: int = 1234


@dataclass
class ExcludeConfig:
    """Sequences that must not enter a corpus, nor nearly the same ones, such as the proteins of a test set.

    Args:
        files: Sequence files of any format that can be read; none excludes nothing.
        identity: Least identity to an excluded sequence, of the shorter one to its best place in the longer one.
        method: How candidates are found: ``kmer`` (built in), ``mmseqs`` (the program) or ``auto``.
    """

    files: list[str] = field(default_factory=list)
    identity: float = 0.9
    method: Literal["auto", "kmer", "mmseqs"] = "auto"


@dataclass
class PreprocessConfig:
    """Turn sequence files into corpora, or look at such.

    Args:
        input: Sequence files, plain or compressed; ``-`` is standard input. Pfam-A headers give each its family.
        output: Folder for the corpora; must be absent or empty, and appears when complete.
        format: Format of the input; ``auto`` tells it by content.
        columns: Columns of csv, tsv and parquet files.
        vocabulary: ``esm`` (ESM-2), ``iupac`` (TAPE), ``proteinlm``, or a SentencePiece model (a file ``*.model``).
        split: How sequences are divided into training, validation and test.
        deduplicate: Keep the first of exactly equal sequences only.
        exclude: Sequences that must not enter a corpus.
        append: Folder of corpora that the new ones begin with; it stays as it is.
        on_bad_record: ``stop`` ends at the first record that cannot be read; ``skip`` leaves such out and counts them.
        workers: Processes that read; the result does not depend on it.
        shard: ``i/n``, i from 0: read every n-th part of the input only, into a folder inside ``output``.
        merge: Join the shards in ``output`` to the corpora.
        inspect: Folder of corpora to describe; nothing is written.
        verify: Folder of corpora to read whole and compare with its checksums; nothing is written.
    """

    input: list[str] = field(default_factory=list)
    output: str = ""
    format: SequenceFormat = "auto"
    columns: Columns = field(default_factory=Columns)
    vocabulary: str = "esm"
    split: SplitConfig = field(default_factory=SplitConfig)
    deduplicate: bool = False
    exclude: ExcludeConfig = field(default_factory=ExcludeConfig)
    append: str = ""
    on_bad_record: Literal["stop", "skip"] = "stop"
    workers: int = 1
    shard: str = ""
    merge: bool = False
    inspect: str = ""
    verify: str = ""

    def content_settings(self) -> dict[str, Any]:
        """Return the settings that the content of the corpora depends on, which shards must share."""
        others = {"output", "workers", "shard", "merge", "inspect", "verify"}
        return {key: value for key, value in asdict(self).items() if key not in others}
