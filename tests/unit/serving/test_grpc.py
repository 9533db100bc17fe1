"""The Open Inference Protocol, spoken by NVIDIA's own client."""

from __future__ import annotations

import asyncio
import json
import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.config.command_options import ServeSettings
from finetune.data.formats.messages import Message
from finetune.data.template.chat import ChatTemplate
from finetune.serving.request import Finished
from finetune.serving.service import ServedModel, Service
from finetune.serving.settings import AnswerSettings
from finetune.serving.tensors import INPUTS, OUTPUTS
from finetune.system.errors import ConfigError
from finetune.system.resources import packaged
from tests.serving_engine import ScriptedEngine

grpc = pytest.importorskip("grpc")
triton = pytest.importorskip("tritonclient.grpc")
from tritonclient.grpc import aio, service_pb2, service_pb2_grpc  # noqa: E402 - after the check
from tritonclient.utils import InferenceServerException  # noqa: E402

from finetune.serving.grpc import start_grpc  # noqa: E402

TENSORS = {str: "BYTES", bool: "BOOL"}


@pytest.fixture(scope="module")
def chat() -> ChatTemplate:
    from transformers import AutoTokenizer

    return ChatTemplate(AutoTokenizer.from_pretrained(packaged("data") / "tiny-qwen2.5"))


@contextmanager
def served(chat: ChatTemplate, engine: ScriptedEngine, api_key: str | None = None, **limits: Any) -> Iterator[str]:
    """The address of a server in a thread of its own, with the models `base` and `skill`."""
    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever)
    thread.start()
    engine.load_adapter("skill", "")
    engine.loop = loop
    models = [ServedModel("base", None, "1", 0), ServedModel("skill", "skill", "2", 0)]

    async def start() -> Any:
        service = Service(engine, chat, models, ServeSettings(window_ms=0, **limits))
        engine.service, service.ready = service, True
        engine.server = await start_grpc(service, "127.0.0.1", 0, api_key)
        return engine.server

    server = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(0), loop).result()
        engine.close()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def engine() -> ScriptedEngine:
    """It answers with the tokens of the prompt."""
    return ScriptedEngine()


@pytest.fixture
def address(chat: ChatTemplate, engine: ScriptedEngine) -> Iterator[str]:
    with served(chat, engine) as found:
        yield found


@pytest.fixture
def client(address: str) -> Iterator[Any]:
    with triton.InferenceServerClient(address) as found:
        yield found


def tensors(kind: Any = triton, **values: Any) -> list[Any]:
    """Inputs of a request: a value or a list of them for each name."""
    found = []
    for name, value in values.items():
        elements = value if isinstance(value, list) else [value]
        array = np.array([text.encode() for text in elements] if isinstance(elements[0], str) else elements)
        tensor = kind.InferInput(name, [len(elements)], TENSORS[type(elements[0])])
        tensor.set_data_from_numpy(array.astype(object) if isinstance(elements[0], str) else array)
        found.append(tensor)
    return found


def texts(result: Any, name: str = "text_output") -> list[str]:
    return [text.decode() for text in result.as_numpy(name)]


def test_the_server_and_its_models_are_described(client):
    assert client.is_server_live() and client.is_server_ready()
    assert client.get_server_metadata().name == "finetune"
    assert client.is_model_ready("skill") and not client.is_model_ready("other")
    metadata = client.get_model_metadata("base")
    assert {(tensor.name, tensor.datatype) for tensor in metadata.inputs} >= {
        ("text_input", "BYTES"),
        ("stream", "BOOL"),
    }


def test_a_prompt_is_answered_after_itself_as_in_triton_unless_it_is_excluded(client):
    assert texts(client.infer("base", tensors(text_input="Hello"))) == ["HelloHello"]
    assert texts(client.infer("base", tensors(text_input="Hello", exclude_input_in_output=True))) == ["Hello"]


def test_settings_come_as_json_or_as_parameters(client, engine):
    inputs = tensors(text_input="Hello", sampling_parameters=json.dumps({"max_tokens": 3, "temperature": 0}))
    client.infer("skill", inputs, parameters={"temperature": 0.5, "top_k": 7, "seed": 5})
    [request] = engine.requests
    assert request.adapter == "skill" and request.max_tokens == 3
    assert (request.sampling.temperature, request.sampling.top_k, request.sampling.seed) == (0, 7, 5)


