"""Damage every kind of file that is read back, and check that the damage is found before the file is used.

Five kinds of damage: one flipped bit, a cut end, a page of zeros, two swapped blocks, appended bytes. A case ends as

- found: an error of this package names the file;
- repaired: a log line names the file, and the content is that of before, remade or of the checkpoint before;
- harmless: the content is that of before, such as another name of the digest itself;
- missed (other content without a word), unnamed (the file is not named) or crashed (another error): the case is lost.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.system import console
from finetune.system.errors import FinetuneError
from tests.faults import Figures

PAGE, BLOCK = 4096, 512
LOST = ("missed", "unnamed", "crashed")


@dataclass(frozen=True)
class Target:
    """Files of one kind, in a folder, and how this package reads them.

    files: names below the folder that are damaged.
    read: returns the content; what is read again after a repair may be one of `others`, too.
    header_only: the values of its tensors have no digest, so that damage is restricted to the header and the size.
    """

    name: str
    folder: Path
    files: tuple[str, ...]
    read: Callable[[], Any]
    others: tuple[Any, ...] = ()
    header_only: bool = False
    pristine: dict[str, bytes] = field(default_factory=dict)

    def remember(self) -> None:
        """Keep the bytes of all files of the folder."""
        self.pristine.update({str(file.relative_to(self.folder)): file.read_bytes() for file in _files(self.folder)})
        assert set(self.files) <= set(self.pristine), f"{self.name}: {set(self.files) - set(self.pristine)} are missing"

    def restore(self) -> None:
        """Put the folder back to what it was."""
        for file in _files(self.folder):
            if str(file.relative_to(self.folder)) not in self.pristine:
                file.unlink()
        for name, content in self.pristine.items():
            file = self.folder / name
            if not file.is_file() or file.read_bytes() != content:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]


def damaged(content: bytes, rng: random.Random, end: int | None = None) -> tuple[str, bytes]:
    """Return the kind of a random damage, and the changed bytes; those up to `end`, or the size, change."""
    while True:
        kind = rng.choice(("flip", "flip", "cut", "zeros", "swap", "append"))
        changed, limit = bytearray(content), min(len(content), end or len(content))
        if kind == "flip" and limit:
            changed[rng.randrange(limit)] ^= 1 << rng.randrange(8)
        elif kind == "cut" and content:
            del changed[rng.randrange(len(content)) :]
        elif kind == "zeros" and limit:
            start = rng.randrange(0, limit, PAGE)
            stop = min(start + PAGE, limit)
            changed[start:stop] = bytes(stop - start)
        elif kind == "swap" and limit >= 2 * BLOCK:
            first, second = (BLOCK * block for block in rng.sample(range(limit // BLOCK), 2))
            changed[first : first + BLOCK] = content[second : second + BLOCK]
            changed[second : second + BLOCK] = content[first : first + BLOCK]
        elif kind == "append":
            changed += rng.randbytes(rng.randint(1, 64))
        if bytes(changed) != content:
            return kind, bytes(changed)


def digest(content: Any) -> str:
    """Return a hash of decoded content: of tensors, arrays, dataclasses, mappings and plain values."""
    if isinstance(content, torch.Tensor):
        parts = [str(content.dtype), str(list(content.shape)), content.reshape(-1).view(torch.uint8).numpy().tobytes()]
    elif isinstance(content, np.ndarray):
        parts = [str(content.dtype), str(content.shape), np.ascontiguousarray(content).tobytes()]
    elif is_dataclass(content) and not isinstance(content, type):
        parts = [type(content).__name__, digest(asdict(content))]
    elif isinstance(content, Mapping):
        parts = [part for key in sorted(content, key=repr) for part in (repr(key), digest(content[key]))]
    elif isinstance(content, list | tuple | set):
        parts = [digest(part) for part in content]
    else:
        parts = [repr(content)]
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass"))
        whole.update(b"\0")
    return whole.hexdigest()


def attempt(target: Target, name: str, content: bytes, right: frozenset[str]) -> tuple[str, str]:
    """Read a target with one file replaced; return the outcome and what was said."""
    (target.folder / name).write_bytes(content)
    console.log_once.cache_clear()
    try:
        with redirect_stderr(io.StringIO()) as lines:
            found = digest(target.read())
    except FinetuneError as error:
        return ("found" if _named(target, name, str(error)) else "unnamed"), str(error)
    except Exception as error:  # noqa: BLE001 - every other error is a lost case
        return "crashed", f"{type(error).__name__}: {error}"
    finally:
        target.restore()
    said = lines.getvalue()
    if found not in right:
        return ("found" if _named(target, name, said) else "missed"), said
    if _named(target, name, said):
        return "repaired", said
    return ("unnamed" if "corrupt" in said else "harmless"), said


def _named(target: Target, name: str, text: str) -> bool:
    # Of weights whose names differ from those of config.json, the tensor is named instead.
    return Path(name).name in text or (target.header_only and "weights do not match config.json" in text)


def run(seed: int = 0, count: int = 10_000, minutes: float | None = None) -> Figures:
    """Damage random files in turn. minutes: stop early."""
    from tests.faults.damage_targets import build_targets

    outcomes: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    by_target: dict[str, Counter[str]] = {}
    lost: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        targets = build_targets(Path(folder))
        end = None if minutes is None else time.monotonic() + 60 * minutes
        right = {target.name: _right(target) for target in targets}
        for number in range(count):
            if end is not None and time.monotonic() > end:
                break
            rng = random.Random(f"{seed}:{number}")
            target = targets[number % len(targets)]
            name = rng.choice(target.files)
            kind, content = damaged(target.pristine[name], rng, _end(target, name))
            outcome, said = attempt(target, name, content, right[target.name])
            outcomes[outcome] += 1
            kinds[kind] += 1
            by_target.setdefault(target.name, Counter())[outcome] += 1
            if outcome in LOST:
                lost.append({"case": str(number), "target": target.name, "file": name, "kind": kind, "said": said})
    figures: Figures = {"cases": outcomes.total(), **{key: outcomes[key] for key in ("found", "repaired", "harmless")}}
    figures |= {"lost": len(lost), "kinds": dict(kinds), "targets": {key: dict(of) for key, of in by_target.items()}}
    return figures | ({"examples": lost[:20]} if lost else {})


def _right(target: Target) -> frozenset[str]:
    """Return the digests of the content before, and of what may replace it; remember the files."""
    target.remember()
    right = frozenset([digest(target.read()), *map(digest, target.others)])
    target.restore()
    return right


def _end(target: Target, name: str) -> int | None:
    """Return where the part of a file ends that can be checked."""
    if not target.header_only or not name.endswith(".safetensors"):
        return None
    return 8 + int.from_bytes(target.pristine[name][:8], "little")


if __name__ == "__main__":
    print(json.dumps(run(count=500), indent=1))
