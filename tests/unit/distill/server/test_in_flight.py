"""Concurrent requests: answers come in order, and an error or Ctrl+C leaves no thread behind."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from finetune.system.errors import ConfigError
from tests import logprob_server as faults
from tests.logprob_server import MODEL
from tests.unit.distill.server.conftest import KEY, assert_right, client, document, positions_of


def test_answers_come_in_order_with_several_requests_in_flight(teacher):
    documents = [document(length=8 + i, seed=i) for i in range(9)]
    # The first request is answered after three others: one request at a time would wait for ever.
    teacher.faults.append(faults.after(teacher.answered, times=3))
    found = list(client(teacher).score_many(documents, workers=4))
    assert len(found) == len(documents)
    for tokens, (ids, positions) in zip(found, documents, strict=True):
        assert_right(tokens, teacher, ids, positions)


def test_documents_are_read_no_further_ahead_than_twice_the_workers(teacher):
    taken = []

    def documents():
        for seed in range(20):
            taken.append(seed)
            yield document(seed=seed)

    running = client(teacher).score_many(documents(), workers=2)
    for answered in range(3):
        next(running)
        assert len(taken) == 4 + answered
    running.close()
    join_workers()


def join_workers() -> None:
    """Wait for the client's threads: longer than they need, shorter than their time limits."""
    for thread in threading.enumerate():
        if thread.name == "teacher":
            thread.join(timeout=20)
            assert not thread.is_alive()


@pytest.mark.parametrize("others", ["held", "waiting"])
def test_an_error_cancels_the_other_requests(teacher, others):
    """The others are unanswered requests or waits between attempts, of ten minutes each, with more documents queued."""
    held = threading.Event()
    other = faults.after(held) if others == "held" else faults.status(503)

    def fault(handler, answer):
        if len(positions_of(answer)) == 20:
            assert all(teacher.asked.acquire(timeout=60) for _ in range(4))
            handler.refuse(400, "odd")
        else:
            other(handler, answer)

    teacher.faults.extend([fault] * 8)
    documents = [document(length=20), *[document()] * 7]
    try:
        with pytest.raises(ConfigError, match="odd"):
            list(client(teacher, timeout_seconds=600, backoff_seconds=600).score_many(documents, workers=4))
        join_workers()
    finally:
        held.set()


def test_answers_before_an_error_are_returned(teacher):
    documents = [document(seed=1), document(seed=2), document(length=64), document(seed=3)]
    running = client(teacher).score_many(documents, workers=4)
    for ids, positions in documents[:2]:
        assert_right(next(running), teacher, ids, positions)
    with pytest.raises(ConfigError, match="--max-model-len"):
        next(running)


INTERRUPTED = """
import signal
import sys
import numpy as np

# A shell that starts the tests in the background makes children ignore Ctrl+C.
signal.signal(signal.SIGINT, signal.default_int_handler)
from finetune.distill.server import LogprobServer

def documents():
    for _ in range(16):
        yield np.arange(12), np.arange(11)
    if sys.argv[3] == "elsewhere":
        # Another thread receives it, so it does not wake the waiting thread.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    print("all are in flight", flush=True)

server = LogprobServer(sys.argv[1], sys.argv[2], 8, timeout_seconds=600)
list(server.score_many(documents(), workers=9))
"""


@pytest.fixture(params=["answer", "connection"])
def silent_url(request, teacher) -> Iterator[str]:
    """The URL of a server that never answers, or that never accepts a connection."""
    if request.param == "answer":
        held = threading.Event()
        teacher.faults.extend([faults.after(held)] * 16)
        yield teacher.url
        held.set()
        return
    with contextlib.ExitStack() as sockets:
        listener = sockets.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        # A full queue of connections: the next one waits.
        sockets.enter_context(socket.create_connection(listener.getsockname()))
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("received", ["where it waits", "elsewhere"])
def test_ctrl_c_ends_the_process_while_requests_are_held(received, silent_url, repo_root):
    command = [sys.executable, "-c", INTERRUPTED, silent_url, MODEL, received]
    process = subprocess.Popen(command, cwd=repo_root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "all are in flight\n"
        process.send_signal(signal.SIGINT)
        # Long before the time limit of the requests.
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert errors.count("Traceback") == 1
    assert KEY not in errors
