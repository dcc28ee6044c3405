"""The steps of ``megaprot preprocess``: units of input, parts written by workers, and their merge into corpora."""
