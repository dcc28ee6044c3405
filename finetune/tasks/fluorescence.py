"""Fluorescence of variants of GFP (Sarkisyan et al. 2016), TAPE's split: trained on few mutations, tested on many."""

from megaprot.finetune.kinds import Regression


class Fluorescence(Regression):
    """The logarithm of a variant's fluorescence."""

    name = folder = "fluorescence"
    key = "log_fluorescence"


TASK = Fluorescence
