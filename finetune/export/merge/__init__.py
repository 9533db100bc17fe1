"""Merge adapters into their base."""

from __future__ import annotations
