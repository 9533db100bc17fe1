"""Compare tokenizing chats with a loss mask: ours, and `datasets.map` with TRL's training template, alternating.

    python -m benchmarks.data rows=train.jsonl tokenizer=FOLDER [processes=2] [repeats=3] [megabytes=64]

Rows are prompt/completion pairs or messages, repeated until the file has `megabytes`. A number before the prompt keeps
them different. Every run is a fresh process with an empty cache. Time is from opening the file to tokens on disk,
without imports. Memory is the sum of PSS over parent and workers.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

DEFAULTS = {
    "rows": "data/sample/train.jsonl",
    "tokenizer": "data/tiny-qwen2.5",
    "processes": "2",
    "repeats": "3",
    "megabytes": "64",
    "run": "",
}


def ours(file: Path, tokenizer_folder: str, processes: int, cache: str) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from finetune.config.schema import DataConfig, SourceConfig
    from finetune.data.template.chat import ChatTemplate
    from finetune.data.tokens.prepare import Preparation

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    start = time.perf_counter()
    cfg = DataConfig(train=[SourceConfig(path=str(file))], workers=processes, cache=cache)
    store = Preparation(cfg, ChatTemplate(tokenizer)).store(cfg.train[0])
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": int(store.lengths.sum()), "targets": int((store.targets).sum())}


def datasets_map(file: Path, tokenizer_folder: str, processes: int, cache: str) -> dict[str, Any]:
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl.chat_template_utils import get_training_chat_template

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    template = get_training_chat_template(tokenizer)

    def tokenize(batch: Mapping[str, list]) -> Mapping[str, list]:
        encoded = tokenizer.apply_chat_template(
            batch["messages"], chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": encoded["input_ids"], "assistant_masks": encoded["assistant_masks"]}

    start = time.perf_counter()
    rows = load_dataset("json", data_files=str(file), split="train", cache_dir=cache)
    done = rows.map(tokenize, batched=True, num_proc=processes if processes > 1 else None, remove_columns=["messages"])
    seconds = time.perf_counter() - start
    tokens = sum(map(len, done["input_ids"]))
    return {"seconds": seconds, "tokens": tokens, "targets": sum(map(sum, done["assistant_masks"]))}


RUNS = {"ours": ours, "datasets.map": datasets_map}


def write_rows(source: Path, target: Path, size_bytes: int) -> None:
    """Write a JSONL of messages of at least that size, without equal rows."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    with target.open("w", encoding="utf-8") as file:
        for number in itertools.count():
            row = rows[number % len(rows)]
            messages = row.get("messages") or list(_as_messages(row))
            first = {**messages[0], "content": f"({number}) {messages[0]['content']}"}
            file.write(json.dumps({"messages": [first, *messages[1:]]}, ensure_ascii=False) + "\n")
            if number % 100 == 0 and file.tell() >= size_bytes:
                return


def _as_messages(row: Mapping[str, str]) -> Iterator[dict[str, str]]:
    prompt, completion = list(row.values())[:2]
    yield {"role": "user", "content": prompt}
    yield {"role": "assistant", "content": completion}


class PeakMemory(threading.Thread):
    """Return the largest sum of PSS over a process and its children, sampled while it runs."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid, self.peak_bytes, self.done = pid, 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.25):
            self.peak_bytes = max(self.peak_bytes, sum(map(_pss_bytes, _family(self.pid))))


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        threads = [p for t in Path(f"/proc/{pid}/task").iterdir() for p in (t / "children").read_text().split()]
    except OSError:
        return []
    return [pid, *(p for child in {*children, *threads} for p in _family(int(child)))]


def _pss_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def measure(name: str, file: Path, options: Mapping[str, str]) -> dict[str, Any]:
    """Measure one run in a fresh process with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        words = [f"{key}={options[key]}" for key in ("tokenizer", "processes")]
        command = [sys.executable, "-m", "benchmarks.data", f"run={name}", f"rows={file}", *words]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": cache, "BENCHMARK_CACHE": cache},
        )
        watcher = PeakMemory(process.pid)
        watcher.start()
        output, _ = process.communicate()
        watcher.done.set()
    if process.returncode:
        raise SystemExit(f"{name} failed with exit code {process.returncode}")
    return {**json.loads(output.splitlines()[-1]), "peak_bytes": watcher.peak_bytes}


def main(words: list[str]) -> None:
    options = DEFAULTS | dict(word.split("=", 1) for word in words)
    if options["run"]:
        run = RUNS[options["run"]]
        result = run(
            Path(options["rows"]), options["tokenizer"], int(options["processes"]), os.environ["BENCHMARK_CACHE"]
        )
        print(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(Path(options["rows"]), file, int(float(options["megabytes"]) * 1e6))
        size_bytes = file.stat().st_size
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in RUNS}
        for _ in range(int(options["repeats"])):
            for name in RUNS:
                runs[name].append(measure(name, file, options))
                last = runs[name][-1]
                print(
                    f"{name:<14}{last['tokens'] / last['seconds']:>12,.0f} tokens/s"
                    f"{last['peak_bytes'] / 1e6:>10,.0f} MB",
                    file=sys.stderr,
                )
    speed = {name: median(run["tokens"] / run["seconds"] for run in done) for name, done in runs.items()}
    summary = {
        "benchmark": "data",
        "date": date.today().isoformat(),
        "processes": int(options["processes"]),
        "cores": len(os.sched_getaffinity(0)),
        "file_bytes": size_bytes,
        "tokens": {name: done[-1]["tokens"] for name, done in runs.items()},
        "targets": {name: done[-1]["targets"] for name, done in runs.items()},
        "tokens_per_second": speed,
        "ratio": speed["ours"] / speed["datasets.map"],
        "peak_bytes": {name: max(run["peak_bytes"] for run in done) for name, done in runs.items()},
    }
    results = Path(__file__).parent / "results" / f"data-cpu-{summary['date']}.json"
    results.parent.mkdir(exist_ok=True)
    results.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary))


if __name__ == "__main__":
    main(sys.argv[1:])
