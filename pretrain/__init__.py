"""Sequences in, Megatron checkpoint out: data stream, model, engine, one training loop, recipes."""
