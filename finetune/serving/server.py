"""Listen, answer, and end: the embedded engine behind HTTP and gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import shlex
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.config.command_options import ServeOptions
from finetune.config.schema import RunConfig
from finetune.system.console import log
from finetune.system.errors import FinetuneError, InputError, Interrupted, MissingExtra

if TYPE_CHECKING:
    from finetune.serving.service import Service

KEY_VARIABLE = "FINETUNE_API_KEY"
_BACKLOG = 2048
# For connections that are open after the last answer.
_CLOSING_SECONDS = 5
_EXTRAS = {"serve": ("fastapi", "uvicorn", "prometheus_client"), "grpc": ("grpc", "tritonclient")}


def serve(config: RunConfig, options: ServeOptions, adapters: Mapping[str, Path]) -> int:
    """Answer requests with the embedded engine until SIGTERM or Ctrl+C, and return the exit code.

    Args:
        config: of the base.
        adapters: folders by name.

    Raises:
        InputError: the port is taken, or the host is not of this machine; MissingExtra without the libraries.
        ConfigError: the base or an adapter cannot be served.
        IntegrityError: a model does not answer as it was trained to.
        Interrupted: a second signal ended running answers.
    """
    _check_libraries(options)
    key = api_key(options.host)
    with listen(options.host, options.port) as listening, _answers_while_loading(listening) as end_loading:
        from finetune.serving.loading import load_service  # imports torch

        service = load_service(config, options, adapters)
        asyncio.run(_serve(service, options, listening, key, end_loading))
    return 0


def api_key(host: str) -> str | None:
    """Return the key that clients must send; warn if others than this machine reach the server without one."""
    key = os.environ.get(KEY_VARIABLE, "").strip() or None
    if key is None and not _is_loopback(host):
        log(f"WARNING: host={host}: everybody who reaches this address may ask; set {KEY_VARIABLE} to require a key")
    return key


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises: InputError if the port is taken or the host is not of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise InputError(
            f"host={host} port={port}: cannot listen there: {error.strerror or error}\n"
            "help: choose another one with port=, or port=0 for any free one"
        ) from error


def _check_libraries(options: ServeOptions) -> None:
    wanted = ["serve", *([] if options.serve.grpc_port is None else ["grpc"])]
    for extra in wanted:
        if missing := [name for name in _EXTRAS[extra] if find_spec(name) is None]:
            raise MissingExtra(f'finetune serve needs {", ".join(missing)}: pip install "finetune-qlora[{extra}]"')


class _Starting(BaseHTTPRequestHandler):
    """Says alive, and not ready."""

    def do_GET(self) -> None:
        alive = self.path == "/health"
        body = json.dumps({"status": "starting"}).encode()
        self.send_response(200 if alive else 503)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Retry-After", "5")
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


@contextlib.contextmanager
def _answers_while_loading(listening: socket.socket) -> Iterator[Callable[[], None]]:
    """Answer /health, and 503 to all else, until the yielded function is called or the block ends."""
    server = ThreadingHTTPServer(listening.getsockname()[:2], _Starting, bind_and_activate=False)
    server.socket.close()
    server.socket = listening
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()

    def end() -> None:
        if thread.is_alive():
            server.shutdown()
            thread.join()

    try:
        yield end
    finally:
        end()


async def _serve(
    service: Service,
    options: ServeOptions,
    listening: socket.socket,
    key: str | None,
    end_loading: Callable[[], None],
) -> None:
    """Answer until a signal, then let the running answers end, within `serve.drain_seconds`."""
    import uvicorn

    from finetune.serving.http.app import build_app

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Leave the signals to this module: answers end before connections do."""
            yield

    server = Server(
        uvicorn.Config(
            build_app(service, api_key=key),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=_CLOSING_SECONDS,
        )
    )
    await service.warm_up()
    grpc = None
    if options.serve.grpc_port is not None:
        from finetune.serving.grpc import start_grpc

        grpc = await start_grpc(service, options.host, options.serve.grpc_port, key)
    signals = _signals()
    end_loading()
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    service.ready = True
    print("\n".join(_block(service, listening, None if grpc is None else grpc.port, key)), flush=True)
    await _first_of(serving, signals.get())
    if serving.done():
        raise FinetuneError(f"the HTTP server ended by itself: {serving.exception()}")
    log("serve: draining; a second signal ends at once")
    again = asyncio.create_task(signals.get())
    drained = asyncio.create_task(service.drain(options.serve.drain_seconds))
    await _first_of(drained, again)
    server.should_exit, server.force_exit = True, again.done()
    await serving
    if grpc is not None:
        await grpc.stop(0 if again.done() else _CLOSING_SECONDS)
    await service.close()
    if again.done():
        raise Interrupted(again.result(), "ended by a second signal; running answers were cut")
    again.cancel()
    if not drained.result():
        log(f"WARNING: serve.drain_seconds={options.serve.drain_seconds:g} passed; running answers were cut")


def _signals() -> asyncio.Queue[int]:
    """Return a queue that gets the numbers of signals."""
    found: asyncio.Queue[int] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, found.put_nowait, int(number))
    return found


async def _first_of(*awaited: Any) -> None:
    tasks = [asyncio.ensure_future(one) for one in awaited]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


def _block(service: Service, listening: socket.socket, grpc_port: int | None, key: str | None) -> Sequence[str]:
    """Return the lines that say what is served where."""
    host, port = listening.getsockname()[:2]
    model = next((name for name, one in service.models.items() if one.adapter is not None), next(iter(service.models)))
    lines = describe(address_of(host, port), list(service.models), model, key)
    return [
        *lines,
        f"page:     {address_of(host, port)}/",
        *([] if grpc_port is None else [f"gRPC:     {address_of(host, grpc_port).removeprefix('http://')}"]),
    ]


def address_of(host: str, port: int) -> str:
    """Return the URL at which this machine reaches a server that listens at a host."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def describe(url: str, models: Sequence[str], asked: str, key: str | None) -> list[str]:
    """Return the lines about a server that is ready. asked: the model of the example."""
    header = "" if key is None else f' -H "Authorization: Bearer ${KEY_VARIABLE}"'
    body = json.dumps({"model": asked, "messages": [{"role": "user", "content": "Hello"}]})
    return [
        f"models:   {', '.join(models)}",
        f"address:  {url}/v1",
        f"try:      curl {url}/v1/chat/completions -H 'Content-Type: application/json'{header} -d {shlex.quote(body)}",
    ]
