"""An adapter into its base: what it changes, the weights a block at a time, and the distance from what was trained."""

from __future__ import annotations
