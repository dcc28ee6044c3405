"""Embedding proteins: their keys, the vectors, the parts a killed run leaves, and the files that are written."""
