"""Stream sources while training: each window of rows is tokenized, packed and shuffled by itself.

A step is a pure function of (seed, step): windows follow the order of the files, which the seed shuffles, and the
sequences of a window depend on its rows only. The number of steps of each window is saved beside it, so that a resumed
run finds its window. Without these notes, all windows are made again from the start.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import count, takewhile
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np

from finetune.config.schema import SourceConfig
from finetune.data.documents import Document, Documents, cut_to_length
from finetune.data.formats.detection import with_formats
from finetune.data.loader import check_bad_rows
from finetune.data.packing import MapSampler, SequenceOrder
from finetune.data.sources.paths import SourceFiles, resolve_source
from finetune.data.sources.readers import RawBatch
from finetune.data.tokens.prepare import Preparation, fingerprint
from finetune.data.tokens.store import BAD_ROWS, TokenStore
from finetune.system.atomic import write_text
from finetune.system.console import log_once
from finetune.system.errors import ConfigError, DataError
from finetune.system.sealed import seal, unseal


@dataclass
class _Tape:
    """A source's rows as an endless tape: repeated passes over its files, each in another order."""

    source: SourceConfig
    files: SourceFiles
    seed: int
    position: int = 0  # rows read so far
    _batches: Iterator[RawBatch] | None = None
    _rest: RawBatch | None = None

    def take(self, start: int, rows: int) -> Iterator[RawBatch]:
        """Yield rows [start, start + rows) of the tape."""
        if start < self.position or self._batches is None:
            self.position, self._batches, self._rest = 0, self._all(), None
        while self.position < start + rows:
            ahead = start - self.position
            piece, rest = (self._rest or next(self._batches)).split(ahead if ahead > 0 else ahead + rows)
            self._rest = rest if rest.items else None
            self.position += len(piece.items)
            if ahead <= 0:
                yield piece

    def _all(self) -> Iterator[RawBatch]:
        usual = next(with_formats(self.source, self.files.batches(1000))).format
        for turn in count():
            order = np.random.default_rng([self.seed, turn]).permutation(len(self.files.files))
            files, labels = (tuple(names[i] for i in order) for names in (self.files.files, self.files.labels))
            batches = replace(self.files, files=files, labels=labels).batches(self.source.limit)
            yield from with_formats(self.source, batches, usual)