def test_every_prompt_of_a_batch_has_its_answer_and_may_have_its_settings(client):
    prompts, own = ["one", "two and more", "three"], [json.dumps({"max_tokens": tokens}) for tokens in (1, 16, 16)]
    flags = {"exclude_input_in_output": True, "return_num_output_tokens": True, "return_finish_reason": True}
    result = client.infer("base", tensors(text_input=prompts, sampling_parameters=own, **flags))
    assert texts(result)[1:] == prompts[1:] and prompts[0].startswith(texts(result)[0])
    assert result.as_numpy("num_output_tokens").tolist()[0] == 1
    assert texts(result, "finish_reason") == ["length"] * 3


def test_messages_are_put_into_the_template(client, chat, engine):
    messages = [{"role": "user", "content": "Hello"}]
    client.infer("base", tensors(messages=json.dumps(messages)))
    assert list(engine.requests[0].ids) == chat.prompt_ids([Message("user", "Hello")])
    assert engine.requests[0].stop_ids == set(chat.stop_ids())


def test_an_answer_can_obey_a_schema_and_a_wrong_schema_is_refused(client, engine):
    messages = json.dumps([{"role": "user", "content": "Hello"}])

    def ask(schema: Any) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        client.infer("base", tensors(messages=messages, sampling_parameters=json.dumps({"response_format": form})))

    ask({"type": "object"})
    assert json.loads(engine.requests[0].sampling.grammar) == {"type": "object"}
    with pytest.raises(InferenceServerException) as error:
        ask({"type": "nothing"})
    assert error.value.status() == "StatusCode.INVALID_ARGUMENT" and len(engine.requests) == 1


def test_requested_outputs_are_the_only_ones(client):
    wanted = [triton.InferRequestedOutput("num_input_tokens"), triton.InferRequestedOutput("cumulative_logprob")]
    response = client.infer("base", tensors(text_input="Hello"), outputs=wanted, request_id="r1").get_response()
    assert [output.name for output in response.outputs] == ["num_input_tokens", "cumulative_logprob"]
    assert response.id == "r1"


def streamed(address: str, requests: list[dict[str, Any]], headers: dict[str, str] | None = None) -> list[Any]:
    """Results and errors of the requests of one stream, until each had its last response."""
    answers: queue.Queue[Any] = queue.Queue()
    found, last = [], 0
    with triton.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: answers.put((result, error)), headers=headers)
        for request in requests:
            client.async_stream_infer(**request)
        while last < len(requests):
            result, error = answers.get(timeout=60)
            found.append(error or result)
            last += error is not None or result.get_response().parameters["triton_final_response"].bool_param
        client.stop_stream()
    return found


def test_a_streamed_answer_comes_in_pieces_and_the_last_one_says_so(address):
    inputs = tensors(text_input="one two three four", stream=True, return_finish_reason=True)
    results = streamed(address, [{"model_name": "base", "inputs": inputs}])
    assert len(results) > 2 and "".join(text for result in results for text in texts(result)) == "one two three four"
    ends = [result.as_numpy("finish_reason") for result in results]
    assert ends[:-1] == [None] * (len(results) - 1) and ends[-1].tolist() == [b"length"]


def test_requests_of_a_stream_are_answered_at_the_same_time_and_an_error_is_of_one_alone(chat):
    engine = ScriptedEngine(lambda request: [5] * (200 if request.sampling.top_k else 1), seconds=0.005)
    with served(chat, engine) as address:
        requests = [
            {"inputs": tensors(text_input="a"), "parameters": {"top_k": 1, "max_tokens": 200}, "request_id": "slow"},
            {"inputs": tensors(text_input="b"), "parameters": {"top_k": "x"}, "request_id": "wrong"},
            {"inputs": tensors(text_input="c"), "request_id": "quick"},
        ]
        wrong, quick, slow = streamed(address, [{"model_name": "base", **request} for request in requests])
    assert isinstance(wrong, InferenceServerException) and "top_k" in wrong.message()
    assert (quick.get_response().id, slow.get_response().id) == ("quick", "slow")


def test_an_error_ends_a_stream_that_wants_statuses(address):
    wrong = [{"model_name": "base", "inputs": tensors(text_input="b"), "parameters": {"top_k": "x"}}]
    [error] = streamed(address, wrong, headers={"triton_grpc_error": "true"})
    assert error.status() == "StatusCode.INVALID_ARGUMENT"


def test_the_asyncio_client_infers_and_streams(address):
    async def ask() -> list[str]:
        async with aio.InferenceServerClient(address) as client:
            whole = await client.infer("base", tensors(aio, text_input="one two", exclude_input_in_output=True))

            async def requests() -> Any:
                yield {"model_name": "skill", "inputs": tensors(aio, text_input="one two", stream=True)}

            pieces = [result async for result, error in client.stream_infer(requests()) if error is None]
            return [*texts(whole), "".join(text for piece in pieces for text in texts(piece))]

    assert asyncio.run(ask()) == ["one two", "one two"]


