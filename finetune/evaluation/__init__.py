"""Measuring a model: on given answers (perplexity) and on its own (generation)."""
