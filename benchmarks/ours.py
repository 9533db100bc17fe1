"""Run `finetune.train` on a config for a benchmark.

    python -m benchmarks.ours model=FOLDER rows=MESSAGES.jsonl [steps=4] [length=2048] [batch=1] [micro=1]
                              [set=key=value;…] [reward=true]

With `reward=true` it learns from the rewards of benchmarks/stock.py.

Seconds and tokens come from the run's metrics.jsonl: a step is data, forward, backward, clipping and optimizer.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from benchmarks.peaks import Peaks
from benchmarks.processes import parse
from benchmarks.stock import reward_by_number

DEFAULTS = {
    "model": "",
    "rows": "",
    "steps": "4",
    "length": "2048",
    "batch": "1",
    "micro": "1",
    "rank": "8",
    "targets": "q_proj,v_proj",
    "train_on": "last",
    "seed": "0",
    "set": "",
    "reward": "false",
}


def write_config(options: Mapping[str, str], folder: Path) -> Path:
    """Return the YAML of the run."""
    targets = options["targets"]
    config = {
        "output_dir": str(folder / "run"),
        "model": {"name": options["model"]},
        "lora": {
            "rank": int(options["rank"]),
            "target_modules": targets if targets == "all-linear" else targets.split(","),
        },
        # Long rows are cut off, as in TRL. One process tokenizes: for a few hundred rows, more are slower.
        "data": {
            "train": [{"path": options["rows"]}],
            "max_length": int(options["length"]),
            "truncation": "right",
            "train_on": options["train_on"],
            "workers": 1,
        },
        "train": {
            "max_steps": int(options["steps"]),
            "batch_size": int(options["batch"]),
            "warmup_ratio": 0,
            "micro_batch_size": min(int(options["micro"]), int(options["batch"])),
            "schedule": "constant",
            "seed": int(options["seed"]),
        },
    }
    file = folder / "benchmark.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file


def split_training(peaks: Peaks) -> None:
    """Reset the peak at the start of the loop, between loading and training: at the recipe's `fit`."""
    from finetune.training import recipe

    fit = recipe.fit

    def watched(*arguments: Any, **hooks: Any) -> None:
        peaks.training_begins()
        fit(*arguments, **hooks)

    recipe.fit = watched


def square_mean_length(cfg: Any) -> float:
    """Return the sum of squared row lengths over the sum of lengths, in tokens, from the run's token cache."""
    from finetune.data.loader import load_chat_template
    from finetune.data.tokens.prepare import Preparation
    from finetune.models.tokenizer import load_tokenizer

    chat = load_chat_template(cfg.data, load_tokenizer(cfg.model))
    lengths = Preparation(cfg.data, chat, objective=cfg.row_objective).store(cfg.data.train[0]).lengths
    lengths = lengths.clip(max=cfg.data.max_length).astype("float64")
    return float((lengths**2).sum() / lengths.sum())


def kernels() -> dict[str, Any]:
    """Return whether the kernels of this process are compiled, and the names of those that failed."""
    from finetune.ops.dispatch import STATE

    return {"compiled": STATE.compiled, "failed": sorted(STATE.failed)}


def main(words: list[str]) -> None:
    began = time.perf_counter()
    options = parse(words, DEFAULTS)
    from finetune import load_config, train

    peaks = Peaks()
    split_training(peaks)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overrides = [word for word in options["set"].split(";") if word]
        cfg = load_config(str(write_config(options, folder)), overrides)
        train(cfg, reward_functions=[reward_by_number] if options["reward"] == "true" else ())
        seconds = time.perf_counter() - began
        figures = peaks.figures()
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        kept = ("seconds", "tokens", "target_tokens", "computed_tokens", "loss", "train/sampling_seconds")
        steps = [
            {key.removeprefix("train/"): step[key] for key in kept if key in step} for step in map(json.loads, lines)
        ]
        spread = square_mean_length(cfg)
    # Time outside the steps: imports, loading, quantizing, tokenizing, saving the adapter.
    start_seconds = seconds - sum(step["seconds"] for step in steps)
    figures |= {"steps": steps, "start_seconds": start_seconds, "square_mean_length": spread, "kernels": kernels()}
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
