"""Kill replicas under load, or let them run long: what clients see behind nginx, and the memory of the servers.

    python -m benchmarks.serve_replicas [requests=10000] [kill_every=500] [clients=32] [streams=0.25] [answer=8]
                                        [prompts=200] [model=data/tiny-qwen2.5] [cache=none] [minutes=0]

Two `finetune serve` run behind nginx with launch/nginx/finetune.conf.template. In the middle of each block of
`kill_every` requests one of them gets SIGKILL and is started again; the next block begins when it is ready. No client
repeats a request that is answered whole: nginx does. A stream that breaks after its first token is asked for again by
its client. Each answer is compared with that of a single request to an idle replica. `cache`: serve.cache.

minutes=30 kills nothing and runs that long instead of a number of requests; each line has the memory of the servers.
A third of those clients leaves in the middle of a stream.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks import report
from benchmarks.processes import ROOT, device, parse
from benchmarks.serve import command, free_port, percentile, question

DEFAULTS = {
    "requests": "10000",
    "kill_every": "500",
    "clients": "32",
    "streams": "0.25",
    "answer": "8",
    "prompts": "200",
    "model": "data/tiny-qwen2.5",
    "cache": "none",
    "minutes": "0",
    "results": "benchmarks/results",
}
COLUMNS = (
    ("requests", "requests", 1.0, ",.0f"),
    ("kills", "kills", 1.0, ",.0f"),
    ("right", "right", 1.0, ",.0f"),
    ("wrong", "wrong", 1.0, ",.0f"),
    ("lost", "lost", 1.0, ",.0f"),
    ("cut streams", "cut_streams", 1.0, ",.0f"),
    ("left", "left", 1.0, ",.0f"),
    ("requests/s", "requests_per_second", 1.0, ",.1f"),
    ("p50 s", "p50_seconds", 1.0, ".2f"),
    ("p99 s", "p99_seconds", 1.0, ".2f"),
)
_WORDS = 12  # of a prompt
_LINE_SECONDS = 30
_TEMPLATE = ROOT / "launch" / "nginx" / "finetune.conf.template"


class Replica:
    """A `finetune serve` that keeps its port over restarts."""

    def __init__(self, model: Path, cache: str, log: Path):
        self.port, self._log = free_port(), log
        self._command = [*command("ours", model, self.port, log.parent), f"serve.cache={cache}"]
        self.start()

    def start(self) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        with self._log.open("a") as log:
            self.process = psutil.Popen(self._command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def wait_ready(self) -> None:
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"a replica ended: {self._log.read_text()[-400:]}")
            with suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{self.port}/ready", timeout=5).status_code == 200:
                    return
            time.sleep(0.2)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def nginx(replicas: list[Replica], folder: Path) -> Iterator[str]:
    """Run nginx before the replicas and yield its URL."""
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        raise SystemExit("needs nginx")
    port, site = free_port(), _TEMPLATE.read_text()
    values = {"PORT": f"127.0.0.1:{port}"} | {f"REPLICA_{i}": f"127.0.0.1:{r.port}" for i, r in enumerate(replicas, 1)}
    for name, value in values.items():
        site = site.replace(f"${{{name}}}", value)
    paths = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in "client_body proxy fastcgi uwsgi scgi".split())
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/pid; events {{}} http {{ access_log off; {paths} {site} }}"
    )
    words = [program, "-e", str(folder / "error.log"), "-p", str(folder), "-c", str(folder / "nginx.conf")]
    process = subprocess.Popen(words)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


class Clients:
    """Asks for answers and compares them.

    expected: answers by prompt. counts: what became of the requests. seconds: of each.
    """

    def __init__(self, model: str, options: dict[str, str]):
        self._model, self._answer = model, int(options["answer"])
        self._streams, self._leave = float(options["streams"]), float(options["minutes"]) > 0
        self.prompts = [question(number, _WORDS) for number in range(int(options["prompts"]))]
        self.expected: dict[str, str] = {}
        self.counts: Counter[str] = Counter()
        self.seconds: list[float] = []

    def body(self, prompt: str, stream: bool) -> dict[str, Any]:
        settings = {"max_tokens": self._answer, "temperature": 0, "ignore_eos": True}
        return {"model": self._model, "prompt": prompt, "stream": stream, **settings}

    async def learn(self, url: str) -> None:
        """Ask an idle replica for every answer, one after another."""
        async with httpx.AsyncClient(base_url=url, timeout=600) as client:
            for prompt in self.prompts:
                reply = await client.post("/v1/completions", json=self.body(prompt, False))
                reply.raise_for_status()
                self.expected[prompt] = reply.json()["choices"][0]["text"]

    async def one(self, client: httpx.AsyncClient, number: int) -> None:
        """Send request `number` and count what comes back."""
        choose = random.Random(number)
        prompt, began = choose.choice(self.prompts), time.perf_counter()
        try:
            if choose.random() >= self._streams:
                text = await self._whole(client, prompt)
            elif self._leave and choose.random() < 1 / 3:
                await self._begin(client, prompt)
                return
            else:
                text = await self._stream(client, prompt)
        except (httpx.HTTPError, ValueError) as error:
            self.counts["lost"] += 1
            report.log(f"request {number}: {type(error).__name__}: {str(error)[:200]}")
            return
        self.counts["right" if text == self.expected[prompt] else "wrong"] += 1
        self.seconds.append(time.perf_counter() - began)

    async def _whole(self, client: httpx.AsyncClient, prompt: str) -> str:
        reply = await client.post("/v1/completions", json=self.body(prompt, False))
        if reply.status_code != 200:
            raise ValueError(f"{reply.status_code} {reply.text}")
        return reply.json()["choices"][0]["text"]

    async def _stream(self, client: httpx.AsyncClient, prompt: str) -> str:
        while True:
            text, ended = "", False
            try:
                async with client.stream("POST", "/v1/completions", json=self.body(prompt, True)) as reply:
                    if reply.status_code != 200:
                        raise ValueError(f"{reply.status_code} {(await reply.aread()).decode()}")
                    async for line in reply.aiter_lines():
                        ended = ended or line == "data: [DONE]"
                        if line.startswith("data: {"):
                            text += json.loads(line[6:])["choices"][0]["text"]
            except httpx.RemoteProtocolError:
                ended = False
            if ended:
                return text
            if not self.expected[prompt].startswith(text):
                return text
            self.counts["cut_streams"] += 1

    async def _begin(self, client: httpx.AsyncClient, prompt: str) -> None:
        async with client.stream("POST", "/v1/completions", json=self.body(prompt, True)) as reply:
            async for _ in reply.aiter_lines():
                self.counts["left"] += 1
                return


async def in_turn(numbers: Iterator[int], clients: int, one: Callable[[int], Awaitable[None]]) -> None:
    """Run `one` for every number, as many at the same time as there are clients."""

    async def work() -> None:
        for number in numbers:
            await one(number)

    await asyncio.gather(*(work() for _ in range(clients)))


def http_client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None), trust_env=False)


async def kill_under_load(url: str, replicas: list[Replica], clients: Clients, options: dict[str, str]) -> int:
    """Answer all requests while replicas are killed; return how many were."""
    count, block_of = int(options["requests"]), int(options["kill_every"])
    back = [asyncio.Event() for _ in range(-(-count // block_of))]
    kills = []

    async def kill(block: int) -> None:
        replica = random.Random(block).choice(replicas)
        replica.kill()
        replica.start()
        await asyncio.to_thread(replica.wait_ready)
        report.log(f"kill {block + 1}: {dict(clients.counts)}")
        back[block].set()

    async with http_client(url) as client:

        async def one(number: int) -> None:
            block, place = divmod(number, block_of)
            if block:
                await back[block - 1].wait()
            if place == block_of // 2:
                kills.append(asyncio.create_task(kill(block)))
            await clients.one(client, number)

        await in_turn(iter(range(count)), int(options["clients"]), one)
        await asyncio.gather(*kills)
    return len(kills)


async def run_long(url: str, replicas: list[Replica], clients: Clients, options: dict[str, str]) -> list[Any]:
    """Answer requests for some minutes; return (minutes, bytes of each replica) at each line."""
    began, memory = time.monotonic(), []
    end = began + 60 * float(options["minutes"])

    async def watch() -> None:
        while True:
            used = [replica.process.memory_info().rss for replica in replicas]
            memory.append([(time.monotonic() - began) / 60, *used])
            megabytes = ", ".join(f"{each / 1e6:,.1f} MB" for each in used)
            report.log(f"minute {memory[-1][0]:.1f}: {megabytes}, {dict(clients.counts)}")
            await asyncio.sleep(_LINE_SECONDS)

    watching = asyncio.create_task(watch())
    async with http_client(url) as client:
        numbers = itertools.takewhile(lambda _: time.monotonic() < end, itertools.count())
        await in_turn(numbers, int(options["clients"]), lambda number: clients.one(client, number))
    watching.cancel()
    return memory


def main(words: list[str]) -> None:
    options = parse(words, DEFAULTS)
    model, long = Path(options["model"]).resolve(), float(options["minutes"]) > 0
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        replicas = []
        for number in (1, 2):
            replicas.append(Replica(model, options["cache"], folder / f"replica-{number}.log"))
            stack.callback(lambda replica=replicas[-1]: replica.kill())
        for replica in replicas:
            replica.wait_ready()
        clients = Clients(model.name, options)
        asyncio.run(clients.learn(f"http://127.0.0.1:{replicas[0].port}"))
        url = stack.enter_context(nginx(replicas, folder))
        began, run = time.perf_counter(), run_long if long else kill_under_load
        found: Any = asyncio.run(run(url, replicas, clients, options))
        seconds = time.perf_counter() - began
    counts = {name: clients.counts[name] for name in ("right", "wrong", "lost", "cut_streams", "left")}
    requests = sum(counts.values()) - counts["cut_streams"]
    figures = {
        "requests": requests,
        "kills": 0 if long else found,
        **counts,
        "requests_per_second": requests / seconds,
        **{f"p{p}_seconds": percentile(clients.seconds, p) for p in (50, 99)},
    }
    here = device()
    summary = report.heading("serve_replicas", {**options, "model": model.name}, here)
    summary |= figures | ({"minutes_and_bytes": found} if long else {})
    name = "serve_replicas_long" if long else "serve_replicas"
    report.conclude(name, options, here, summary, report.table({"nginx": figures}, COLUMNS))


if __name__ == "__main__":
    main(sys.argv[1:])