@pytest.mark.parametrize(
    ("request_", "status", "named"),
    [
        ({"model_name": "other"}, "NOT_FOUND", "'other'"),
        ({"model_version": "2"}, "NOT_FOUND", "version"),
        ({"parameters": {"temperature": "hot"}}, "INVALID_ARGUMENT", "temperature"),
        ({"parameters": {"temprature": 1.0}}, "INVALID_ARGUMENT", "temprature"),
        ({"inputs": {"sampling_parameters": "{"}}, "INVALID_ARGUMENT", "sampling_parameters"),
        ({"inputs": {"sampling_parameters": '{"max_tokens": 5000}'}}, "INVALID_ARGUMENT", "context"),
        ({"inputs": {"sampling_parameters": '{"max_tokens": 2.5}'}}, "INVALID_ARGUMENT", "max_tokens"),
        ({"inputs": {"sampling_parameters": '{"n": 2}'}}, "INVALID_ARGUMENT", "n: "),
        ({"inputs": {"sampling_parameters": "[1]"}}, "INVALID_ARGUMENT", "sampling_parameters"),
        ({"inputs": {"stream": True}}, "INVALID_ARGUMENT", "stream"),
        ({"inputs": {"stream": [True, False]}}, "INVALID_ARGUMENT", "stream"),
        ({"inputs": {"messages": "[]"}}, "INVALID_ARGUMENT", "text_input"),
        ({"inputs": {"text_input": ""}}, "INVALID_ARGUMENT", "prompt"),
        ({"inputs": {"image": "a"}}, "INVALID_ARGUMENT", "image"),
    ],
)
def test_errors_are_statuses_that_name_the_key(client, request_, status, named):
    inputs = tensors(**{"text_input": "a", **request_.get("inputs", {})})
    with pytest.raises(InferenceServerException) as error:
        client.infer(**{"model_name": "base", **request_, "inputs": inputs})
    assert error.value.status() == f"StatusCode.{status}" and named in error.value.message()


def test_requests_are_counted_by_status(chat, engine):
    with served(chat, engine) as address, triton.InferenceServerClient(address) as client:
        client.infer("base", tensors(text_input="a"))
        with pytest.raises(InferenceServerException):
            client.infer("invented", tensors(text_input="a"))
        streamed(address, [{"model_name": "skill", "inputs": tensors(text_input="a", stream=True)}] * 2)
        counted = {
            (sample.labels["model"], sample.labels["status"]): sample.value
            for metric in engine.service.metrics.registry.collect()
            for sample in metric.samples
            if sample.name == "finetune_requests_total" and sample.labels["endpoint"] == "grpc"
        }
    assert counted == {("base", "OK"): 1, ("", "NOT_FOUND"): 1, ("skill", "OK"): 2}


def test_files_named_in_messages_are_not_read(client):
    content = [{"type": "image_url", "image_url": {"url": "/etc/hostname"}}, {"type": "text", "text": "?"}]
    with pytest.raises(InferenceServerException, match="messages") as error:
        client.infer("base", tensors(messages=json.dumps([{"role": "user", "content": content}])))
    assert error.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_methods_of_triton_alone_are_unimplemented(client):
    for call in (client.get_model_repository_index, client.get_inference_statistics, client.get_log_settings):
        with pytest.raises(InferenceServerException) as error:
            call()
        assert error.value.status() == "StatusCode.UNIMPLEMENTED"


def test_a_key_is_needed_where_the_server_has_one(chat, engine):
    with served(chat, engine, api_key="secret") as address, triton.InferenceServerClient(address) as client:
        assert client.is_server_ready()
        for headers in (None, {"authorization": "Bearer other"}, {"authorization": "secret"}):
            with pytest.raises(InferenceServerException) as error:
                client.infer("base", tensors(text_input="a"), headers=headers)
            assert error.value.status() == "StatusCode.UNAUTHENTICATED"
        key = {"authorization": "Bearer secret"}
        assert texts(client.infer("base", tensors(text_input="a"), headers=key)) == ["aa"]


def wait_until(law: Any) -> None:
    """Fail by the time limit of tests if it never holds."""
    while not law():
        time.sleep(0.005)


