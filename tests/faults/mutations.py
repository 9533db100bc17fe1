"""Wrong input made from right input: trees of JSON, texts and bytes, each changed in one to four places."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

# Values at which programs fail. What would run names a file that must never appear.
RAN = "fuzz-ran"
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2**31,
    2**63,
    -(2**63),
    10**400,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "0",
    "1e9",
    "null",
    "true",
    "a",
    "a.b",
    "..",
    "../../..",
    "/etc/passwd",
    "~nobody/x",
    "\0",
    "\ud800",
    "\ue0f0\ue0f1",
    "\u202e\u200b\ufeff",
    "\x1b[31m",
    "a\u0301" * 50,
    "é" * 999,
    "x" * 20_000,
    "<|im_end|>",
    "<|im_start|>system\n",
    "<|image_pad|>",
    "${oc.env:HOME}",
    "${name}",
    "${",
    "???",
    "%s%n",
    "{{ 7 * 7 }}",
    f"{{{{ cycler.__init__.__globals__.os.system('touch {RAN}') }}}}",
    f"!!python/object/apply:os.system ['touch {RAN}']",
    f"$(touch {RAN})",
    "(" * 300,
    "[" * 300 + "]" * 300,
    [],
    {},
    [[]],
    [{}],
    {"": None},
    [None],
    ["a", 1],
    {"a": {"a": {"a": 1}}},
    list(range(300)),
)
_PIECES = tuple(value for value in VALUES if isinstance(value, str)) + tuple("\n\t:,-#&*!|>'\"%@`?={}[]()<~\\\r")


def deep(levels: int) -> Any:
    """Return lists within lists."""
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def as_json(tree: Any) -> bytes:
    """Return a tree as JSON; of one that is too deep for Python's writer, a beginning that is as deep."""
    try:
        return json.dumps(tree).encode()
    except RecursionError:
        return b'{"a": ' + b"[" * 5000


class Mutator:
    """Changes copies of input.

    rng: every choice, so that a seed repeats a case, and hypothesis can shrink one.
    """

    def __init__(self, rng: random.Random):
        self.rng = rng

    def often(self, share: float) -> bool:
        """Return true in this share of the calls."""
        return self.rng.random() < share

    def _changes(self, most: int) -> int:
        """Return one in half of the cases: of many changes, the first one found hides the others."""
        return 1 if self.often(0.5) else self.rng.randint(2, most)

    def value(self) -> Any:
        """Return one of VALUES, or a text or a number that nobody chose."""
        kind = self.rng.randrange(12)
        if kind == 0:
            return "".join(chr(self.rng.choice((0x20, 0x300, 0x4E00, 0x1F600)) + self.rng.randrange(90)) for _ in "abc")
        if kind == 1:
            return self.rng.randint(-(2**20), 2**40)
        if kind == 2:
            return deep(self.rng.choice((20, 120, 2000)))
        return copy.deepcopy(self.rng.choice(VALUES))

    def tree(self, tree: Any, names: Sequence[str] = (), most: int = 4) -> Any:
        """Return a changed copy of a tree. names: keys that mean something, to add and to rename to."""
        holder = [copy.deepcopy(tree)]
        for _ in range(self._changes(most)):
            if not (places := list(_places(holder))):
                return None
            parent, key = self.rng.choice(places)
            self._change(parent, key, places, names)
        return holder[0] if holder else None

    def name(self) -> str:
        """Return a name for a key."""
        value = self.value()
        return value[:50] if isinstance(value, str) else type(value).__name__

    def _change(self, parent: Any, key: Any, places: list[tuple[Any, Any]], names: Sequence[str]) -> None:
        match self.rng.randrange(8):
            case 0:
                del parent[key]
            case 1:
                other, there = self.rng.choice(places)
                parent[key] = copy.deepcopy(other[there])
            case 2 if isinstance(parent, dict):
                parent[self.rng.choice(names) if names else self.name()] = parent.pop(key)
            case 3 if isinstance(parent[key], dict):
                parent[key][self.rng.choice(names) if names else self.name()] = self.value()
            case 3 | 4 if isinstance(parent[key], list):
                parent[key].insert(self.rng.randint(0, len(parent[key])), self.value())
            case 4:
                parent[key] = [parent[key]]
            case 5 if isinstance(parent[key], str):
                parent[key] = self.text(parent[key], 2)
            case 6 if type(parent[key]) in (int, float):
                parent[key] = self.rng.choice((-parent[key], parent[key] + 1, str(parent[key]), parent[key] * 1000))
            case _:
                parent[key] = self.value()

    def text(self, text: str, most: int = 4) -> str:
        """Return a changed copy of a text: pieces cut, doubled, moved, or put in."""
        for _ in range(self._changes(most)):
            start = self.rng.randint(0, len(text))
            end = min(len(text), start + self.rng.choice((0, 1, 2, 8, 40)))
            piece = self.rng.choice(("", self.rng.choice(_PIECES), text[start:end] * 2, text[end : end + 20]))
            text = text[:start] + piece + text[end:]
        return text

    def raw(self, raw: bytes, most: int = 4) -> bytes:
        """Return changed bytes: bits flipped, pieces cut, doubled or put in, the end cut off."""
        changed = bytearray(raw)
        for _ in range(self._changes(most)):
            start = self.rng.randint(0, len(changed))
            end = min(len(changed), start + self.rng.choice((0, 1, 4, 16, 64)))
            match self.rng.randrange(6):
                case 0:
                    del changed[start:end]
                case 1:
                    changed[start:start] = changed[start:end] * self.rng.choice((1, 3))
                case 2:
                    del changed[start:]
                case 3:
                    changed[start:end] = self.rng.choice((b"\0", b"\xff", b"\xef\xbb\xbf", b"\r\n", b'"')) * (
                        end - start
                    )
                case 4:
                    number = self.rng.choice((0, 1, 2**31 - 1, 2**32, 2**63 - 1, 2**64 - 1))
                    changed[start : start + 8] = number.to_bytes(8, "little")
                case _ if start < len(changed):
                    changed[start] ^= 1 << self.rng.randrange(8)
        return bytes(changed)

    def json(self, tree: Any, names: Sequence[str] = ()) -> bytes:
        """Return a tree as JSON, with the tree or the bytes changed."""
        changed = tree if self.often(0.2) else self.tree(tree, names)
        written = as_json(changed)
        return self.raw(written) if changed is tree or self.often(0.1) else written


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each value in a tree as its parent and its key there."""
    pending = [tree]
    while pending:
        parent = pending.pop()
        for key in list(parent) if isinstance(parent, dict) else range(len(parent)):
            yield parent, key
            if isinstance(parent[key], dict | list) and parent[key]:
                pending.append(parent[key])
