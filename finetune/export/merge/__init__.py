"""Merge adapters into their base."""