@pytest.mark.parametrize("limit", ["deadline", "timeout"])
def test_a_clients_limit_ends_the_answer_and_frees_its_place(chat, limit):
    engine = ScriptedEngine(lambda request: [5] * 10_000, seconds=0.01)
    with served(chat, engine) as address, triton.InferenceServerClient(address) as client:
        limits = {"client_timeout": 0.2} if limit == "deadline" else {"timeout": 200_000}
        with pytest.raises(InferenceServerException) as error:
            client.infer("base", tensors(text_input="a"), parameters={"max_tokens": 4000}, **limits)
        assert error.value.status() == "StatusCode.DEADLINE_EXCEEDED"
        wait_until(lambda: engine.cancelled == [1])


def test_a_cancelled_call_cancels_every_answer_of_it(chat):
    engine = ScriptedEngine(lambda request: [5] * 10_000, seconds=0.01)
    with served(chat, engine) as address, triton.InferenceServerClient(address) as client:
        answers: queue.Queue[Any] = queue.Queue()
        inputs = tensors(text_input=["a", "b"])
        long = {"parameters": {"max_tokens": 4000}}
        call = client.async_infer("base", inputs, lambda result, error: answers.put(error), **long)
        wait_until(lambda: engine.load().running == 2)
        call.cancel()
        assert answers.get(timeout=60).status() == "StatusCode.CANCELLED"
        wait_until(lambda: sorted(engine.cancelled) == [1, 2])


def test_a_stream_that_its_client_leaves_cancels_its_answers(chat):
    engine = ScriptedEngine(lambda request: [5] * 10_000, seconds=0.01)
    with served(chat, engine) as address, triton.InferenceServerClient(address) as client:
        first: queue.Queue[Any] = queue.Queue()
        client.start_stream(lambda result, error: first.put(result))
        client.async_stream_infer("base", tensors(text_input="a", stream=True), parameters={"max_tokens": 4000})
        first.get(timeout=60)
        client.stop_stream(cancel_requests=True)
        wait_until(lambda: engine.cancelled == [1])


def test_a_full_queue_is_resource_exhausted_and_says_when_to_try_again(chat):
    engine = ScriptedEngine(lambda request: [5] * 10_000, seconds=0.01)
    with served(chat, engine, max_batch=1, queue=0) as address, grpc.insecure_channel(address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = service_pb2.ModelInferRequest(model_name="base")
        request.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"a")
        request.parameters["max_tokens"].int64_param = 4000
        running = stub.ModelInfer.future(request)
        wait_until(lambda: engine.load().running == 1)
        with pytest.raises(grpc.RpcError) as error:
            stub.ModelInfer(request)
        assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert int(dict(error.value.trailing_metadata())["grpc-retry-pushback-ms"]) >= 1000
        running.cancel()


def test_the_end_of_a_server_waits_for_running_calls_and_refuses_new_ones(chat):
    engine = ScriptedEngine(lambda request: [70] * 30, seconds=0.02)

    async def end() -> bool:
        drained = await engine.service.drain(60)
        await engine.server.stop(60)
        return drained

    with served(chat, engine) as address, triton.InferenceServerClient(address) as client:
        answers: queue.Queue[Any] = queue.Queue()

        def put(result: Any, error: Any) -> None:
            answers.put((result, error))

        for _ in range(8):
            inputs = tensors(text_input="a", exclude_input_in_output=True)
            client.async_infer("base", inputs, put, parameters={"max_tokens": 40})
        wait_until(lambda: engine.load().running == 8)
        ending = asyncio.run_coroutine_threadsafe(end(), engine.loop)
        wait_until(lambda: not engine.service.ready)
        with pytest.raises(InferenceServerException) as error:
            client.infer("base", tensors(text_input="a"))
        assert error.value.status() == "StatusCode.UNAVAILABLE" and ending.result()
        found = [answers.get(timeout=60) for _ in range(8)]
    assert [error for _, error in found] == [None] * 8 and len({tuple(texts(result)) for result, _ in found}) == 1


def test_an_answer_that_the_engine_ends_is_no_answer(chat):
    class Broken(ScriptedEngine):
        def submit(self, request: Any, put: Any) -> int:
            put(Finished("error", error="logits are not finite") if request.sampling.top_k else Finished("cancelled"))
            return 0

    with served(chat, Broken()) as address, triton.InferenceServerClient(address) as client:
        for parameters, status in (({"top_k": 1}, "INTERNAL"), ({}, "UNAVAILABLE")):
            with pytest.raises(InferenceServerException) as error:
                client.infer("base", tensors(text_input="a"), parameters=parameters)
            assert error.value.status() == f"StatusCode.{status}"


def test_a_larger_message_than_allowed_is_refused(chat, engine):
    with served(chat, engine, max_request="10KB") as address, triton.InferenceServerClient(address) as client:
        with pytest.raises(InferenceServerException) as error:
            client.infer("base", tensors(text_input="a" * 20_000))
        assert error.value.status() == "StatusCode.RESOURCE_EXHAUSTED"


