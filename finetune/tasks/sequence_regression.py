"""A number a protein, from a table of your own."""

from megaprot.finetune.kinds import Regression


class SequenceRegression(Regression):
    """The number in the table's target column."""

    name = folder = "sequence_regression"


TASK = SequenceRegression
