"""Check that transformers alone, given a converted run, reproduces the validation loss that Megaprot measured.

Megaprot builds the validation rows, so that tokens and masks are the run's own; the model is transformers' from the
folder, which runs each length's sequences as one ordinary batch.

usage: python examples/check_with_transformers.py RUN CORPUS HUGGING_FACE_FOLDER EVALUATION_JSON
"""

import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForMaskedLM
from transformers.utils import logging

from megaprot.common.errors import MegaprotError
from megaprot.common.quiet import quiet

TOLERANCE = 1e-4
NO_LABEL = -100
MOST_SEQUENCES = 32


def masked_sequences(run: Path, corpus: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the masked tokens and the labels (NO_LABEL where no loss is taken) of each validation sequence."""
    quiet("megatron")
    from megaprot.pretrain import checkpoint
    from megaprot.pretrain.corpus import Corpus
    from megaprot.pretrain.stream import ValidationStream
    from megaprot.pretrain.validation import row_shape_of

    newest = checkpoint.newest_complete(run / "checkpoints")
    if newest is None:
        sys.exit(f"{run} holds no checkpoint")
    shape = row_shape_of(checkpoint.read_config(newest).data, tensor=1, has_fp8=False)
    stream = ValidationStream([Corpus.open(corpus / "valid")], shape)
    for row in map(stream.row, range(stream.num_rows)):
        tokens = torch.from_numpy(row.tokens)
        labels = torch.full_like(tokens, NO_LABEL)
        is_used = row.masked_kind > 0
        labels[row.masked_positions[is_used]] = torch.from_numpy(row.labels[is_used])
        for start, end in itertools.pairwise(row.cu_seqlens[: row.num_sequences + 1].tolist()):
            yield tokens[start:end], labels[start:end]


def mean_loss(folder: Path, sequences: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, int]:
    """Return transformers' mean loss over all labels, and their number."""
    logging.set_verbosity_error()  # it would list the rotary frequencies, which it computes itself, as missing
    logging.disable_progress_bar()
    model = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    by_length = defaultdict(list)
    for tokens, labels in sequences:
        by_length[len(tokens)].append((tokens, labels))
    total, num_labels = 0.0, 0
    for group in by_length.values():
        for start in range(0, len(group), MOST_SEQUENCES):
            tokens, labels = map(torch.stack, zip(*group[start : start + MOST_SEQUENCES], strict=True))
            with torch.inference_mode():
                logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
            total += float(cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
            num_labels += int((labels != NO_LABEL).sum())
    return total / num_labels, num_labels


def main() -> int:
    """Compare and say so; return 1 where the losses differ."""
    run, corpus, folder, evaluation = map(Path, sys.argv[1:5])
    expected = json.loads(evaluation.read_text())
    found, num_labels = mean_loss(folder, masked_sequences(run, corpus))
    difference = abs(found - expected["loss"])
    print(f"validation loss over {num_labels:,} masked residues: {expected['loss']:.6f} by Megaprot, {found:.6f} by "
          f"transformers from {folder}")  # fmt: skip
    if num_labels != expected["masked_positions"] or difference > TOLERANCE:
        print(f"they differ by {difference:.1e}, more than {TOLERANCE:.0e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MegaprotError as error:
        sys.exit(str(error))
