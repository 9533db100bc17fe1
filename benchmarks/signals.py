"""Measure `finetune cache` with the config of a benchmark's run.

    python -m benchmarks.signals model=FOLDER rows=MESSAGES.jsonl [length=2048]
                                 set=distill.objective=recover;distill.teacher.placement=cached;distill.cache=DIR

Options are those of benchmarks.ours, so rows, truncation and loss mask are the same. Seconds are those of the whole
command, with imports and loading. Equal documents are computed and counted once.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.ours import DEFAULTS, write_config
from benchmarks.peaks import Peaks
from benchmarks.processes import parse


def asked(cfg: Any) -> dict[str, int]:
    """Count the different documents of a config that have a target, their tokens and their targets."""
    from finetune.data.loader import load_chat_template, load_data
    from finetune.data.tokens.prepare import Preparation
    from finetune.distill.fingerprint import key_of
    from finetune.models.tokenizer import load_tokenizer

    chat = load_chat_template(cfg.data, load_tokenizer(cfg.model))
    documents = {
        key: document
        for document in load_data(Preparation(cfg.data, chat)).documents
        if (key := key_of(document)) is not None
    }.values()
    return {
        "documents": len(documents),
        "tokens": sum(map(len, documents)),
        "target_tokens": sum(document.target_tokens for document in documents),
    }


def main(words: list[str]) -> None:
    began = time.perf_counter()
    options = parse(words, DEFAULTS)
    from finetune import load_config
    from finetune.cli import main as finetune

    peaks = Peaks()
    overrides = [word for word in options["set"].split(";") if word]
    with tempfile.TemporaryDirectory() as name:
        file = str(write_config(options, Path(name)))
        if code := finetune(["cache", f"config={file}", *overrides]):
            raise SystemExit(code)
        seconds, peak_bytes = time.perf_counter() - began, peaks.figures()["peak_bytes"]
        cfg = load_config(file, overrides)
        counts = asked(cfg)
    size_bytes = sum(shard.stat().st_size for shard in Path(str(cfg.distill.cache)).glob("*.safetensors"))
    print(
        json.dumps(
            {
                **counts,
                "seconds": seconds,
                "bytes": size_bytes,
                "bytes_per_target": size_bytes / counts["target_tokens"],
                "tokens_per_second": counts["tokens"] / seconds,
                "peak_bytes": peak_bytes,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
