"""A cache of quantized weights on disk: the next start reads them instead of quantizing again.

    $FINETUNE_CACHE/quantized/<fingerprint>/   manifest.json, part-00000.safetensors …
                              digests/         the SHA-256 of weight files that were read (digest.py)

The fingerprint covers everything that determines the bits: the original weights, the options, the device type and the
library version. An entry appears by one rename, and every read checks it against the SHA-256 sums in its manifest. A
corrupt entry is quantized again. No cache error ends a run: it is logged.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from finetune.models.safetensors_index import save_tensors
from finetune.system.accelerator import on_gpu
from finetune.system.atomic import write_text
from finetune.system.console import Log
from finetune.system.format import format_bytes
from finetune.system.locks import locked, try_lock
from finetune.system.manifest import sha256_of
from finetune.system.sealed import seal, unseal

_LAYOUT = 1
_MANIFEST = "manifest.json"
_PART = re.compile(r"part-\d{5}\.safetensors")
# Small enough for parallel hashing and for a copy off a GPU.
_PART_BYTES = 64 << 20
# Left free for checkpoints.
_SPARE_BYTES = 1 << 30
# How long a rank waits for another that quantizes, before it quantizes itself.
_PATIENCE_SECONDS = 600.0
_ABANDONED_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class QuantizedCache:
    """One entry of the cache, which may not exist yet.

    made_from: everything that determines the tensors, as JSON values. log: called with a one-line message if the cache
    cannot be used.
    """

    folder: Path
    made_from: dict[str, Any]
    log: Log

    @property
    def entry(self) -> Path:
        """The folder of the entry."""
        text = json.dumps({"layout": _LAYOUT, **self.made_from}, sort_keys=True)
        return self.folder / hashlib.sha256(text.encode()).hexdigest()[:32]

    def find(self) -> dict[str, dict[str, Tensor]] | None:
        """Return the tensors of each layer, memory-mapped and verified, or None. Ranks on one machine share the pages.

        Keys of a layer: "" for its weight, the others are parts of its scales. The tensors stay valid if the entry is
        removed. A write to a tensor does not change the file.
        """
        if not self.entry.is_dir():
            return None
        try:
            parts = self._parts_listed()
            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
                sums = threads.map(sha256_of, [self.entry / name for name in parts])
                if damaged := [name for name, found in zip(parts, sums, strict=True) if found != parts[name]]:
                    raise ValueError(f"{damaged[0]}: wrong SHA-256")
            layers: dict[str, dict[str, Tensor]] = {}
            for part in parts:
                for name, tensor in load_file(self.entry / part).items():
                    layer, _, key = name.partition(".weight")
                    layers.setdefault(layer, {})[key.removeprefix(".")] = tensor
            os.utime(self.entry)  # last use, for cleaning
        except PermissionError as error:
            self.log(f"quant.cache: {self.entry} cannot be read ({error.strerror}); quantizing again")
            return None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
            self.log(f"quant.cache: {self.entry} is corrupt ({error}); quantizing again")
            return None
        return layers

    def _parts_listed(self) -> dict[str, str]:
        """Return the SHA-256 of each part. Raises: OSError or ValueError if the manifest cannot be used."""
        try:
            manifest = unseal(json.loads((self.entry / _MANIFEST).read_text(encoding="utf-8")))
            parts, made_from = manifest["parts"], manifest["made_from"]
        except (ValueError, LookupError) as error:
            raise ValueError(f"{_MANIFEST}: {error}") from error
        if made_from != self.made_from:
            raise ValueError(f"{_MANIFEST}: of another model")
        if strange := [name for name in parts if not _PART.fullmatch(name)]:
            raise ValueError(f"{_MANIFEST}: {strange[0][:80]!r} is no part of it")
        return parts

    @contextmanager
    def claim(self) -> Iterator[bool]:
        """Yield whether this process should write the entry; if not, another process has finished or failed meanwhile.

        The system releases the lock when its holder is killed.
        """
        file, lock = self.folder / f"{self.entry.name}.lock", None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if (lock := try_lock(file)) is None:
                with locked(file, _PATIENCE_SECONDS) as free:
                    if not free:
                        self.log(f"quant.cache: another process holds {file}; quantizing without the cache")
        except (OSError, RuntimeError) as error:
            self.log(f"quant.cache: {self.folder} cannot be locked ({error}); quantizing without the cache")
        try:
            yield lock is not None
        finally:
            if lock is not None:
                lock.release()

    def write(self, layers: Iterable[Mapping[str, Tensor]], size_bytes: int) -> None:
        """Write the tensors of all layers if the disk has space; call it inside a granted `claim`.

        size_bytes: of all tensors, about.
        """
        temporary = self.entry.with_name(f".{self.entry.name}.{os.getpid()}")
        try:
            self._clean()
            if shutil.disk_usage(self.folder).free < size_bytes + _SPARE_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            temporary.mkdir()
            sums = {}
            for number, part in enumerate(_parts(layers)):
                file = temporary / f"part-{number:05d}.safetensors"
                save_tensors(part, file)
                sums[file.name] = sha256_of(file)
            manifest = seal({"made_from": self.made_from, "parts": sums})
            write_text(temporary / _MANIFEST, json.dumps(manifest, indent=1))
            os.rename(temporary, self.entry)
        except (OSError, SafetensorError) as error:
            self.log(
                f"quant.cache: {self.folder} cannot store {format_bytes(size_bytes)} ({error}); continuing without\n"
                "help: free some space, set FINETUNE_CACHE to another folder, or set quant.cache=false"
            )
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _clean(self) -> None:
        """Remove the leftovers of killed writers: all of this entry, and old ones of others."""
        shutil.rmtree(self.entry, ignore_errors=True)
        for left in self.folder.glob(".*.*"):
            try:
                old = time.time() - left.stat().st_mtime > _ABANDONED_SECONDS
            except OSError:
                continue
            if left.name.startswith(f".{self.entry.name}.") or old:
                shutil.rmtree(left, ignore_errors=True)


def _parts(layers: Iterable[Mapping[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of whole layers on the CPU, in dicts of about `_PART_BYTES`."""
    part: dict[str, Tensor] = {}
    size_bytes = 0
    for tensors in layers:
        for name, tensor in tensors.items():
            # safetensors rejects tensors that share memory (a table of all layers).
            part[name] = tensor.cpu().contiguous() if on_gpu(tensor) else tensor.clone()
            size_bytes += tensor.nbytes
        if size_bytes >= _PART_BYTES:
            yield part
            part, size_bytes = {}, 0
    if part:
        yield part
