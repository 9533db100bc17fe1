"""The Open Inference Protocol over gRPC: text in and text out, with the tensors of Triton's LLM back ends.

The messages and the base class of the service come from NVIDIA's `tritonclient`, so there is no .proto file here.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from finetune import __version__
from finetune.serving.http.answers import End, Piece, all_whole, pieces_of
from finetune.serving.http.common import Common
from finetune.serving.http.errors import ApiError, as_api_error
from finetune.serving.inference import Inference, read_inference
from finetune.serving.service import Service
from finetune.serving.tensors import INPUTS, OUTPUTS, put_outputs
from finetune.system.console import log, printable
from finetune.system.errors import ConfigError, InputError, MissingExtra
from finetune.system.format import parse_size

try:
    import grpc
    import grpc.aio
    from tritonclient.grpc import service_pb2
    from tritonclient.grpc import service_pb2_grpc as protocol
except ImportError as error:
    raise MissingExtra('serve.grpc_port needs: pip install "finetune-qlora[grpc]"') from error

messages: Any = service_pb2  # its classes are made when it is imported
VERSION = "1"  # of every model: a name stands for one set of weights
# Triton's parameter of the last response to a request of a stream.
_FINAL = "triton_final_response"
_TEXT = ("text_output",)
# A status is sent in a header, and clients bound the size of all headers.
_STATUS_CHARACTERS = 1000


# By the status of the HTTP API.
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


@dataclass(frozen=True, slots=True)
class GrpcServer:
    """A server that listens at `port`."""

    server: grpc.aio.Server
    port: int

    async def stop(self, seconds: float) -> None:
        """Accept no more calls, and cancel those that run after `seconds`."""
        await self.server.stop(seconds)


async def start_grpc(service: Service, host: str, port: int, api_key: str | None) -> GrpcServer:
    """Answer the Open Inference Protocol in the running event loop.

    Args:
        port: 0 for any free one.
        api_key: clients send it as the metadata `authorization: Bearer KEY`; None: everybody may ask.

    Raises:
        ConfigError: the port is taken, or the host is not of this machine.
    """
    options = [
        ("grpc.max_receive_message_length", parse_size("serve.max_request", service.settings.max_request)),
        # Without it two servers may listen at one port, and each gets a part of the calls.
        ("grpc.so_reuseport", 0),
    ]
    server = grpc.aio.server(options=options)
    protocol.add_GRPCInferenceServiceServicer_to_server(InferenceServicer(service, api_key), server)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(f"serve.grpc_port: cannot listen at {address}, found {error}") from error
    await server.start()
    return GrpcServer(server, bound)


def _refusal(name: str) -> Callable[..., Awaitable[None]]:
    async def refuse(self: Any, request: Any, context: grpc.aio.ServicerContext) -> None:
        await context.abort(
            grpc.StatusCode.UNIMPLEMENTED, f"{name}: this server has text models only, set at its start"
        )

    return refuse


# All methods of Triton, refused: those of shared memory, of its model repository and of its settings stay so.
_METHODS = [name for name in vars(protocol.GRPCInferenceServiceServicer) if name[0].isupper()]
_Refusals: Any = type(
    "_Refusals", (protocol.GRPCInferenceServiceServicer,), {name: _refusal(name) for name in _METHODS}
)


class InferenceServicer(_Refusals):
    """The methods of the protocol."""

    def __init__(self, service: Service, api_key: str | None):
        self._service, self._common = service, Common(service)
        self._authorization = None if api_key is None else f"Bearer {api_key}".encode()

    async def ServerLive(self, request: Any, context: Any) -> Any:
        return messages.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:
        return messages.ServerReadyResponse(ready=self._service.ready)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:
        async with self._statuses(context):
            return messages.ServerMetadataResponse(name="finetune", version=__version__)

    async def ModelReady(self, request: Any, context: Any) -> Any:
        async with self._statuses(context):
            known = request.name in self._service.models and request.version in ("", VERSION)
            return messages.ModelReadyResponse(ready=known and self._service.ready)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        async with self._statuses(context):
            self._check_model(request.name, request.version)
            found = messages.ModelMetadataResponse(name=request.name, versions=[VERSION], platform="finetune")
            for tensors, add in ((INPUTS, found.inputs.add), (OUTPUTS, found.outputs.add)):
                for name, datatype in tensors.items():
                    add(name=name, datatype=datatype, shape=[-1])
            return found

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        async with self._statuses(context):
            with self._counted(request.model_name):
                read = await self._read(request, context)
                if read.stream:
                    raise InputError("stream: ModelInfer has one response; call ModelStreamInfer")
                return await self._whole(read)

    async def ModelStreamInfer(self, requests: Any, context: Any) -> None:
        """Answer the requests of a stream at the same time.

        The error of one request is a response, as Triton sends it; with the metadata `triton_grpc_error: true` it is
        the status of the stream and ends it.
        """
        async with self._statuses(context):
            ends, writing = ("triton_grpc_error", "true") in _metadata(context), asyncio.Lock()
            places = asyncio.Semaphore(self._service.settings.max_batch + self._service.settings.queue)

            async def send(response: Any) -> None:
                async with writing:  # gRPC takes one message at a time.
                    await context.write(response)

            async def answer(request: Any) -> None:
                try:
                    with self._counted(request.model_name):
                        responses = self._parts(await self._read(request, context))
                        async with aclosing(responses):
                            async for response in responses:
                                await send(messages.ModelStreamInferResponse(infer_response=response))
                except Exception as error:
                    if ends:
                        raise
                    empty = messages.ModelInferResponse(model_name=request.model_name, id=request.id)
                    empty.parameters[_FINAL].bool_param = True
                    text = _shown(_failure(error))
                    await send(messages.ModelStreamInferResponse(error_message=text, infer_response=empty))
                finally:
                    places.release()

            async with asyncio.TaskGroup() as answers:
                async for request in requests:
                    await places.acquire()
                    answers.create_task(answer(request))

    @asynccontextmanager
    async def _statuses(self, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        """Check the caller's key, and turn errors of the block into statuses."""
        try:
            self._authorize(context)
            yield
        except Exception as error:  # noqa: BLE001 - the last frame: every error becomes a status
            failure = _failure(error)
            # The pause that clients with a retry policy keep, in milliseconds.
            pause = failure.headers.get("Retry-After")
            trailing = () if pause is None else (("grpc-retry-pushback-ms", f"{pause}000"),)
            await context.abort(_code(failure), _shown(failure), trailing)

    @contextmanager
    def _counted(self, model: str) -> Iterator[None]:
        """Count a request by its status."""
        code = grpc.StatusCode.CANCELLED
        try:
            yield
            code = grpc.StatusCode.OK
        except Exception as error:
            code = _code(as_api_error(error))
            raise
        finally:
            # Of a label there must be few: a name that a client invents is none.
            name = model if model in self._service.models else ""
            self._service.metrics.requests.labels("grpc", name, code.name).inc()

    def _authorize(self, context: grpc.aio.ServicerContext) -> None:
        if self._authorization is None:
            return
        given = [value for key, value in _metadata(context) if key == "authorization"]
        if not any(hmac.compare_digest(value.encode(), self._authorization) for value in given):
            raise ApiError(401, "the key is missing or wrong; send the metadata authorization: Bearer KEY")

    def _check_model(self, name: str, version: str) -> None:
        self._common.model(name)
        if version not in ("", VERSION):
            raise ApiError(404, f"the version {version!r} of {name} is not served; there is only {VERSION}")

    async def _read(self, request: Any, context: grpc.aio.ServicerContext) -> Inference:
        self._check_model(request.model_name, request.model_version)
        seconds = context.time_remaining()
        return await self._common.prompts.run(lambda: read_inference(request, self._common, seconds))

    async def _whole(self, read: Inference) -> Any:
        """Return one response with the answers to all prompts, in their order."""
        answers = await all_whole(self._service, read.asked)
        texts = [before + answer.text for before, answer in zip(read.prefixes, answers, strict=True)]
        log_probs = [sum(token.log_prob or 0.0 for token in answer.tokens) for answer in answers]
        return _response(read, texts, [answer.end for answer in answers], log_probs)

    async def _parts(self, read: Inference) -> AsyncGenerator[Any, None]:
        """Yield the responses to a request of a stream. The last one says so, and what is known at the end alone."""
        if not read.stream:
            response = await self._whole(read)
            response.parameters[_FINAL].bool_param = True
            yield response
            return
        log_prob = 0.0
        async with aclosing(pieces_of(self._service, read.asked[0])) as pieces:
            async for piece in pieces:
                if isinstance(piece, Piece):
                    log_prob += sum(token.log_prob or 0.0 for token in piece.tokens)
                    response = _response(replace(read, outputs=_TEXT), [piece.text], [], [])
                elif isinstance(piece, End):
                    response = _response(read, [""], [piece], [log_prob])
                else:
                    continue
                response.parameters[_FINAL].bool_param = isinstance(piece, End)
                yield response


