"""Merged models, and the formats of other programs; each export is read back before it is kept."""
