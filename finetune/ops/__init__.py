"""Numerical kernels behind the model: what runs inside a forward pass."""
