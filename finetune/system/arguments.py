"""The grammar of the command line: `finetune <command> [config=X.yaml] [key=value …] [--flags]`."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.system.errors import InputError

_OVERRIDE = re.compile(r"(\+{0,2}[\w./@:-]+=.*|~[\w./@:-]+(=.*)?)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Arguments:
    """The words after a command.

    Attributes:
        config: file of config=, if given.
        overrides: the `key=value` words of a run's config, in their order.
        flags: words such as `--json`.
        paths: words without `=`, of a command that takes paths.
        words: every word as typed.
        options: the command's own options, read into their schema.
    """

    config: str | None
    overrides: tuple[str, ...]
    flags: frozenset[str]
    paths: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    options: Any = None


def parse_arguments(words: Sequence[str], flags: Collection[str], takes_paths: bool = False) -> Arguments:
    """Sort the words after a command.

    Args:
        flags: the flags of the command; `--help` is always known.
        takes_paths: take words without `=`, and names of folders, as paths.

    Raises:
        InputError: lists every word that does not fit.
    """
    known = {*flags, "--help"}
    wrong, overrides, configs, paths, found = [], [], [], [], set()
    for word in words:
        word = "--help" if word == "-h" else word
        if word in known:
            found.add(word)
        elif word.startswith("-"):
            wrong.append(_flag_advice(word, known))
        elif takes_paths and ("=" not in word or os.path.isdir(word)):
            paths.append(word)
        elif word.startswith("config="):
            configs.append(word.removeprefix("config="))
        elif _OVERRIDE.fullmatch(word):
            overrides.append(word)
        elif word.endswith((".yaml", ".yml")):
            wrong.append(f"{word}: write config={word}")
        else:
            wrong.append(f"{word}: expected key=value")
    if len(configs) > 1:
        wrong.append(f"config: expected one, found {', '.join(configs)}")
    if wrong:
        raise InputError(
            wrong[0] if len(wrong) == 1 else "\n  ".join([f"{len(wrong)} problems in the command line", *wrong])
        )
    return Arguments(configs[0] if configs else None, tuple(overrides), frozenset(found), tuple(paths), tuple(words))


def nearest(word: str, known: Collection[str]) -> str:
    """Return `; did you mean X?` for the nearest known word, or an empty text."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _flag_advice(word: str, known: Collection[str]) -> str:
    bare = word.lstrip("-")
    if "=" in bare:
        return f"{word}: a setting has no dashes; write {bare}"
    if close := nearest(word, known):
        return f"{word}: unknown flag{close}"
    if bare == "config":
        return f"{word}: a setting has no dashes; write config=FILE"
    return f"{word}: unknown flag; this command has {', '.join(sorted(known))}"
