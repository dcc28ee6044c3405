"""Score mutations without training: masked and wild-type marginals, and the pseudo-perplexity of whole proteins."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megaprot.common.errors import InputError

if TYPE_CHECKING:  # imported when used: `megaprot score --help` does without
    from megaprot.finetune.encoder import Encoder
    from megaprot.tools.scoring.assays import Assay

Row = tuple[str, str, float, float]
"""Identifier, mutations (empty for none), score, measured score (NaN for none)."""


@dataclass
class ScoreConfig:
    """What ``megaprot score`` can be told.

    Attributes:
        model: Hugging Face folder of a masked-language model.
        input: File of wild types (FASTA and other formats), or a ProteinGym table that ends with .csv (columns mutant,
            mutated_sequence, DMS_score).
        output: Tab-separated file for the scores.
        mutations: Mutations of the wild types, one variant a line: A23T or A23T:K40R; or a tab-separated table with the
            columns mutant, identifier and DMS_score. A ProteinGym table has its own.
        method: ``masked_marginal`` (each changed position masked in a copy of its own), ``wild_type_marginal`` (one
            pass) or ``pseudo_perplexity`` (of every sequence; each of its positions masked in turn).
        max_tokens: Tokens of a batch; 0 takes 1,024 on a CPU and 32,768 on a GPU.
        precision: Type of the weights; bf16 on recent GPUs runs flash attention.
    """

    model: str
    input: str
    output: str
    mutations: str = ""
    method: Literal["masked_marginal", "wild_type_marginal", "pseudo_perplexity"] = "masked_marginal"
    max_tokens: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"


CONFIG = ScoreConfig


def run(config: ScoreConfig) -> None:
    """Write the scores and print how many, with Spearman's rho where measured scores are given.

    Raises:
        InputError: Model, input or output cannot be used, or a mutation does not fit its wild type.
    """
    output = Path(config.output)
    if output.exists():
        raise InputError(f"--output {output} exists; remove it or name another.")
    if not output.absolute().parent.is_dir():
        raise InputError(f"--output {output}: its folder does not exist; make it first.")
    assays = _read(config)

    import torch

    from megaprot.finetune.hugging_face import load_encoder

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = load_encoder(Path(config.model), with_head=True, device=device, precision=config.precision)
    encoder.vocabulary.require_per_residue("megaprot score")
    if encoder.vocabulary.mask < 0:
        raise InputError(f"the tokenizer of {config.model} has no mask token; name a masked-language model.")
    is_perplexity = config.method == "pseudo_perplexity"
    rows = _perplexities(encoder, assays, config) if is_perplexity else _marginals(encoder, assays, config)
    _write(output, rows, "pseudo_perplexity" if is_perplexity else "score")
    print(f"{output}: {len(rows):,} scores")
    _print_correlation(rows, is_perplexity)


def _read(config: ScoreConfig) -> list[Assay]:
    """Return what is to be scored; refuse files that do not go with each other or with the method."""
    from megaprot.tools.scoring.assays import add_mutations, read_proteingym, read_wild_types

    path = Path(config.input)
    if not path.exists():
        raise InputError(f"--input {path}: is missing; give wild types or a ProteinGym table.")
    if path.suffix == ".csv":
        if config.mutations:
            raise InputError(f"--mutations: the table {path} has its own mutations; leave --mutations out.")
        return [read_proteingym(path)]
    assays = read_wild_types(path)
    if config.mutations:
        add_mutations(assays, Path(config.mutations))
    elif config.method != "pseudo_perplexity":
        raise InputError(f"--method {config.method} needs --mutations, or a ProteinGym table that ends with .csv.")
    return assays


def _marginals(encoder: Encoder, assays: list[Assay], config: ScoreConfig) -> list[Row]:
    """Return the marginal scores of all variants in their order."""
    from tqdm import tqdm

    from megaprot.tools.scoring.methods import marginal_scores, mutated_positions

    masked = config.method == "masked_marginal"
    rows: list[Row] = []
    with tqdm(total=sum(len(mutated_positions(assay)) for assay in assays), desc="score", disable=None) as progress:
        for assay in assays:
            if not assay.variants:
                continue
            scores = marginal_scores(encoder, assay, masked, config.max_tokens, progress.update)
            for variant, score in zip(assay.variants, scores, strict=True):
                rows.append((assay.identifier, variant.text, score, variant.measured))
    return rows


def _perplexities(encoder: Encoder, assays: list[Assay], config: ScoreConfig) -> list[Row]:
    """Return the pseudo-perplexity of every variant, or of the wild type where there are none."""
    from tqdm import tqdm

    from megaprot.tools.scoring.methods import pseudo_perplexity

    sequences = []
    for assay in assays:
        variants = [(one.text, one.measured, assay.mutated(one)) for one in assay.variants]
        for text, measured, sequence in variants or [("", math.nan, assay.sequence)]:
            sequences.append((assay.identifier, text, measured, sequence))
    rows: list[Row] = []
    with tqdm(total=sum(len(sequence) for *_, sequence in sequences), desc="score", disable=None) as progress:
        for identifier, text, measured, sequence in sequences:
            score = pseudo_perplexity(encoder, sequence, identifier, config.max_tokens, progress.update)
            rows.append((identifier, text, score, measured))
    return rows


def _write(output: Path, rows: list[Row], name: str) -> None:
    """Write the table; columns that no row has a value for are left out."""
    from megaprot.common.files import atomic_write

    has_mutations, has_measured = any(row[1] for row in rows), any(not math.isnan(row[3]) for row in rows)
    header = ["identifier", *(["mutant"] if has_mutations else []), name, *(["DMS_score"] if has_measured else [])]
    lines = ["\t".join(header)]
    for identifier, text, score, measured in rows:
        shown = "" if math.isnan(measured) else repr(measured)
        fields = [identifier, *([text] if has_mutations else []), f"{score:.6f}", *([shown] if has_measured else [])]
        lines.append("\t".join(fields))
    with atomic_write(output) as stream:
        stream.write(("\n".join(lines) + "\n").encode())


def _print_correlation(rows: list[Row], is_perplexity: bool) -> None:
    """Print Spearman's rank correlation of scores and measured scores; a low perplexity counts as a high score."""
    sign = -1 if is_perplexity else 1
    pairs = [(sign * score, measured) for _, _, score, measured in rows if not math.isnan(measured)]
    if not pairs:
        return
    if len({score for score, _ in pairs}) < 2 or len({measured for _, measured in pairs}) < 2:
        print(f"Spearman's rho is not defined: all {len(pairs):,} scores, or all measured ones, are equal")
        return
    from scipy.stats import spearmanr

    rho = spearmanr([score for score, _ in pairs], [measured for _, measured in pairs]).statistic
    what = " of minus the pseudo-perplexity" if is_perplexity else ""
    print(f"Spearman's rho{what} {rho:.4f} over {len(pairs):,} variants with a measured score")
