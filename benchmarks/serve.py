"""Measure servers of one model: tokens/s, time to the first token and between tokens, by number of clients.

    python -m benchmarks.serve [size=0.5B] [layers=] [tokenizer=FOLDER] [model=FOLDER] [clients=1,8,32] [prompt=64]
                               [answer=32] [requests=2] [repeats=2] [servers=ours,transformers,llamacpp]

ours           finetune serve in 16 bit; ours-nf4: in 4 bit
transformers   transformers serve --continuous-batching; transformers-plain: without
llamacpp       llama-server, from PATH, with the model as GGUF in bf16
vllm           vllm serve, on a GPU

A server is started for each turn, gets one request to warm up and then those of every number of clients. A client sends
its requests one after another and reads each answer as a stream. All servers get the same chat requests: greedy, no
two alike. A random model almost never ends an answer, and each answer must have `answer` tokens. The table shows
milliseconds to the first piece of an answer and between its pieces.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from typing import Any

import httpx

from benchmarks import report
from benchmarks.figures import medians
from benchmarks.models import write_random_model
from benchmarks.processes import ROOT, device, parse, work_folder

DEFAULTS = {
    "size": "0.5B",
    "layers": "",
    "tokenizer": "data/tiny-qwen2.5",
    "model": "",
    "clients": "1,8,32",
    "prompt": "64",
    "answer": "32",
    "requests": "2",
    "repeats": "2",
    "servers": "ours,transformers,llamacpp",
    "minutes": "10",
    "work": "",
    "results": "benchmarks/results",
}
COLUMNS = (
    ("tokens/s", "tokens_per_second", 1.0, ",.1f"),
    ("first p50", "first_p50_seconds", 1e3, ",.0f"),
    ("first p99", "first_p99_seconds", 1e3, ",.0f"),
    ("next p50", "next_p50_seconds", 1e3, ",.1f"),
    ("next p99", "next_p99_seconds", 1e3, ",.1f"),
)
_WORDS = "river stone lamp green seven market paper window cloud engine letter garden silver road winter music".split()


def command(server: str, model: Path, port: int, folder: Path) -> list[str]:
    """Return the command that serves a model folder at a port."""
    python, cuda = sys.executable, device()["kind"] == "cuda"
    match server:
        case "ours" | "ours-nf4":
            quant = "nf4" if server == "ours-nf4" else "none"
            words = ["serve.check_rows=0", "serve.context_tokens=4096", f"quant.type={quant}", f"port={port}"]
            return [python, "-m", "finetune", "serve", f"model={model}", *words]
        case "transformers" | "transformers-plain":
            batching = ["--continuous-batching"] if server == "transformers" else []
            words = ["--dtype", "bfloat16", "--device", "cuda" if cuda else "cpu", "--port", str(port), *batching]
            return [str(Path(python).with_name("transformers")), "serve", str(model), *words]
        case "llamacpp":
            file = gguf_of(model, folder)
            words = ["--ctx-size", str(32 * 4096), "--parallel", "32", "--port", str(port), "--threads", "2"]
            return ["llama-server", "-m", str(file), *words]
        case "vllm":
            return ["vllm", "serve", str(model), "--port", str(port), "--max-model-len", "4096"]
    raise SystemExit(f"servers={server}: unknown; see --help")


def gguf_of(model: Path, folder: Path) -> Path:
    """Return the model as GGUF in bf16, written once."""
    out = folder / f"{model.name}-gguf"
    if not out.is_dir():
        words = ["format=gguf", "type=bf16", "verify=false", f"model={model}", f"out={out}"]
        subprocess.run([sys.executable, "-m", "finetune", "export", *words], check=True, cwd=ROOT, stdout=sys.stderr)
    return next(out.glob("*.gguf"))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def served(server: str, model: Path, options: dict[str, str]) -> Iterator[str]:
    """Start a server and yield the root of its API; it and its children end afterwards."""
    port = free_port()
    words = command(server, model, port, work_folder(options["work"]))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(words, stdout=said, stderr=said, env=environment, start_new_session=True, cwd=ROOT)
        try:
            root = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 60 * float(options["minutes"])
            while not _answers(root):
                if process.poll() is not None or time.monotonic() > deadline:
                    said.seek(0)
                    raise RuntimeError(f"{server} does not start: {''.join(said.readlines()[-5:]).strip()[-400:]}")
                time.sleep(0.2)
            yield f"{root}/v1"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(root: str) -> bool:
    for path in ("/ready", "/health"):
        try:
            status = httpx.get(root + path, timeout=5).status_code
        except httpx.HTTPError:
            return False
        if status != 404:
            return status == 200
    return False


def question(number: int, words: int) -> str:
    """Return a text of its own for each number."""
    return " ".join(_WORDS[(number * 7 + i * (number % 5 + 1)) % len(_WORDS)] for i in range(words)) + f" {number}"


async def ask(client: httpx.AsyncClient, url: str, body: Mapping[str, Any], text: str, answer: int) -> list[float]:
    """Send one request; return the times of its start and of each piece of its answer."""
    body = {
        **body,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": answer,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    moments, tokens, reason = [time.perf_counter()], None, None
    async with client.stream("POST", f"{url}/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"HTTP {response.status_code}: {(await response.aread())[:300]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            piece = json.loads(line.removeprefix("data: "))
            tokens = (piece.get("usage") or {}).get("completion_tokens", tokens)
            for choice in piece.get("choices", []):
                reason = choice.get("finish_reason") or reason
                if (choice.get("delta") or {}).get("content"):
                    moments.append(time.perf_counter())
    if tokens not in (None, answer) or reason != "length":
        raise RuntimeError(f"an answer of {tokens} tokens, finish_reason={reason}, expected {answer}")
    return moments


async def clients(
    url: str, body: Mapping[str, Any], texts: Sequence[Sequence[str]], answer: int
) -> dict[str, float | None]:
    """Let each client send its texts, all clients at once; return the figures."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=600, limits=limits, trust_env=False) as client:

        async def one(own: Sequence[str]) -> list[list[float]]:
            return [await ask(client, url, body, text, answer) for text in own]

        began = time.perf_counter()
        answers = [each for own in await asyncio.gather(*map(one, texts)) for each in own]
        seconds = time.perf_counter() - began
    first = [moments[1] - moments[0] for moments in answers]
    following = [later - earlier for moments in answers for earlier, later in pairwise(moments[1:])]
    return {
        "tokens_per_second": len(answers) * answer / seconds,
        **{f"first_p{p}_seconds": percentile(first, p) for p in (50, 99)},
        **{f"next_p{p}_seconds": percentile(following, p) for p in (50, 99)},
    }


