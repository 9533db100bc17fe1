"""Tokenize a source once, and find it again by a fingerprint of everything that decides its tokens."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from finetune.config.schema import DataConfig, SourceConfig
from finetune.data.formats.detection import with_formats
from finetune.data.formats.parser import RowParser
from finetune.data.formats.rules import RowRules
from finetune.data.media.processor import MediaProcessor
from finetune.data.sources.paths import resolve_source
from finetune.data.sources.readers import RawBatch
from finetune.data.template.chat import ChatTemplate
from finetune.data.tokens.encode import ENCODING_VERSION, RowEncoder, encode_all
from finetune.data.tokens.store import StoreWriter, TokenStore, has_outdated_bad_rows, is_valid
from finetune.system.console import Log, Pace
from finetune.system.errors import FinetuneError, ResourceError, os_errors_as
from finetune.system.locks import locked
from finetune.system.resources import cache_home

# Smaller sources are encoded by this process before others can start.
_WORTH_WORKERS_BYTES = 8_000_000
# Rows with media name files, which take far longer to read than the rows.
_WORTH_WORKERS_WITH_MEDIA_BYTES = 100_000
_ROWS_WITH_MEDIA = 64  # of a batch
_FULL = "free space, or set data.cache to a folder on another disk"
# How long other ranks wait for a store on which no process works.
_PATIENCE_SECONDS = 60.0
# What differs between the tokens of objectives; those of two pairs are the same for all that compare pairs.
_OF_OBJECTIVE = {
    "none": {},
    "reward": {"objective": "reward"},
    "answers": {"preference": "answers"},
    "kto": {"preference": "kto"},
}
# Called with a source's name, its bytes done, all its bytes, and its rows done.
Progress = Callable[[str, int, int, int], None]


@dataclass(frozen=True)
class Preparation:
    """Turns the rows of a config into tokens.

    main: this process fills the cache; the others wait for it.
    objective: what the run learns from its rows, as `RunConfig.row_objective`, or how it is scored on them, as
        `RunConfig.scored_rows`.
    media: reads the media of rows; None for a model that reads text only.
    """

    cfg: DataConfig
    chat: ChatTemplate
    main: bool = True
    progress: Progress = lambda name, done_bytes, total_bytes, rows: None
    objective: str = "none"
    media: MediaProcessor | None = None

    def encoder(self, source: SourceConfig) -> RowEncoder:
        """Build the encoder of a source's rows."""
        parser = RowParser(source, system=self.cfg.system, rules=RowRules.of(self.cfg))
        return RowEncoder(parser, self.chat, self.cfg.train_on, self.objective, self.media)

    def batches(self, source: SourceConfig) -> Iterator[RawBatch]:
        """Read the rows of a source with the formats of their files. Raises: DataError as `with_formats`."""
        batches = resolve_source(source).batches(source.limit)
        return with_formats(source, batches, objective=self.objective)

    def store(self, source: SourceConfig) -> TokenStore:
        """Return the source's tokens, from the cache if they are there. Bad rows are listed in the store.

        Raises: DataError if the source cannot be read.
        """
        files = resolve_source(source)
        made_from = {**self.made_from(source), "rows": files.digest()}
        cache = Path(self.cfg.cache).expanduser() if self.cfg.cache else cache_home("tokens")
        folder = cache / fingerprint(made_from)

        def write(temporary: Path) -> None:
            self.write(temporary, source, self.batches(source), made_from)

        # Where bad rows are skipped, the store stays: a run that continues needs the same rows.
        if self.main and self.cfg.on_bad_row == "error" and has_outdated_bad_rows(folder):
            with locked(folder.with_name(f"{folder.name}.lock")):
                shutil.rmtree(folder, ignore_errors=True)
        self.provide(folder, write)
        with suppress(PermissionError):  # another user's cache
            os.utime(folder)  # the time of last use, for cleaning
        return TokenStore(folder)

    def made_from(self, source: SourceConfig) -> dict[str, Any]:
        """Return everything except the rows that decides the tokens, by name."""
        return {
            "version": ENCODING_VERSION,
            "tokenizers": tokenizers.__version__,
            "tokenizer": self.chat.digest(),
            "template": self.chat.template,
            "train_on": self.cfg.train_on,
            "system": self.cfg.system,
            **source.model_dump(include={"format", "columns", "roles", "limit"}),
            # Rows that older versions read keep their tokens, and so their cache.
            **RowRules.of(self.cfg).changed(),
            **_OF_OBJECTIVE.get(self.objective, {"preference": "pairs"}),
            **({} if self.media is None else {"media": self.media.settings()}),
        }

    def provide(self, folder: Path, write: Callable[[Path], None]) -> None:
        """Make sure that `folder` holds a complete store: the main process writes it, the others wait.

        write: writes the store into a temporary folder, which is then renamed to `folder`.
        """
        lock = folder.with_name(f"{folder.name}.lock")
        idle_since = time.monotonic()
        while not self.main and not is_valid(folder):
            if time.monotonic() - idle_since > _PATIENCE_SECONDS:
                raise ResourceError(f"the main rank did not finish {folder}; see its error")
            time.sleep(0.2)
            folder.parent.mkdir(parents=True, exist_ok=True)
            with locked(lock, 0) as free:
                if not free:
                    idle_since = time.monotonic()
        if not self.main or is_valid(folder):
            return
        with os_errors_as(FinetuneError, f"data.cache: {folder}: cannot be written", _FULL):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with locked(lock):
                if not is_valid(folder):
                    _replace(folder, write)

    def write(self, folder: Path, source: SourceConfig, batches: Iterable[RawBatch], made_from: dict[str, Any]) -> None:
        """Encode batches of a source, with their formats, into a new store in `folder`."""
        files = resolve_source(source)
        writer = StoreWriter(folder)
        rows = 0
        worth = _WORTH_WORKERS_BYTES
        if self.media is not None:
            worth = _WORTH_WORKERS_WITH_MEDIA_BYTES
            batches = (piece for batch in batches for piece in batch.pieces(_ROWS_WITH_MEDIA))
        small = self.cfg.workers is None and files.size_bytes < worth
        workers = 0 if small else self.cfg.workers or len(os.sched_getaffinity(0))
        for batch in encode_all(self.encoder(source), batches, workers):
            writer.append(batch)
            rows += len(batch.rows) + len(batch.bad)
            # The end of a compressed file is read before its last rows are encoded.
            self.progress(files.name, min(batch.bytes_read, files.size_bytes - 1), files.size_bytes, rows)
        self.progress(files.name, files.size_bytes, files.size_bytes, rows)  # also if a limit stops earlier
        writer.finish(made_from)


def _replace(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder and rename it, under the lock of `folder`."""
    # Nobody else writes under the lock: these folders are left from a killed process.
    for leftover in (folder, *folder.parent.glob(f".{folder.name}.*")):
        if leftover.is_dir():
            shutil.rmtree(leftover)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        write(temporary)
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def fingerprint(made_from: Mapping[str, Any]) -> str:
    """Return a folder name for everything that a store is made from."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:32]


def console_progress(log: Log) -> Progress:
    """Show one updated line on a terminal; elsewhere log a line every 10 seconds."""
    started, pace = time.monotonic(), Pace()

    def progress(name: str, done_bytes: int, total_bytes: int, rows: int) -> None:
        speed = rows / max(time.monotonic() - started, 1e-9)
        share = done_bytes / total_bytes if total_bytes else 1.0
        text = f"tokenizing {name}: {share:4.0%}, {rows:,} rows, {speed:,.0f} rows/s"
        if sys.stderr.isatty():
            print(f"\r{text}", end="\n" if share >= 1 else "", file=sys.stderr, flush=True)
        elif pace.is_due():
            log(text)

    return progress
