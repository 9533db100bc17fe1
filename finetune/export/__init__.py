"""Leaving the house: merged models, and the formats of other programs, each read back before it is kept."""

from __future__ import annotations