def percentile(values: Sequence[float], percent: int) -> float | None:
    """Return a percentile; None without values: some servers hold an answer of white space back until its end."""
    if not values:
        return None
    return quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def turn(server: str, model: Path, options: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Start a server and measure it with every number of clients."""
    counts = [int(count) for count in options["clients"].split(",")]
    answer, words, each = (int(options[key]) for key in ("answer", "prompt", "requests"))
    try:
        with served(server, model, options) as url:
            # That of transformers lists its cache, not its model.
            loads_any = server.startswith("transformers")
            name = str(model) if loads_any else httpx.get(f"{url}/models", timeout=60).json()["data"][0]["id"]
            # A trained model ends its answers; two of the servers can be told not to.
            body = {"model": name} | ({"ignore_eos": True} if server.startswith(("ours", "vllm")) else {})
            asyncio.run(clients(url, body, [[question(0, words)]], answer))
            found, number = {}, 1
            for count in counts:
                texts = [[question(number + i * each + j, words) for j in range(each)] for i in range(count)]
                number += count * each
                found[f"{server} {count}"] = asyncio.run(clients(url, body, texts, answer))
            return found
    except (RuntimeError, OSError, httpx.HTTPError) as error:
        return {f"{server} {count}": {"failed": f"{type(error).__name__}: {error}"[:400]} for count in counts}


def main(words: list[str]) -> None:
    options = parse(words, DEFAULTS)
    layers = int(options["layers"]) if options["layers"] else None
    folder = work_folder(options["work"]) / f"qwen2.5-{options['size']}{f'-{layers}' if layers else ''}"
    model = Path(options["model"]) if options["model"] else folder
    if not options["model"]:
        write_random_model(options["size"], Path(options["tokenizer"]), model, layers=layers)
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for _ in range(int(options["repeats"])):
        for server in options["servers"].split(","):
            if server in ("llamacpp", "vllm") and not shutil.which({"llamacpp": "llama-server"}.get(server, server)):
                report.log(f"{server}: not on PATH")
                continue
            lines = turn(server, model.resolve(), options)
            report.log(report.table(lines, COLUMNS))
            for name, figures in lines.items():
                runs[name].append(figures)
    here = device()
    summary = report.heading("serve", {**options, "model": Path(options["model"]).name}, here)
    summary["servers"] = {name: medians(done) for name, done in runs.items()}
    report.conclude("serve", options, here, summary, report.table(summary["servers"], COLUMNS))


if __name__ == "__main__":
    main(sys.argv[1:])
