"""Match module patterns from a config with full module names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase


def matches(pattern: str, name: str) -> bool:
    """Return whether a short name (`down_proj`, `layers.0`), glob or regex on full names matches `name`."""
    if f".{pattern}." in f".{name}." or fnmatchcase(name, pattern):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False


def ends_with(name: str, suffix: str) -> bool:
    """Return whether `suffix` is `name` or its last parts, which is PEFT's rule for lists of names."""
    return name == suffix or name.endswith(f".{suffix}")


def matches_key(pattern: str, name: str) -> bool:
    """Match PEFT's keys of rank_pattern and alpha_pattern: a regex on the last parts of a name."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def close_names(wanted: str, names: Iterable[str]) -> str:
    """Return `did you mean q_proj?`, or the available names."""
    full = sorted(names)
    short = sorted({name.rpartition(".")[2] for name in full})
    close = difflib.get_close_matches(wanted, [*short, *full], n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(short)}"
