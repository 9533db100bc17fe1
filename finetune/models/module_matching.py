"""Match module patterns from a config with full module names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatchcase

from finetune.config.schema import LoraConfig


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
    close = difflib.get_close_matches(wanted, dict.fromkeys([*short, *full]), n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(short)}"


def targeted(targets: list[str] | str, names: Iterable[str]) -> dict[str, list[str]]:
    """Return the full names that each item of a list of targets matches, or that one regex matches."""
    if isinstance(targets, str):
        return {targets: [name for name in names if re.fullmatch(targets, name)]}
    return {wanted: [name for name in names if ends_with(name, wanted)] for wanted in targets}


def absent_modules(cfg: LoraConfig, names: Collection[str], linears: Iterable[str], layers: int) -> Iterator[str]:
    """Yield an error for each name in `lora` that the model does not have.

    Args:
        names: full names of all modules. linears: of the linear layers, for advice.
        layers: number of layers.
    """
    targets = [] if cfg.target_modules == "all-linear" else cfg.target_modules
    for wanted, found in targeted(targets, names).items():
        if not found:
            yield f"lora.target_modules: {wanted!r} matches no module; {close_names(wanted, linears)}"
    if absent := [number for number in cfg.layers_to_transform or [] if number >= layers]:
        yield f"lora.layers_to_transform: the model has layers 0 to {layers - 1}, found {absent}"
    for wanted in cfg.modules_to_save:
        if not any(ends_with(name, wanted) for name in names):
            yield f"lora.modules_to_save: {wanted!r} matches no module; {close_names(wanted, names)}"
