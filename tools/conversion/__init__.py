"""Checkpoints between Megatron and Hugging Face: readers give tensors by ProteinBert's names, writers take them."""
