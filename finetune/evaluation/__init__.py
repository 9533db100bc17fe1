"""Evaluation of a model: scores on held-out rows, generated answers, and the gap table."""
