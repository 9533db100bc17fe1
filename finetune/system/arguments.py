"""The one grammar of the command line: `finetune <command> [config=X.yaml] [key=value …] [--flags]`."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from finetune.system.errors import InputError

_OVERRIDE = re.compile(r"(\+{0,2}[\w./@:-]+=.*|~[\w./@:-]+(=.*)?)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Arguments:
    """What follows a command. overrides: the `key=value` words in their order, without config=. paths: the other words,
    of a command that takes some.
    """

    config: str | None
    overrides: tuple[str, ...]
    flags: frozenset[str]
    paths: tuple[str, ...] = ()

    def split(self, names: Collection[str]) -> tuple[dict[str, str], list[str]]:
        """The command's own words by name, the last of each; and the other overrides in their order."""
        own, others = {}, []
        for word in self.overrides:
            key, _, value = word.partition("=")
            if key in names:
                own[key] = value
            else:
                others.append(word)
        return own, others


def parse_arguments(words: Sequence[str], flags: Collection[str], takes_paths: bool = False) -> Arguments:
    """The words after a command; flags are those that the command knows, `--help` besides. takes_paths: whether words
    without a `=`, and those that name a folder, are paths.

    Raises: InputError naming every word that does not fit.
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
        wrong.append(f"config= is given {len(configs)} times: {', '.join(configs)}; keep one")
    if wrong:
        raise InputError(wrong[0] if len(wrong) == 1 else "\n  ".join(["the command line has errors:", *wrong]))
    return Arguments(configs[0] if configs else None, tuple(overrides), frozenset(found), tuple(paths))


def nearest(word: str, known: Collection[str]) -> str:
    """`; did you mean X?` for the known word that is closest, empty when none is close."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _flag_advice(word: str, known: Collection[str]) -> str:
    bare = word.lstrip("-")
    if "=" in bare:
        return f"{word}: settings have no dashes, write {bare}"
    if close := nearest(word, known):
        return f"{word}: unknown flag{close}"
    if bare == "config":
        return f"{word}: settings have no dashes, write config=FILE"
    return f"{word}: unknown flag; this command has {', '.join(sorted(known))}"
