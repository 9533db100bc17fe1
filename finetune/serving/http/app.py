"""OpenAI's API over one `Service`."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse

from finetune.serving.admission import Unavailable
from finetune.serving.http.chat import answer_chat
from finetune.serving.http.common import Common
from finetune.serving.http.completions import answer_completion
from finetune.serving.http.errors import ApiError, ErrorBody, as_api_error
from finetune.serving.http.json_bodies import JsonReply, JsonRoute
from finetune.serving.http.models import Adapters, all_models, model_of
from finetune.serving.http.page import page_routes
from finetune.serving.http.replies import ChatCompletion, Completion, Deleted, Model, Models, State
from finetune.serving.http.schemas import ChatBody, CompletionBody, LoadAdapter, LoadLora, UnloadLora
from finetune.serving.http.security import Guard
from finetune.serving.service import Service
from finetune.system.console import log, printable
from finetune.system.errors import FinetuneError
from finetune.system.format import parse_size

_ERRORS = {
    400: "The request is wrong; the message names every wrong key.",
    401: "The API key is missing or wrong.",
    403: "The server does not allow this, or a page of another site asks.",
    404: "There is no such model or path.",
    405: "The path has no such method.",
    409: "The name is taken.",
    413: "The body is larger than serve.max_request.",
    415: "The body is not application/json.",
    429: "The queue is full; Retry-After has the seconds to wait.",
    500: "The engine failed.",
    503: "The server is starting or ending.",
    504: "The request took longer than it may.",
}
_ANSWERS = (400, 401, 403, 404, 413, 415, 429, 500, 503, 504)
_ADAPTERS = (400, 401, 403, 404, 409, 413, 415)


def build_app(service: Service, *, api_key: str | None) -> FastAPI:
    """Build the HTTP API of a service.

    Args:
        api_key: what clients send as `Authorization: Bearer KEY`; None: everybody on this machine may ask.
    """
    # The pages of FastAPI's documentation load scripts from the network.
    app = FastAPI(title="finetune serve", version="1", docs_url=None, redoc_url=None)
    app.router.route_class = JsonRoute
    _add_error_handlers(app)
    app.include_router(page_routes())
    app.include_router(_open_routes(service))
    # Only for the document: `Guard` checks the key, before a body is read.
    guarded = [] if api_key is None else [Security(HTTPBearer(auto_error=False))]
    for router in (_answer_routes(service), _adapter_routes(service), _metrics_route(service)):
        app.include_router(router, dependencies=guarded)
    app.add_middleware(Guard, api_key=api_key, most_bytes=parse_size("serve.max_request", service.settings.max_request))
    return app


def _answer_routes(service: Service) -> APIRouter:
    router, common = APIRouter(prefix="/v1", route_class=JsonRoute), Common(service)

    @router.post("/chat/completions", responses=_documented(ChatCompletion, *_ANSWERS, stream=True))
    async def chat_completions(http: Request, body: ChatBody) -> Response:
        return await _counted(service, "chat", body.model, answer_chat(common, http, body))

    @router.post("/completions", responses=_documented(Completion, *_ANSWERS, stream=True))
    async def completions(http: Request, body: CompletionBody) -> Response:
        return await _counted(service, "completions", body.model, answer_completion(common, http, body))

    @router.get("/models", responses=_documented(Models, 401, 403))
    async def list_models() -> Response:
        return JsonReply(all_models(service))

    @router.get("/models/{model_id:path}", responses=_documented(Model, 400, 401, 403, 404))
    async def retrieve_model(model_id: str) -> Response:
        return JsonReply(model_of(service, common.model(model_id)))

    return router


def _adapter_routes(service: Service) -> APIRouter:
    router, adapters = APIRouter(prefix="/v1", route_class=JsonRoute), Adapters(service)

    @router.post("/adapters", responses=_documented(Model, *_ADAPTERS))
    async def load_adapter(body: LoadAdapter) -> Response:
        return JsonReply(await adapters.load(body.name, body.folder))

    @router.delete("/adapters/{name}", responses=_documented(Deleted, 400, 401, 403, 404))
    async def unload_adapter(name: str) -> Response:
        return JsonReply(await adapters.unload(name))

    @router.post("/load_lora_adapter", responses=_documented(State, *_ADAPTERS))
    async def load_lora_adapter(body: LoadLora) -> Response:
        await adapters.load(body.lora_name, adapters.folder_of_path(body.lora_path))
        return JsonReply({"status": f"the adapter {body.lora_name} is served"})

    @router.post("/unload_lora_adapter", responses=_documented(State, *_ADAPTERS))
    async def unload_lora_adapter(body: UnloadLora) -> Response:
        await adapters.unload(body.lora_name)
        return JsonReply({"status": f"the adapter {body.lora_name} is not served any more"})

    return router


def _open_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/health", responses=_documented(State))
    async def health() -> Response:
        return JsonReply({"status": "alive"})

    @router.get("/ready", responses=_documented(State, 503))
    async def ready() -> Response:
        if not service.ready:
            raise Unavailable()
        return JsonReply({"status": "ready"})

    return router


def _metrics_route(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/metrics", response_class=PlainTextResponse, responses=_documented(None, 401, 403))
    async def metrics() -> Response:
        text, kind = service.metrics.text()
        return Response(text, media_type=kind)

    return router


async def _counted(service: Service, endpoint: str, model: str, reply: Awaitable[Response]) -> Response:
    """Count a request by its status."""
    status = 500
    try:
        found = await reply
        status = found.status_code
        return found
    except Exception as error:
        status = as_api_error(error).status
        raise
    finally:
        # Of a label there must be few: a name that a client invents is none.
        service.metrics.requests.labels(endpoint, model if model in service.models else "", status).inc()


def _documented(body: Any, *errors: int, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """Return what the OpenAPI document says of a route's answers."""
    found: dict[int | str, dict[str, Any]] = {} if body is None else {200: {"model": body}}
    if stream:
        event = {"data": {"type": "string", "description": "JSON of a chunk or of an error, or [DONE]."}}
        item = {"type": "object", "properties": event, "required": ["data"]}
        found[200]["content"] = {"text/event-stream": {"itemSchema": item}}
        found[200]["description"] = "The answer; with stream=true, its chunks as server-sent events."
    return found | {status: {"model": ErrorBody, "description": _ERRORS[status]} for status in errors}


def _add_error_handlers(app: FastAPI) -> None:
    async def answer(request: Request, error: Exception) -> Response:
        failure = as_api_error(error)
        if failure.code == "internal_error":
            log(printable(f"serve: {request.method} {request.url.path} failed: {error!r}", one_line=True))
        return JsonReply(failure.body(), failure.status, failure.headers)

    for kind in (ApiError, FinetuneError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