@pytest.mark.parametrize(
    ("shape", "raw", "contents"),
    [
        ([1], b"\x02\0\0\0a", []),  # ends within an element
        ([1], b"\x01\0\0", []),  # ends within a length
        ([2], b"\x01\0\0\0a", []),
        ([1], b"\x01\0\0\0\xff", []),
        ([0], b"", []),
        ([], b"", [b"a", b"b"]),
        ([1], b"\x01\0\0\0a", [b"a"]),
    ],
)
def test_a_tensor_that_does_not_fit_its_content_is_refused(address, shape, raw, contents):
    request = service_pb2.ModelInferRequest(model_name="base", raw_input_contents=[raw] if raw else [])
    tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=shape)
    if contents:
        tensor.contents.bytes_contents.extend(contents)
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as error:
        service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT and "text_input" in error.value.details()


_NAMES = st.sampled_from([*INPUTS, *OUTPUTS, *AnswerSettings.model_fields, "timeout"]) | st.text(max_size=8)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=3),
    max_leaves=6,
)
_ELEMENTS = st.binary(max_size=9) | _JSON.map(lambda value: json.dumps(value).encode()) | st.just(b"[]" * 50_000)
_TURNS = st.builds(lambda role, content: {"role": role, "content": content}, st.sampled_from(["user", "tool"]), _JSON)
_TEXTS = st.text(max_size=9).map(str.encode) | st.lists(_TURNS).map(lambda turns: json.dumps(turns).encode())


@st.composite
def infer_requests(draw: Any) -> Any:
    """A message that may be right, or wrong anywhere."""
    request = service_pb2.ModelInferRequest(model_name=draw(st.sampled_from(["base", "base", "skill", "x"])))
    request.id, request.model_version = draw(st.text(max_size=3)), draw(st.sampled_from(["", "", "1", "é"]))
    for name, value in draw(
        st.dictionaries(_NAMES, st.booleans() | st.integers(0, 9) | st.floats() | st.text())
    ).items():
        kind = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
        setattr(request.parameters[name], kind, value)
    raw = draw(st.booleans())
    others = draw(st.lists(_NAMES, max_size=2) | st.just([]))
    for name in [*others, *draw(st.sampled_from([["text_input"], ["text_input"], ["messages"], []]))]:
        elements = draw(st.lists(_TEXTS if name in ("text_input", "messages") else _ELEMENTS, min_size=1, max_size=3))
        datatype = draw(st.sampled_from([INPUTS.get(name, "BYTES")] * 4 + ["FP32", ""]))
        shape = draw(st.sampled_from([[len(elements)]] * 4 + [[len(elements), 1], [], [-1], [2**40, 2**40]]))
        tensor = request.inputs.add(name=name, datatype=datatype, shape=shape)
        if raw:
            whole = b"".join(len(element).to_bytes(4, "little") + element for element in elements)
            request.raw_input_contents.append(draw(st.sampled_from([whole, whole, bytes(len(elements)), whole[1:]])))
        else:
            tensor.contents.bytes_contents.extend(elements)
            tensor.contents.bool_contents.extend([True] * draw(st.integers(0, 2)))
    for name in draw(st.lists(st.sampled_from([*OUTPUTS, "x"]), max_size=2)):
        request.outputs.add(name=name)
    return request


def test_a_random_message_has_an_answer_or_a_status_of_the_clients_mistake(chat):
    expected = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "DEADLINE_EXCEEDED"}
    with served(chat, ScriptedEngine()) as address, grpc.insecure_channel(address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        seen = set()

        @settings(max_examples=300, deadline=None, derandomize=True, database=None)
        @given(infer_requests())
        def ask(request: Any) -> None:
            try:
                stub.ModelInfer(request)
                code = "OK"
            except grpc.RpcError as error:
                code = error.code().name
                assert code in expected, (error, request)
            responses = list(stub.ModelStreamInfer(iter([request])))
            last = responses[-1]
            assert last.infer_response.parameters["triton_final_response"].bool_param
            seen.add((code, bool(last.error_message)))

        ask()
    assert {("OK", False), ("INVALID_ARGUMENT", True), ("NOT_FOUND", True)} <= seen


def test_a_taken_port_is_a_config_error(chat, engine, address):
    port = int(address.partition(":")[2])
    with pytest.raises(ConfigError, match="grpc_port"):
        asyncio.run(start_grpc(Service(engine, chat, [], ServeSettings()), "127.0.0.1", port, None))
