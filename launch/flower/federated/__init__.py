"""A Flower app: parties train one adapter in rounds, each on its own rows (docs/federated.md)."""

from __future__ import annotations
