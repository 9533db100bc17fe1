"""The one list of slow tests. `bash launch/test.sh` leaves them out; `.ci/run` and `-m "slow or not slow"` run them."""

from __future__ import annotations

# A test file, a test, or one case of a test -> the fast test that holds the same law in every run of the suite.
SLOW: dict[str, str] = {}


def is_slow(node: str) -> bool:
    """Return whether the list names this test, its file, or this case of it."""
    return any(node == name or node.startswith((f"{name}::", f"{name}[")) for name in SLOW)
