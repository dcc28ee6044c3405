"""Convert checkpoints: Megatron's, Hugging Face's and older ones, one tensor at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megaprot.common.quiet import quiet


@dataclass
class ConvertConfig:
    """What ``megaprot convert`` can be told.

    Attributes:
        input: What to convert: a run folder (its newest complete checkpoint is taken), one ``step_...`` folder, a
            Hugging Face folder, a folder of Megatron-LM or ProteinLM (``mp_rank_00/model_optim_rng.pt``, or one above
            it), TAPE's ``bert-base``, or a file of PLM-interact's weights.
        output: Folder to write; must not exist.
        to: ``hf``: a folder that transformers loads; ``megatron``: a checkpoint that ``megaprot pretrain
            --run.initial_checkpoint`` starts from.
        dtype: Data type of the weights written.
        verify: Run random sequences through source and result, print the largest difference, and write nothing where it
            is above 1e-4 of the largest output; needs transformers and memory for both models.
        vocabulary: Vocabulary of a source that does not say it: ``esm``, ``iupac``, ``proteinlm`` or a SentencePiece
            model, a file ``*.model``.
        licence: Licence of the weights for the model card, such as ``cc-by-4.0``.
        legacy_version: ``checkpoint_version`` of a Megatron-LM checkpoint that does not say it: 0, 1.0, 2.0 or 3.0; -1
            is none given.
    """

    input: str
    output: str
    to: Literal["hf", "megatron"]
    dtype: Literal["as_saved", "fp32", "bf16", "fp16"] = "as_saved"
    verify: bool = False
    vocabulary: str = ""
    licence: str = "unknown"
    legacy_version: float = -1.0


CONFIG = ConvertConfig


def run(config: ConvertConfig) -> None:
    """Convert as ``config`` says; nothing is left where it fails.

    Raises:
        InputError: The input is damaged or of no known kind, or cannot become what was asked for.
        RunError: The result could not be written, or ``--verify`` found a difference.
    """
    quiet("megatron")
    quiet("torch.distributed")
    from megaprot.tools.conversion.conversion import convert

    convert(config)
