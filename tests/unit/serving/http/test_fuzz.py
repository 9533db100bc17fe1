"""Requests that nobody would write: no failure of the server, no traceback, and answers as the document says.

FINETUNE_FUZZ_EXAMPLES=20000 runs that many requests of each kind.
"""

from __future__ import annotations

import copy
import json
import os
import random
import socket
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.serving_http import Served
from tests.unit.serving.http.test_bodies import CHAT, COMPLETIONS

EXAMPLES = int(os.environ.get("FINETUNE_FUZZ_EXAMPLES", "300"))
_ONE_BY_ONE = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=EXAMPLES == 300,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
BODIES = {
    CHAT: {
        "model": "base",
        "messages": [
            {"role": "system", "content": "a"},
            {"role": "user", "content": [{"type": "text", "text": "b"}]},
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}]},
            {"role": "tool", "content": "c"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "logprobs": True,
        "top_logprobs": 2,
        "stop": ["x"],
        "seed": 3,
        "n": 2,
        "temperature": 0.5,
        "stream": False,
    },
    COMPLETIONS: {"model": "base", "prompt": [[5, 6], [7]], "echo": True, "logprobs": 1, "prompt_logprobs": 1},
    "/v1/adapters": {"name": "sailor", "folder": "sailor"},
    "/v1/load_lora_adapter": {"lora_name": "sailor", "lora_path": "sailor"},
}
# Every type of JSON, and values at which programs fail.
VALUES = st.recursive(
    st.sampled_from(
        [None, True, 0, -1, 2**63, 10**400, 1e308, -0.0, "", "\0", "\ue0f0", "<|im_end|>", "../..", "é" * 999]
    )
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def served(templates, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    (folder / "sailor").mkdir()
    found = Served(templates[True], allow_adapters=True, adapters_folder=str(folder), max_request="100KB")
    yield found
    found.close()


def check(answer: httpx.Response) -> None:
    """Check that an answer is none of a server that failed."""
    assert answer.status_code < 500, answer.text
    if not answer.is_success:
        assert answer.json()["error"]["message"], answer.text


def test_bodies_with_a_part_replaced(served):
    @_ONE_BY_ONE
    @given(st.sampled_from(list(BODIES)), st.randoms(use_true_random=False), VALUES)
    def run(path: str, chance: random.Random, value: object) -> None:
        body = copy.deepcopy(BODIES[path])
        place: dict | list = body
        while True:
            key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not (isinstance(place[key], dict | list) and place[key]) or chance.random() < 0.4:
                break
            place = place[key]
        place[key] = value
        check(served.client.post(path, json=body))

    run()


def test_bodies_with_bytes_replaced(served):
    @_ONE_BY_ONE
    @given(st.sampled_from(list(BODIES)), st.randoms(use_true_random=False), st.binary(max_size=8))
    def run(path: str, chance: random.Random, put: bytes) -> None:
        raw = bytearray(json.dumps(BODIES[path]).encode())
        for _ in range(chance.randint(1, 3)):
            start = chance.randrange(len(raw))
            raw[start : start + chance.randint(0, 20)] = put
        check(served.client.post(path, content=bytes(raw), headers={"content-type": "application/json"}))

    run()


def test_bytes_on_a_socket(listen, caplog):
    url, _ = listen(max_request="1KB")
    address = urlsplit(url)
    body = json.dumps(BODIES[CHAT]).encode()
    whole = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    whole += b"Content-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(body), body)

    @settings(_ONE_BY_ONE, max_examples=max(EXAMPLES // 3, 1))
    @given(st.randoms(use_true_random=False), st.binary(max_size=30))
    def run(chance: random.Random, put: bytes) -> None:
        raw = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            # Most of them in the head, which is a quarter of it.
            start = chance.randrange(len(raw) if chance.random() < 0.3 else len(raw) - len(body))
            raw[start : start + chance.randint(0, 30)] = put
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.settimeout(60)
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            found = b""
            try:
                while received := connection.recv(65536):
                    found += received
            except ConnectionResetError:
                pass
        assert not found.startswith(b"HTTP/1.1 5"), found
        assert b"Traceback" not in found

    run()
    assert httpx.get(f"{url}/health").is_success
    assert "Traceback" not in caplog.text and not [each for each in caplog.records if each.exc_info]


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_requests_by_the_document(served, mode):
    import schemathesis
    from schemathesis import GenerationMode
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    schema = schemathesis.openapi.from_asgi("/openapi.json", served.app)
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) == 11
    writing = [each for each in operations if each.method == "post"]
    reading = [each for each in operations if each.method != "post" and each.path_parameters]
    if mode == "POSITIVE":
        for each in operations:
            each.Case().call_and_validate() if not each.path_parameters and each.method == "get" else None

    for operation in writing if mode == "NEGATIVE" else [*writing, *reading]:
        # A body that the document allows may still have keys that exclude each other.
        @settings(_ONE_BY_ONE, max_examples=max(EXAMPLES // len(writing) // 2, 10))
        @given(operation.as_strategy(generation_mode=GenerationMode[mode]))
        def run(case) -> None:
            if mode == "POSITIVE" and isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = "base"
                case.body.pop("deadline_seconds", None)  # a tiny one is answered by 504, as it should be
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

        run()
