"""What is wrong with a config, gathered until everything is known, then told at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from finetune.system.errors import ConfigError

COMMAND_LINE = "command line"


class Problem(NamedTuple):
    """A key (`train.max_steps`, empty for a file as such), what is wrong, and where that was written, if known."""

    key: str
    text: str
    origin: str = ""


def config_error(config: str, problems: Iterable[Problem], locate: Callable[[str], str]) -> ConfigError:
    """One error for all problems of a config; `locate` tells where a key was written, empty for nowhere."""
    lines = [_line(key, text, origin or (locate(key) if key else "")) for key, text, origin in dict.fromkeys(problems)]
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    return ConfigError("\n  ".join([printable(f"{count} in {config}"), *map(printable, lines)]))


def _line(key: str, text: str, origin: str) -> str:
    return f"{key} ({origin}): {text}" if key and origin else f"{key or origin}: {text}"


def printable(text: str) -> str:
    """No terminal escapes and no half characters from someone's file."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
