"""Zero-shot scores of variants and whole proteins: what is read, the model's probabilities, the methods."""