def _response(read: Inference, texts: list[str], ends: list[End], log_probs: list[float]) -> Any:
    response = messages.ModelInferResponse(model_name=read.model, model_version=VERSION, id=read.id)
    values = {
        "text_output": texts,
        "finish_reason": [end.reason for end in ends],
        "cumulative_logprob": log_probs,
        "num_input_tokens": [len(asked.request.ids) for asked in read.asked],
        "num_output_tokens": [end.tokens for end in ends],
    }
    put_outputs(response, {name: values[name] for name in read.outputs})
    return response


def _metadata(context: Any) -> list[tuple[str, str]]:
    """Return what a client sent beside its messages. Values of keys that end in -bin are bytes, and left out."""
    return [(key, value) for key, value in context.invocation_metadata() or () if isinstance(value, str)]


def _failure(error: BaseException) -> ApiError:
    """Return what a client sees of an error, as in the HTTP API."""
    while isinstance(error, BaseExceptionGroup):  # of the requests of a stream
        error = error.exceptions[0]
    failure = as_api_error(error)  # type: ignore[arg-type]
    if failure.code == "internal_error":
        log(f"serve: a call over gRPC failed: {error!r}")
    return failure


def _code(failure: ApiError) -> grpc.StatusCode:
    return _CODES.get(failure.status, grpc.StatusCode.INTERNAL)


def _shown(failure: ApiError) -> str:
    return printable(str(failure), one_line=True)[:_STATUS_CHARACTERS]
