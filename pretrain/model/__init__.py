"""ProteinBert on megatron-core: embedding, packed attention, head, specification, initial weights."""
