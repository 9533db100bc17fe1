"""Quantized weights on disk, so that the next start reads them instead of quantizing again.

    $FINETUNE_CACHE/quantized/<fingerprint>/   manifest.json, part-00000.safetensors …
                              digests/         the SHA-256 of weight files that were read (digest.py)

The fingerprint covers all that decides the bits: the original weights' content, the options, the device's kind and the
library. An entry appears by one rename and is checked against its manifest's SHA-256 sums each time it is read, so a
torn, damaged or foreign one is made anew. Nothing that goes wrong here ends a run: it is said, and the run goes on.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from finetune.models.digest import sha256_of
from finetune.system.atomic import write_text
from finetune.system.console import Log

Tensors = Mapping[str, Tensor]

_LAYOUT = 1
_MANIFEST = "manifest.json"
# Small enough to be hashed in parallel, and to be copied off a GPU without mattering.
_PART_BYTES = 64 << 20
# Left free for checkpoints: a cache must not be what fills a disk.
_SPARE_BYTES = 1 << 30
# How long a rank waits for the one that quantizes before it quantizes for itself.
_PATIENCE_SECONDS = 600.0
_ABANDONED_SECONDS = 24 * 3600.0


def cache_folder() -> Path:
    """$FINETUNE_CACHE/quantized, else ~/.cache/finetune/quantized."""
    home = os.environ.get("FINETUNE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "finetune"
    return Path(home).expanduser() / "quantized"


@dataclass(frozen=True)
class QuantizedCache:
    """One entry of the cache, there or not.

    made_from: everything that decides the tensors, as JSON would keep it. say: told, in a line, what went wrong.
    """

    folder: Path
    made_from: dict[str, Any]
    log: Log

    @property
    def entry(self) -> Path:
        """Where the tensors lie, or will."""
        text = json.dumps({"layout": _LAYOUT, **self.made_from}, sort_keys=True)
        return self.folder / hashlib.sha256(text.encode()).hexdigest()[:32]

    def find(self) -> dict[str, Tensor] | None:
        """All tensors, memory-mapped (ranks on one machine share the pages), or None; each byte was checked.

        They stay valid when the entry is removed meanwhile; a write to one does not reach the file.
        """
        if not self.entry.is_dir():
            return None
        try:
            manifest = json.loads((self.entry / _MANIFEST).read_text(encoding="utf-8"))
            parts = manifest["parts"]
            if manifest["made_from"] != self.made_from:
                raise ValueError("its manifest is that of another model")
            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
                sums = threads.map(sha256_of, [self.entry / name for name in parts])
                if damaged := [name for name, found in zip(parts, sums, strict=True) if found != parts[name]]:
                    raise ValueError(f"{damaged[0]} is not what was written")
            tensors = dict(item for name in parts for item in _read_part(self.entry / name))
            os.utime(self.entry)  # when it was last used, for whoever cleans it
        except PermissionError as error:
            self.log(f"quant.cache: {self.entry} cannot be used ({error.strerror}); quantizing again")
            return None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
            self.log(f"quant.cache: {self.entry} is damaged ({error}); quantizing again")
            return None
        return tensors

    @contextmanager
    def claim(self) -> Iterator[bool]:
        """Whether this process is the one to make the entry; if not, another was at it and is done or has failed.

        The system lets go of the lock when its holder is killed, so nobody waits for the dead.
        """
        lock = FileLock(self.folder / f"{self.entry.name}.lock")
        mine = True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                mine = False
                lock.acquire(timeout=_PATIENCE_SECONDS)
                lock.release()
        except Timeout:
            self.log(f"quant.cache: another process has held {lock.lock_file} for long; quantizing without it")
        except (OSError, RuntimeError) as error:
            mine = False
            self.log(f"quant.cache: {self.folder} cannot be locked ({error}); quantizing without it")
        try:
            yield mine
        finally:
            lock.release()

    def write(self, modules: Iterable[Tensors], size_bytes: int) -> None:
        """Keep the tensors of all modules, if the disk takes them; call it inside a `claim` that was granted."""
        temporary = self.entry.with_name(f".{self.entry.name}.{os.getpid()}")
        try:
            self._clean()
            if shutil.disk_usage(self.folder).free < size_bytes + _SPARE_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            temporary.mkdir()
            sums = {}
            for number, part in enumerate(_parts(modules)):
                file = temporary / f"part-{number:05d}.safetensors"
                save_file(part, file)
                sums[file.name] = sha256_of(file)
            write_text(temporary / _MANIFEST, json.dumps({"made_from": self.made_from, "parts": sums}, indent=1))
            os.rename(temporary, self.entry)
        except (OSError, SafetensorError) as error:
            # safetensors wraps the system's error into its own words.
            self.log(
                f"quant.cache: {self.folder} did not take {size_bytes / 1e9:.1f} GB ({error}); going on without: free "
                "some space, set FINETUNE_CACHE to another folder, or set quant.cache=false"
            )
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _clean(self) -> None:
        """Remove what killed writers left: of this entry all, since nobody else writes it; of others what is old."""
        shutil.rmtree(self.entry, ignore_errors=True)
        for left in self.folder.glob(".*.*"):
            try:
                old = time.time() - left.stat().st_mtime > _ABANDONED_SECONDS
            except OSError:
                continue
            if left.name.startswith(f".{self.entry.name}.") or old:
                shutil.rmtree(left, ignore_errors=True)


def _parts(modules: Iterable[Tensors]) -> Iterator[dict[str, Tensor]]:
    """The tensors of whole modules, on the CPU, in dicts of about `_PART_BYTES`."""
    part: dict[str, Tensor] = {}
    size_bytes = 0
    for tensors in modules:
        for name, tensor in tensors.items():
            # Tensors that share memory (a table of all layers) are refused by safetensors.
            part[name] = tensor.cpu().contiguous() if tensor.is_cuda else tensor.clone()
            size_bytes += tensor.nbytes
        if size_bytes >= _PART_BYTES:
            yield part
            part, size_bytes = {}, 0
    if part:
        yield part


def _read_part(file: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118, the handle is no mapping
            yield name, tensors.get_tensor(name)
