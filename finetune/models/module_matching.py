"""Matching what a user calls a module with its full name in the model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase


def matches(pattern: str, name: str) -> bool:
    """Whether a name (`down_proj`, `layers.0`, `mlp`), a glob or a regex on full names means the module `name`."""
    if f".{pattern}." in f".{name}." or fnmatchcase(name, pattern):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False


def ends_with(name: str, suffix: str) -> bool:
    """Whether `suffix` is `name` or its last parts; PEFT's rule for lists of names."""
    return name == suffix or name.endswith(f".{suffix}")


def matches_key(pattern: str, name: str) -> bool:
    """PEFT's rule for the keys of rank_pattern and alpha_pattern: a regex on the last parts of a name."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def close_names(wanted: str, names: Iterable[str]) -> str:
    """`did you mean q_proj?`, or what there is to choose from."""
    full = sorted(names)
    short = sorted({name.rpartition(".")[2] for name in full})
    close = difflib.get_close_matches(wanted, [*short, *full], n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(short)}"
