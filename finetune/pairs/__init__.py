"""Pairs of proteins: files, what a model reads of them, heads, metrics, baselines, and predictions for proteomes."""
