"""Encode rows in child processes.

The children are plain processes that exchange pickles over pipes, not `multiprocessing`. So no process with a GPU and
threads is forked, and the user's script or notebook is not imported again. A child whose parent died reads the end of
its pipe and exits.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import local
from typing import IO, cast

from finetune.data.sources.readers import RawBatch
from finetune.data.tokens.encode import RowEncoder
from finetune.data.tokens.store import EncodedBatch
from finetune.system.errors import ResourceError

_PARENT = Path(__file__).resolve().parents[3]
_CHILD = f"import sys; sys.path.insert(0, {str(_PARENT)!r}); from finetune.data.tokens.workers import serve; serve()"
# Batches per worker: one in work, one waiting in its pipe.
_AHEAD = 2


def encode_all(encoder: RowEncoder, batches: Iterable[RawBatch], workers: int) -> Iterator[EncodedBatch]:
    """Encode batches in child processes, and yield them in order. Memory: two batches per worker.

    workers: number of processes; 0 encodes in this process.
    Raises: ResourceError if a worker dies.
    """
    if workers == 0:
        yield from map(encoder, batches)
        return
    children: list[_Child] = []
    mine = local()

    def encode(batch: RawBatch) -> EncodedBatch:
        if not hasattr(mine, "child"):
            mine.child = _Child(encoder)
            children.append(mine.child)
        return mine.child(batch)

    with ThreadPoolExecutor(workers, thread_name_prefix="encode") as threads:
        try:
            yield from _in_order(lambda batch: threads.submit(encode, batch), batches, _AHEAD * workers)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            for child in children:
                child.stop()


def _in_order(
    submit: Callable[[RawBatch], Future[EncodedBatch]], batches: Iterable[RawBatch], ahead: int
) -> Iterator[EncodedBatch]:
    pending: deque[Future[EncodedBatch]] = deque()
    for batch in batches:
        pending.append(submit(batch))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


class _Child:
    def __init__(self, encoder: RowEncoder):
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        )
        self._requests = cast(IO[bytes], self._process.stdin)
        self._answers = cast(IO[bytes], self._process.stdout)
        self._send(encoder)

    def __call__(self, batch: RawBatch) -> EncodedBatch:
        try:
            self._send(batch)
            return pickle.load(self._answers)  # noqa: S301 - our own child's answer
        except (EOFError, BrokenPipeError) as error:
            code = self._process.wait()
            raise ResourceError(
                f"a tokenizing process died (exit code {code}); if memory is short, set data.workers=1"
            ) from error

    def _send(self, message: RowEncoder | RawBatch) -> None:
        pickle.dump(message, self._requests, protocol=pickle.HIGHEST_PROTOCOL)
        self._requests.flush()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        with suppress(BrokenPipeError):
            self._requests.close()
        self._answers.close()


def serve(requests: IO[bytes] | None = None, answers: IO[bytes] | None = None) -> None:
    """Run a child: read an encoder, then answer each batch, until the parent closes the pipe."""
    requests = requests or sys.stdin.buffer
    answers = answers or os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), 1)  # keep prints out of the answers
    try:
        encoder: RowEncoder = pickle.load(requests)  # noqa: S301 - from the parent that started this process
        while True:
            pickle.dump(encoder(pickle.load(requests)), answers, protocol=pickle.HIGHEST_PROTOCOL)  # noqa: S301
            answers.flush()
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return
