"""Stability of designed proteins and their mutants (Rocklin et al. 2017), TAPE's split."""

from megaprot.finetune.kinds import Regression


class Stability(Regression):
    """The stability score: how much more protease a protein withstands than its unfolded state would."""

    name = folder = "stability"
    key = "stability_score"


TASK = Stability
