"""Protein function from text: the Gene Ontology, its annotations, splits, sampling, metrics and baselines."""
