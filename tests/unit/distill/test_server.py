"""The client of a teacher that is served: the right numbers, every failure by its name, no key anywhere."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate

import numpy as np
import pytest

from finetune.distill.server import LogprobServer, TopTokens
from finetune.errors import ConfigError, FinetuneError
from tests import logprob_server as faults
from tests.logprob_server import MODEL, LogprobTeacher

KEY = "sk-tests-0123456789"
TOP = 8


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch) -> Iterator[LogprobTeacher]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with LogprobTeacher() as running:
        yield running


def client(teacher: LogprobTeacher, **settings) -> LogprobServer:
    options = {"timeout_seconds": 30.0, "attempts": 3, "backoff_seconds": 0.001} | settings
    return LogprobServer(
        options.pop("url", teacher.url), options.pop("model", MODEL), options.pop("top", TOP), **options
    )


def document(length: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """ids [T] int32 and some of the positions that have a token after them."""
    rng = np.random.default_rng(seed)
    positions = np.sort(rng.choice(length - 1, size=length // 2, replace=False))
    return rng.integers(50, size=length).astype(np.int32), positions


def assert_right(found: TopTokens, teacher: LogprobTeacher, ids: np.ndarray, positions: np.ndarray, top: int = TOP):
    expected_nV = teacher.table_VV[ids[positions]]
    order = np.argsort(-expected_nV, axis=1)[:, :top]
    assert found.ids.dtype == np.int64
    assert found.log_probs.dtype == np.float32
    np.testing.assert_array_equal(found.ids, order)
    # Decimal text and back is exact in float64; one rounding to float32 is left.
    np.testing.assert_array_equal(found.log_probs, np.take_along_axis(expected_nV, order, axis=1).astype(np.float32))


@pytest.mark.parametrize("top", [1, TOP, 20])
def test_log_probabilities_are_those_of_the_token_after_each_position(teacher, top):
    ids, positions = document()
    assert_right(client(teacher, top=top).score(ids, positions), teacher, ids, positions, top)


def test_what_is_asked_is_ids_and_no_text(teacher):
    ids, positions = document()
    client(teacher).score(ids, positions)
    [(path, headers, question)] = teacher.seen
    assert path == "/v1/completions"
    assert question == {
        "model": MODEL, "prompt": ids.tolist(), "max_tokens": 1, "temperature": 0, "prompt_logprobs": TOP,
    }  # fmt: skip
    assert headers["Authorization"] == f"Bearer {KEY}"


def test_no_key_in_the_environment_is_none_on_the_wire(teacher, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    client(teacher).score(*document())
    assert "Authorization" not in teacher.seen[0][1]


def test_a_document_without_positions_asks_nothing(teacher):
    found = client(teacher).score(document()[0], np.array([], dtype=np.int64))
    assert found.ids.shape == found.log_probs.shape == (0, TOP)
    assert teacher.seen == []


@pytest.mark.parametrize("positions", [[11], [-1]])
def test_a_position_without_a_token_after_it_is_refused(teacher, positions):
    with pytest.raises(ValueError, match="of a document of 12 tokens"):
        client(teacher).score(document()[0], np.array(positions))


def test_answers_come_in_order_with_several_requests_in_flight(teacher):
    documents = [document(length=8 + i, seed=i) for i in range(9)]
    # The request that comes first is answered after three others: one at a time would wait for ever.
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


PASSING = {
    "dropped": (faults.drop, "connection failed (RemoteDisconnected"),
    "no HTTP": (faults.other_protocol, "connection failed (BadStatusLine: SSH-2.0-server)"),
    "torn": (faults.torn, "torn or no JSON"),
    "no JSON": (faults.raw(b"<html>busy</html>"), "torn or no JSON"),
    "no text": (faults.raw(b"\xff\xfe\x00"), "torn or no JSON"),
    "nested": (faults.raw(b"[" * 100_000), "torn or no JSON"),
    **{
        str(code): (faults.status(code, "engine \x1b[31mdead"), f"HTTP {code}: engine ␛[31mdead")
        for code in range(500, 505)
    },
    "429": (faults.status(429, "busy"), "HTTP 429: busy"),
}


@pytest.mark.parametrize(("fault", "reason"), PASSING.values(), ids=PASSING)
def test_a_passing_failure_is_asked_again_and_said(teacher, fault, reason):
    ids, positions = document()
    teacher.faults.extend([fault, fault])
    said: list[str] = []
    assert_right(client(teacher, say=said.append).score(ids, positions), teacher, ids, positions)
    assert len(teacher.seen) == 3
    assert len(said) == 2
    assert all(reason in line and teacher.url in line and KEY not in line for line in said)
    assert "attempt 2 of 3" in said[0]
    assert "attempt 3 of 3" in said[1]


@pytest.mark.parametrize(("fault", "reason"), PASSING.values(), ids=PASSING)
def test_after_the_last_attempt_the_message_says_where_why_and_that_nothing_is_lost(teacher, fault, reason):
    teacher.faults.extend([fault] * 3)
    with pytest.raises(FinetuneError) as caught:
        client(teacher).score(*document())
    message = str(caught.value)
    assert not isinstance(caught.value, ConfigError)
    assert "3 attempts" in message and reason in message and teacher.url in message
    assert "goes on where this stopped" in message
    assert len(teacher.seen) == 3


@pytest.mark.parametrize("slow", [faults.after, faults.dripping], ids=["silent", "dripping"])
def test_an_answer_over_the_time_limit_is_asked_for_again(teacher, slow):
    ids, positions = document()
    end = threading.Event()
    teacher.faults.append(slow(end))
    said: list[str] = []
    try:
        found = client(teacher, timeout_seconds=0.5, say=said.append).score(ids, positions)
    finally:
        end.set()
    assert_right(found, teacher, ids, positions)
    assert ["no answer within 0.5 s" in line for line in said] == [True]


@pytest.mark.parametrize("told", ["seconds", "date"])
def test_a_wait_that_the_server_asks_for_is_kept(teacher, told):
    before = time.monotonic()
    # A date has whole seconds: two from now are at least one.
    value = "1" if told == "seconds" else formatdate(time.time() + 2, usegmt=True)
    teacher.faults.append(faults.status(429, "busy", Retry_After=value))
    client(teacher).score(*document())
    # The two clocks may drift apart by far less than a hundredth.
    assert time.monotonic() - before >= 0.99


def test_a_server_that_is_not_there_is_named():
    with LogprobTeacher() as gone:
        pass
    with pytest.raises(FinetuneError, match=r"3 attempts.*ConnectionRefusedError"):
        client(gone).check()


# The document of the wrong answers: token 7, the least probable one after it, follows token 1 at position 4.
IDS = np.array([3, 4, 5, 6, 1, 7, 8, 9, 2, 3, 4, 5], dtype=np.int32)


def positions_of(answer: dict) -> list:
    return answer["choices"][0]["prompt_logprobs"]


def entry(answer: dict) -> dict:
    """What is said about the token after position 4: its own first, then the others from the most probable on."""
    return positions_of(answer)[5]


def first(answer: dict) -> dict:
    return list(entry(answer).values())[1]


def set_all(answer: dict, log_prob: float | None) -> None:
    for said in entry(answer).values():
        said["logprob"] = log_prob


def to_logits(answer: dict) -> None:
    for said in entry(answer).values():
        said["logprob"] += 5


def repeat_first(answer: dict) -> None:
    _, most, second, *_ = entry(answer)
    entry(answer)["0" + most] = entry(answer).pop(second)


def shift(answer: dict) -> None:
    positions_of(answer).append(positions_of(answer).pop(5))


WRONG = {
    "too short": (lambda a: positions_of(a).pop(), "11 positions for a prompt of 12 tokens"),
    "too long": (lambda a: positions_of(a).append({}), "13 positions for a prompt of 12 tokens"),
    "other tokens": (shift, "nothing about token 7 at position 5"),
    "own token missing": (lambda a: entry(a).pop("7"), "nothing about token 7 at position 5"),
    "nothing at a position": (lambda a: positions_of(a).__setitem__(5, None), "nothing about token 7 at position 5"),
    "nan": (lambda a: first(a).update(logprob=float("nan")), "no number: nan"),
    "nan beyond the top": (lambda a: entry(a)["7"].update(logprob=float("nan")), "no number: nan"),
    "text": (lambda a: first(a).update(logprob="-0.5"), "no number: '-0.5'"),
    "true": (lambda a: first(a).update(logprob=True), "no number: True"),
    "null in the top": (lambda a: set_all(a, None), "not finite"),
    "infinite": (lambda a: first(a).update(logprob=float("inf")), "not finite"),
    "beyond float64": (lambda a: first(a).update(logprob=10**400), "not finite"),
    "beyond float32": (lambda a: set_all(a, -1e39), "not finite"),
    "logits": (to_logits, "sum to"),
    "too few": (
        lambda a: [entry(a).pop(token) for token in list(entry(a))[1:3]],
        "7 tokens at a position, asked for 8",
    ),
    "text for an id": (lambda a: entry(a).update({"Hello": entry(a)["7"]}), "no id: 'Hello'"),
    "negative id": (lambda a: entry(a).update({"-3": entry(a)["7"]}), "no id: '-3'"),
    "digits of another script": (lambda a: entry(a).update({"٣": entry(a)["7"]}), "no id"),
    "beyond every vocabulary": (lambda a: entry(a).update({"4294967296": entry(a)["7"]}), "no id"),
    "an id twice": (repeat_first, "a token twice"),
}


def make_least_probable(teacher: LogprobTeacher) -> None:
    row_V = teacher.table_VV[1]
    least = int(row_V.argmin())
    row_V[[7, least]] = row_V[[least, 7]]


@pytest.mark.parametrize(("edit", "reason"), WRONG.values(), ids=WRONG)
def test_an_answer_that_cannot_be_right_is_refused_at_once(teacher, edit, reason):
    make_least_probable(teacher)
    teacher.faults.append(faults.edited(edit))
    with pytest.raises(FinetuneError, match=reason) as caught:
        client(teacher).score(IDS, np.array([2, 4]))
    assert not isinstance(caught.value, ConfigError)
    assert teacher.url in str(caught.value)
    assert len(teacher.seen) == 1


@pytest.mark.parametrize("log_prob", [None, -9999.0, float("-inf")])
def test_a_token_of_no_probability_beyond_the_top_is_no_fault(teacher, log_prob):
    """What vLLM's versions say about -inf: null, -9999, or Python's own spelling of it."""
    make_least_probable(teacher)
    teacher.faults.append(faults.edited(lambda answer: entry(answer)["7"].update(logprob=log_prob)))
    positions = np.array([2, 4])
    assert_right(client(teacher).score(IDS, positions), teacher, IDS, positions)


def test_a_larger_answer_than_there_can_be_is_not_read_on(teacher):
    teacher.faults.append(faults.raw(b" " * 10_000_000))
    with pytest.raises(FinetuneError, match="larger than the 4,304,896 bytes"):
        client(teacher).score(*document())


REFUSED = {
    "400": (faults.status(400, "odd"), "HTTP 400: odd; see the server's log"),
    "401": (faults.status(401, "who?"), "HTTP 401: who[?]; set OPENAI_API_KEY to the server's key"),
    "403": (faults.status(403, "no"), "HTTP 403: no; set OPENAI_API_KEY to a key that may use this model"),
    "404": (faults.status(404, "no"), "HTTP 404: no; distill.teacher.url is the API's root"),
    "422": (
        faults.status(422, "unknown field prompt_logprobs"),
        "HTTP 422: .*must be one that returns prompt_logprobs",
    ),
    "redirect": (
        faults.redirect("http://127.0.0.1:9/v1/completions"),
        "redirect [(]HTTP 307[)], which is not followed",
    ),
    "without": (faults.edited(lambda a: a["choices"][0].pop("prompt_logprobs")), "answers without prompt_logprobs"),
    "list": (faults.raw(b"[]"), "answers without prompt_logprobs"),
}


@pytest.mark.parametrize(("fault", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_is_final_and_says_what_to_do(teacher, fault, reason):
    teacher.faults.append(fault)
    with pytest.raises(ConfigError, match=reason) as caught:
        client(teacher).score(*document())
    assert teacher.url in str(caught.value)
    assert len(teacher.seen) == 1


def test_more_tokens_than_the_server_gives_name_both_ways_out(teacher):
    with pytest.raises(ConfigError, match=r"max allowed: 20; start vLLM with --max-logprobs 32 or lower distill.head"):
        client(teacher, top=32).score(*document())


def test_a_document_longer_than_the_context_names_both_ways_out(teacher):
    with pytest.raises(
        ConfigError, match=r"64 tokens[.]; start the server with --max-model-len 65 or more, or lower data"
    ):
        client(teacher).score(*document(length=64))


def test_a_model_that_is_not_served_is_refused_with_what_is(teacher):
    client(teacher).check()
    with pytest.raises(ConfigError, match=rf"serves {MODEL}, not other/model; set distill.teacher.served_as"):
        client(teacher, model="other/model").check()
    with pytest.raises(ConfigError, match="HTTP 404: The model `other/model` does not exist"):
        client(teacher, model="other/model").score(*document())


def test_an_address_beside_the_api_is_refused(teacher):
    with pytest.raises(ConfigError, match=r"HTTP 404: Not Found; distill.teacher.url is the API's root"):
        client(teacher, url=teacher.url + "/elsewhere").check()


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_the_address_may_end_with_or_without_v1(teacher, ending):
    client(teacher, url=teacher.url.removesuffix("/v1") + ending).check()
    assert [path for path, _, _ in teacher.seen] == ["/v1/models"]


@pytest.mark.parametrize(
    "url",
    ["", "host:8000", "ftp://host/v1", "http://", "http:///v1", "http://host:port/v1", "http://host:99999", "http://a..b",
     "http://ho st/", "http://host/\nv1", "http://hôst/", "http://[::1", "file:///etc/passwd"],
)  # fmt: skip
def test_what_is_no_address_is_refused_before_anything_is_sent(url):
    with pytest.raises(ConfigError, match=r"distill.teacher.url must be an address as http://host:8000/v1"):
        LogprobServer(url, MODEL, TOP)


@pytest.mark.parametrize("url", ["http://me:s3cr3t@host/v1", "http://host/v1?key=s3cr3t", "http://host:x/v1#s3cr3t"])
def test_a_secret_in_the_address_is_refused_and_not_repeated(url):
    with pytest.raises(ConfigError, match="a key belongs in OPENAI_API_KEY") as caught:
        LogprobServer(url, MODEL, TOP)
    assert "s3cr3t" not in str(caught.value)


def test_a_key_that_no_header_can_hold_is_refused_and_not_repeated(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-s3cr3t\r\nX-Other: 1")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY") as caught:
        LogprobServer("http://host/v1", MODEL, TOP)
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize("code", [401, 500])
def test_the_key_is_in_no_message_even_if_the_server_repeats_it(teacher, code):
    # The second copy lies across the place where long words are cut.
    words = f"bad key {KEY} {'x' * (390 - len(KEY))} {KEY}"
    teacher.faults.extend([faults.status(code, words)] * 3)
    said: list[str] = []
    with pytest.raises(FinetuneError) as caught:
        client(teacher, say=said.append).score(*document())
    shown = " ".join([str(caught.value), *said])
    assert "bad key …" in shown
    assert KEY[:8] not in shown


def test_the_key_goes_to_no_other_host(teacher):
    with LogprobTeacher() as other:
        teacher.faults.append(faults.redirect(other.url + "/completions"))
        with pytest.raises(ConfigError, match="redirect"):
            client(teacher).score(*document())
        assert other.seen == []


def join_workers() -> None:
    """Wait for the client's threads; far longer than they need, far shorter than what they wait for."""
    for thread in threading.enumerate():
        if thread.name == "teacher":
            thread.join(timeout=20)
            assert not thread.is_alive()


@pytest.mark.parametrize("others", ["held", "waiting"])
def test_an_error_ends_what_else_is_being_asked(teacher, others):
    """Requests that are never answered, waits between attempts, of ten minutes each, and documents behind them."""
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


def test_what_was_answered_before_an_error_is_kept(teacher):
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

# Whoever starts the tests in the background may have them ignore Ctrl+C, which children inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
from finetune.distill.server import LogprobServer

def documents():
    for _ in range(16):
        yield np.arange(12), np.arange(11)
    if sys.argv[3] == "elsewhere":
        # Another thread receives it, as when it comes just before the wait: nothing wakes the thread that waits.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    print("all are in flight", flush=True)

server = LogprobServer(sys.argv[1], sys.argv[2], 8, timeout_seconds=600)
list(server.score_many(documents(), workers=9))
"""


@pytest.fixture(params=["answer", "connection"])
def silent_url(request, teacher) -> Iterator[str]:
    """Of a server that never answers, and of one that never takes a connection."""
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
