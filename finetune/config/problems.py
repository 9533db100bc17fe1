"""The problems of a config, collected and reported in one error."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from finetune.system.console import printable
from finetune.system.errors import ConfigError

COMMAND_LINE = "command line"


class Problem(NamedTuple):
    """A key (empty for a whole file), what is wrong with it, and the place, `file:line`, if known."""

    key: str
    text: str
    origin: str = ""


def config_error(config: str, problems: Iterable[Problem], locate: Callable[[str], str]) -> ConfigError:
    """Return one error for all problems; `locate` returns the place of a key, or an empty text."""
    lines = []
    for key, text, origin in dict.fromkeys(problems):
        place = origin or (locate(key) if key else "")
        lines.append(f"{key} ({place}): {text}" if key and place else f"{key or place}: {text}")
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    return ConfigError("\n  ".join(printable(line, one_line=True) for line in [f"{count} in {config}", *lines]))
