"""Settings of the task ``function``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class FunctionConfig:
    """Text tower, fusion and sampling.

    Attributes:
        text_model: Hugging Face folder of the text encoder.
    """

    text_model: str = ""
