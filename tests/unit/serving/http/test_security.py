"""The key, pages of other sites, headers, and the state of the server."""

from __future__ import annotations

import pytest

from tests.serving_http import wait_for
from tests.unit.serving.http.test_bodies import ASK, CHAT, refused

KEY = {"Authorization": "Bearer secret"}


@pytest.mark.parametrize("given", [None, "", "secret", "Bearer", "Bearer Secret", "Bearer secret2", "Basic secret"])
def test_every_path_but_the_states_needs_the_key(serve, given):
    client = serve(api_key="secret").client
    headers = {} if given is None else {"Authorization": given.encode()}
    for method, path in [("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/openapi.json"), ("POST", CHAT)]:
        assert refused(client.request(method, path, headers=headers), 401)["code"] == "invalid_api_key"
        assert client.request(method, path, headers=KEY, json=ASK if method == "POST" else None).is_success
    assert client.get("/health", headers=headers).is_success
    assert client.get("/ready", headers=headers).is_success


@pytest.mark.parametrize(
    ("host", "origin", "allowed"),
    [
        ("127.0.0.1:8000", None, True),
        ("replica:8000", None, True),  # a program, through a name of its network
        ("127.0.0.1:8000", "http://127.0.0.1:8000", True),
        ("localhost:8000", "http://localhost:8000", True),
        ("[::1]:8000", "http://[::1]:8000", True),
        ("127.0.0.1:8000", "http://127.0.0.1:9000", False),  # another server of this machine
        ("127.0.0.1:8000", "https://evil.example", False),
        ("127.0.0.1:8000", "null", False),
        ("127.0.0.1:8000", "http://[", False),
        ("evil.example:8000", "http://evil.example:8000", False),  # its name points at 127.0.0.1
    ],
)
def test_a_page_elsewhere_cannot_use_a_server_without_a_key(serve, host, origin, allowed):
    headers = {"Host": host} | ({} if origin is None else {"Origin": origin})
    answer = serve().client.post(CHAT, json=ASK, headers=headers)
    assert answer.is_success if allowed else refused(answer, 403)
    assert serve(api_key="secret").client.post(CHAT, json=ASK, headers=headers | KEY).is_success


def test_no_page_may_ask_across_sites(serve):
    client = serve(api_key="secret").client
    preflight = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    answer = client.options(CHAT, headers=preflight | KEY)
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_every_answer_has_the_headers_of_security(serve):
    client = serve(api_key="secret").client
    for answer in (client.get("/health"), client.get("/v1/models"), client.post(CHAT, json=ASK, headers=KEY)):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-request-id"].startswith("req_")


def test_a_server_that_is_not_ready_lives_and_says_when_to_come_again(serve):
    served = serve()
    served.service.ready = False
    assert served.client.get("/health").is_success
    for answer in (served.client.get("/ready"), served.client.post(CHAT, json=ASK | {"stream": True})):
        refused(answer, 503)
        assert int(answer.headers["retry-after"]) > 0


def test_a_full_queue_says_when_to_come_again(serve):
    served = serve(queue=0, max_batch=1, seconds=0.05)
    answer = served.client.post(CHAT, json=ASK | {"n": 2})
    refused(answer, 429)
    assert int(answer.headers["retry-after"]) > 0
    wait_for(lambda: served.client.post(CHAT, json=ASK).is_success)


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_before_the_first_token(serve, stream):
    served = serve(seconds=0.5)
    refused(served.client.post(CHAT, json=ASK | {"deadline_seconds": 0.05, "stream": stream}), 504)


def test_requests_are_counted_by_their_status(serve):
    client = serve().client
    client.post(CHAT, json=ASK)
    client.post(CHAT, json=ASK | {"model": "an invented name"})
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert 'finetune_requests_total{endpoint="chat",model="base",status="200"} 1.0' in answer.text
    assert 'finetune_requests_total{endpoint="chat",model="",status="404"} 1.0' in answer.text