class StreamingSampler:
    """Samples from the training sources, `data.stream_rows` rows at a time.

    The next window is tokenized while the current one is used. `folder` holds the tokens of the last two windows and
    belongs to one run.
    """

    def __init__(self, preparation: Preparation, batch_size: int, seed: int, folder: Path):
        self.preparation = replace(preparation, progress=lambda *_: None)
        self.cfg, self.batch_size, self.seed = preparation.cfg, batch_size, seed
        self._tapes = [_Tape(source, resolve_source(source), seed) for source in self.cfg.train]
        total, rows = sum(source.weight for source in self.cfg.train), self.cfg.stream_rows or 0
        self._rows = [max(1, round(rows * source.weight / total)) for source in self.cfg.train]  # of a window
        # Names and sizes of the files: hashing a large source would cost what streaming saves.
        sizes: list[list[Any]] = []
        for files in (tape.files for tape in self._tapes):
            pairs = zip(files.labels, files.files, strict=True)
            sizes.append([[label, file.stat().st_size] for label, file in pairs] + [files.split] * bool(files.split))
        self._made_from = [
            {**preparation.made_from(source), "rows": rows} for source, rows in zip(self.cfg.train, sizes, strict=True)
        ]
        self.digest = fingerprint(
            {
                "sources": self._made_from,
                "seed": seed,
                "batch_size": batch_size,
                "weights": [source.weight for source in self.cfg.train],
                **self.cfg.model_dump(include={"stream_rows", "max_length", "truncation", "packing"}),
            }
        )
        self.folder = folder / self.digest
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="stream")
        self._closed = Event()
        self._coming: tuple[int, Future[None]] | None = None
        self._open: tuple[int, MapSampler] | None = None

    def step_batches(self, step: int) -> list[list[Document]]:
        """Return the packed sequences of a step (from 0), of all ranks."""
        window = 0
        while step >= (steps := self._steps(window)):
            step -= steps
            window += 1
        sampler = self._sampler(window)
        sequences = sampler.order.epoch(window)[step * self.batch_size : (step + 1) * self.batch_size]
        return [[sampler.documents[i] for i in sequence] for sequence in sequences]

    def lengths(self, step: int) -> None:
        """Return None: rows that are not read yet have no length."""

    def largest(self, step: int) -> list[list[Document]]:
        return self.step_batches(step)

    def steps_for(self, epochs: float) -> int:
        """Raise ConfigError: the number of rows of a stream is unknown."""
        raise ConfigError("data.stream_rows needs train.max_steps: the number of rows of a stream is unknown")

    def close(self) -> None:
        """Stop tokenizing ahead, even within a window."""
        self._closed.set()
        self._ahead.shutdown(cancel_futures=True)

    def _steps(self, window: int) -> int:
        """The steps of a window, saved for every window of this run."""
        note = self.folder / f"window-{window}.json"
        if note.is_file():
            try:
                return int(unseal(json.loads(note.read_text(encoding="utf-8")))["steps"])
            except (ValueError, LookupError, TypeError) as error:
                log_once(f"data.stream_rows: {note} is corrupt ({error}); computing it again")
        sequences = self._sampler(window).order.epoch(window)
        steps = math.ceil(len(sequences) / self.batch_size)
        if self.preparation.main:
            write_text(note, json.dumps(seal({"steps": steps})))
        return steps

    def _sampler(self, window: int) -> MapSampler:
        if self._open is None or self._open[0] != window:
            self._open = (window, self._open_window(window))
            if self.preparation.main:
                for old in self.folder.glob("window-*/"):
                    if int(old.name.split("-")[1]) < window - 1:
                        shutil.rmtree(old)
                self._coming = (window + 1, self._ahead.submit(self._make, window + 1))
        return self._open[1]

    def _open_window(self, window: int) -> MapSampler:
        if self._coming is not None:
            coming, made = self._coming
            wait([made])  # the tapes serve one window at a time
            if coming == window:
                made.result()
        self._make(window)
        stores = [TokenStore(folder) for folder in self._folders(window)]
        for i, store in enumerate(stores):
            check_bad_rows(store, self.cfg)
            if store.meta.bad_rows and self.preparation.main:  # the window's folder will be deleted
                shutil.copyfile(store.bad_rows, self.folder / f"window-{window}-source-{i}-{BAD_ROWS}")
        documents = Documents.join(cut_to_length(s, np.arange(len(s)), self.cfg).documents for s in stores)
        if not len(documents):
            raise DataError(f"window {window} of the stream has no usable row; see data.max_length")
        capacity = self.cfg.max_length if self.cfg.packing else None
        weights = np.ones(len(documents))
        return MapSampler(documents, SequenceOrder(documents.lengths, weights, capacity, self.batch_size, self.seed))

    def _make(self, window: int) -> None:
        """Make the stores of a window that are missing; only the main process writes."""
        for i, (folder, rows) in enumerate(zip(self._folders(window), self._rows, strict=True)):
            self.preparation.provide(folder, lambda temporary, i=i, rows=rows: self._write(temporary, i, window, rows))

    def _write(self, folder: Path, i: int, window: int, rows: int) -> None:
        source, tape = self.cfg.train[i], self._tapes[i]
        batches = takewhile(lambda batch: not self._closed.is_set(), tape.take(window * rows, rows))
        self.preparation.write(folder, source, batches, {**self._made_from[i], "window": window})
        if self._closed.is_set():
            raise CancelledError(f"window {window} is not needed anymore")

    def _folders(self, window: int) -> list[Path]:
        return [self.folder / f"window-{window}" / f"source-{i}" for i in range(len(self._tapes))]
