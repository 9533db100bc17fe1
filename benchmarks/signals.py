"""Measure `finetune cache` with the config of a benchmark's run.

    python -m benchmarks.signals model=FOLDER rows=MESSAGES.jsonl [length=2048]
                                 set=distill.objective=recover;distill.teacher.placement=cached;distill.cache=DIR

With set=preference.objective=dpo;preference.cache=DIR it measures the cache of a reference: its documents are answers.
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

from benchmarks import report
from benchmarks.ours import DEFAULTS, write_config
from benchmarks.peaks import Peaks
from benchmarks.processes import parse


def asked(cfg: Any) -> dict[str, int]:
    """Count the different documents of a config that have a target, their tokens and their targets."""
    from finetune.data.loader import load_all_rows
    from finetune.distill.fingerprint import key_of
    from finetune.objectives.preference import answers_of

    rows = load_all_rows(cfg, report.log)[2].documents
    given = rows if cfg.preference.objective == "none" else answers_of(rows)
    documents = {key: document for document in given if (key := key_of(document)) is not None}.values()
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
    folder = Path(cfg.preference.cache or cfg.distill.cache)
    size_bytes = sum(file.stat().st_size for ending in ("safetensors", "npz") for file in folder.glob(f"*.{ending}"))
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
