"""The two corpora that benchmarks train on: the shipped Pfam domains, and random residues of UniRef-like lengths.

And lengths as those of all of Pfam, for what is planned and started without residues.
"""

from pathlib import Path

import numpy as np
from measure import CUT
from numpy.typing import NDArray

from megaprot.common.sequence_readers import read_fasta
from megaprot.common.vocabulary import get_vocabulary
from megaprot.pretrain.corpus import Corpus, CorpusWriter

ESM = get_vocabulary("esm")
PFAM_SEQUENCES = 34_353_433  # as many as TAPE's Pfam has


def like_uniref(num_sequences: int) -> NDArray[np.int64]:
    """Log-normal lengths of mean 340, as UniRef has them."""
    return np.random.default_rng(0).lognormal(np.log(340) - 0.32, 0.8, num_sequences).astype(np.int64) + 1


def like_pfam(num_sequences: int) -> NDArray[np.int32]:
    """Log-normal lengths of mean 158, as Pfam's domains have them."""
    return np.random.default_rng(0).lognormal(np.log(158) - 0.32, 0.8, num_sequences).astype(np.int32) + 1


def write_corpora(folder: Path) -> dict[str, Corpus]:
    """Write both below ``folder`` as ``NAME/train``, and some of their first sequences as ``NAME/valid``."""
    generator = np.random.default_rng(1)
    pfam = [ESM.encode(sequence.sequence)[0] for sequence in read_fasta(CUT)]
    uniref = [generator.integers(4, 24, length, dtype=np.uint8) for length in like_uniref(20_000)]
    corpora = {}
    for name, sequences in (("pfam", pfam), ("uniref", uniref)):
        (folder / name).mkdir()
        for split, part in (("valid", sequences[:100]), ("train", sequences)):
            writer = CorpusWriter(folder / name / split, ESM)
            for sequence in part:
                writer.add(sequence)
            writer.finish({})
        corpora[name] = Corpus.open(folder / name / "train")
    return corpora
