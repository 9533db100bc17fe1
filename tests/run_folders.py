"""Folders of runs for tests, written by hand: what a training leaves, without the training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from finetune.config.compose import load_config, to_yaml


def metric(step: int, **figures: float) -> dict[str, float]:
    """A line of metrics.jsonl."""
    line = {
        "step": step,
        "loss": 3 / (step + 1),
        "learning_rate": 1e-4,
        "grad_norm": 1.0 + math.sin(step),
        "tokens": 100,
        "target_tokens": 50,
        "tokens_per_second": 1000.0 + step,
        "peak_bytes": 2**30 + step * 2**20,
        "seconds": 0.1,
    }
    return {**line, **figures}


def write_run(folder: Path, *overrides: str, steps: int = 20, **result: Any) -> Path:
    """A finished run of the quickstart, evaluated every ten steps."""
    folder.mkdir(parents=True, exist_ok=True)
    config = load_config("quickstart.yaml", [f"output_dir={folder}", *overrides])
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    lines = []
    for step in range(1, steps + 1):
        held_out = {"eval_loss": 4 / (step + 1), "eval/heldout/loss": 4 / (step + 1), "eval/heldout/accuracy": 0.5}
        lines.append(metric(step, **(held_out if step % 10 == 0 else {})))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = {
        "status": "finished",
        "steps": steps,
        "target_tokens": 50 * steps,
        "final_loss": 3 / (steps + 1),
        "eval_loss": 4 / (steps + 1),
        "evaluations": {},
        "train_seconds": 61.0,
        "tokens_per_second": 1000.0,
        "peak_bytes": 2**30,
        "adapter": str(folder),
        "error": None,
    }
    (folder / "result.json").write_text(json.dumps({**figures, **result}))
    (folder / "run.json").write_text(json.dumps({"versions": {"torch": "2.13"}, "seed": 0, "world_size": 1}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder
