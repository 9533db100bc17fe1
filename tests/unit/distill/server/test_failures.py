"""Requests to a failing teacher are retried, refusals are final, and no message contains the key."""

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

TRANSIENT = {
    "dropped": (faults.drop, "connection failed (RemoteProtocolError"),
    "no HTTP": (faults.other_protocol, "connection failed (RemoteProtocolError"),
    "incomplete": (faults.incomplete, "connection failed (RemoteProtocolError"),
    "no JSON": (faults.raw(b"<html>busy</html>"), "not JSON"),
    "no text": (faults.raw(b"\xff\xfe\x00"), "not JSON"),
    "nested": (faults.raw(b"[" * 100_000), "not JSON"),
    **{
        str(code): (faults.status(code, "engine \x1b[31mdead"), f"HTTP {code}: engine ␛[31mdead")
        for code in range(500, 505)
    },
    "429": (faults.status(429, "busy"), "HTTP 429: busy"),
}


@pytest.mark.parametrize(("fault", "reason"), TRANSIENT.values(), ids=TRANSIENT)
def test_a_transient_failure_is_retried_and_logged(teacher, fault, reason):
    ids, positions = document()
    teacher.faults.extend([fault, fault])
    logged: list[str] = []
    assert_right(client(teacher, log=logged.append).score(ids, positions), teacher, ids, positions)
    assert len(teacher.seen) == 3
    assert len(logged) == 2
    assert all(reason in line and teacher.url in line and KEY not in line for line in logged)
    assert "attempt 2 of 3" in logged[0]
    assert "attempt 3 of 3" in logged[1]


@pytest.mark.parametrize(("fault", "reason"), TRANSIENT.values(), ids=TRANSIENT)
def test_after_the_last_attempt_the_error_names_the_url_and_the_reason(teacher, fault, reason):
    teacher.faults.extend([fault] * 3)
    with pytest.raises(FinetuneError) as caught:
        client(teacher).score(*document())
    message = str(caught.value)
    assert not isinstance(caught.value, ConfigError)
    assert "3 attempts" in message and reason in message and teacher.url in message
    assert "cached" in message
    assert len(teacher.seen) == 3


@pytest.mark.parametrize("slow", [faults.after, faults.dripping], ids=["silent", "dripping"])
def test_a_request_over_the_time_limit_is_retried(teacher, slow):
    ids, positions = document()
    end = threading.Event()
    teacher.faults.append(slow(end))
    logged: list[str] = []
    try:
        found = client(teacher, timeout_seconds=0.5, log=logged.append).score(ids, positions)
    finally:
        end.set()
    assert_right(found, teacher, ids, positions)
    assert ["no answer within 0.5 s" in line for line in logged] == [True]


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_of_the_server_is_respected(teacher, form):
    before = time.monotonic()
    # A date has whole seconds: two from now are at least one.
    value = "1" if form == "seconds" else formatdate(time.time() + 2, usegmt=True)
    teacher.faults.append(faults.status(429, "busy", Retry_After=value))
    client(teacher).score(*document())
    # The two clocks may drift apart by far less than a hundredth.
    assert time.monotonic() - before >= 0.99


def test_a_refused_connection_is_named():
    with LogprobTeacher() as gone:
        pass
    with pytest.raises(FinetuneError, match=r"3 attempts.*Connection refused"):
        client(gone).check()


REFUSED = {
    "400": (faults.status(400, "odd"), "HTTP 400: odd\nhelp: .*log"),
    "401": (faults.status(401, "who?"), "HTTP 401: who[?]\nhelp: set OPENAI_API_KEY"),
    "403": (faults.status(403, "no"), "HTTP 403: no\nhelp: set OPENAI_API_KEY"),
    "404": (faults.status(404, "no"), "HTTP 404: no\nhelp: set distill.teacher.url"),
    "422": (faults.status(422, "unknown field prompt_logprobs"), "HTTP 422: .*\nhelp: .*prompt_logprobs"),
    "redirect": (faults.redirect("http://127.0.0.1:9/v1/completions"), "HTTP 307: .*\nhelp: redirects"),
    "without": (faults.edited(lambda a: a["choices"][0].pop("prompt_logprobs")), "answers without prompt_logprobs"),
    "list": (faults.raw(b"[]"), "answers without prompt_logprobs"),
}


@pytest.mark.parametrize(("fault", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_is_final_and_gives_help(teacher, fault, reason):
    teacher.faults.append(fault)
    with pytest.raises(ConfigError, match=reason) as caught:
        client(teacher).score(*document())
    assert teacher.url in str(caught.value)
    assert len(teacher.seen) == 1


def test_a_top_k_above_the_servers_limit_is_refused_with_both_settings(teacher):
    with pytest.raises(ConfigError, match=r"max allowed: 20\nhelp: .*--max-logprobs 32 or lower distill.top_k"):
        client(teacher, top=32).score(*document())


def test_a_document_beyond_the_context_is_refused_with_both_settings(teacher):
    with pytest.raises(ConfigError, match=r"64 tokens[.]\nhelp: .*--max-model-len 65 or more, or lower data"):
        client(teacher).score(*document(length=64))


def test_an_unknown_model_is_refused_with_the_models_served(teacher):
    client(teacher).check()
    with pytest.raises(ConfigError, match=rf"serves {MODEL}, not other/model\nhelp: set distill.teacher.served_as"):
        client(teacher, model="other/model").check()
    with pytest.raises(ConfigError, match="HTTP 404: The model `other/model` does not exist"):
        client(teacher, model="other/model").score(*document())


def test_a_url_outside_the_api_is_refused(teacher):
    with pytest.raises(ConfigError, match=r"HTTP 404: Not Found\nhelp: set distill.teacher.url"):
        client(teacher, url=teacher.url + "/elsewhere").check()


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_the_url_may_end_with_or_without_v1(teacher, ending):
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
def test_an_invalid_url_is_refused_before_anything_is_sent(url):
    with pytest.raises(ConfigError, match=r"distill.teacher.url: .*http://host:8000/v1"):
        LogprobServer(url, MODEL, TOP)


@pytest.mark.parametrize("url", ["http://me:s3cr3t@host/v1", "http://host/v1?key=s3cr3t", "http://host:x/v1#s3cr3t"])
def test_a_secret_in_the_url_is_refused_and_not_repeated(url):
    with pytest.raises(ConfigError, match="OPENAI_API_KEY") as caught:
        LogprobServer(url, MODEL, TOP)
    assert "s3cr3t" not in str(caught.value)


def test_a_key_with_a_line_break_is_refused_and_not_repeated(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-s3cr3t\r\nX-Other: 1")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY") as caught:
        LogprobServer("http://host/v1", MODEL, TOP)
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize("code", [401, 500])
def test_no_message_contains_the_key_even_if_the_server_repeats_it(teacher, code):
    # The cut of a long text falls into the second copy.
    text = f"bad key {KEY} {'x' * (390 - len(KEY))} {KEY}"
    teacher.faults.extend([faults.status(code, text)] * 3)
    logged: list[str] = []
    with pytest.raises(FinetuneError) as caught:
        client(teacher, log=logged.append).score(*document())
    shown = " ".join([str(caught.value), *logged])
    assert "bad key …" in shown
    assert KEY[:8] not in shown


def test_the_key_goes_to_no_other_host(teacher):
    with LogprobTeacher() as other:
        teacher.faults.append(faults.redirect(other.url + "/completions"))
        with pytest.raises(ConfigError, match="redirect"):
            client(teacher).score(*document())
        assert other.seen == []
