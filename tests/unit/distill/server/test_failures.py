"""A served teacher that fails or refuses: asked again or given up, by its name, and no key in any message."""

from __future__ import annotations

import threading
import time
from email.utils import formatdate

import pytest

from finetune.distill.server import LogprobServer
from finetune.system.errors import ConfigError, FinetuneError
from tests import logprob_server as faults
from tests.logprob_server import MODEL, LogprobTeacher
from tests.unit.distill.server.conftest import KEY, TOP, assert_right, client, document

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
    assert_right(client(teacher, log=said.append).score(ids, positions), teacher, ids, positions)
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
        found = client(teacher, timeout_seconds=0.5, log=said.append).score(ids, positions)
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
    with pytest.raises(ConfigError, match=r"max allowed: 20; start vLLM with --max-logprobs 32 or lower distill.top_k"):
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
    [
        "",
        "host:8000",
        "ftp://host/v1",
        "http://",
        "http:///v1",
        "http://host:port/v1",
        "http://host:99999",
        "http://a..b",
        "http://ho st/",
        "http://host/\nv1",
        "http://hôst/",
        "http://[::1",
        "file:///etc/passwd",
    ],
)
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
        client(teacher, log=said.append).score(*document())
    shown = " ".join([str(caught.value), *said])
    assert "bad key …" in shown
    assert KEY[:8] not in shown


def test_the_key_goes_to_no_other_host(teacher):
    with LogprobTeacher() as other:
        teacher.faults.append(faults.redirect(other.url + "/completions"))
        with pytest.raises(ConfigError, match="redirect"):
            client(teacher).score(*document())
        assert other.seen == []
