"""A class a protein, from a table of your own."""

from megaprot.finetune.kinds import Classification


class SequenceClassification(Classification):
    """The name of the class in the table's target column; the training split's names are the classes."""

    name = folder = "sequence_classification"


TASK = SequenceClassification
