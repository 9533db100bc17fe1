"""The gap table: what quantising took from a model, what training gave it, and what merging keeps of that."""
