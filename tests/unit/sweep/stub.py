"""Replace `finetune train` in tests of the sweep: a short run whose results follow from its settings.

FOLDER/faults.json holds faults by run: fail (a message), nan, or seconds to sleep after the first step.
A run of a search pauses, and continues from its step; FOLDER/started.txt has a line per start.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def train(arguments: Sequence[str]) -> int:
    """Write the files of a run, and return its exit code."""
    words = dict(word.split("=", 1) for word in arguments)
    folder = Path(words["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    faults_file = folder.parent / "faults.json"
    fault = json.loads(faults_file.read_text()).get(folder.name, {}) if faults_file.exists() else {}
    with (folder.parent / "started.txt").open("a") as started:
        started.write(f"{folder.name}\n")
    (folder / "config.yaml").write_text(f"name: {words['name']}\n")
    rate, rank = float(words.get("train.learning_rate", "1e-3")), int(words.get("lora.rank", "8"))
    steps = int(words.get("train.max_steps", "3"))
    until = min(steps, int(words.get("train.pause_at", steps)))
    loss = (rate * 1000 - 2) ** 2 + rank / 100
    lines = [json.dumps({"step": step, "loss": loss + 1 / step}) + "\n" for step in range(1, until + 1)]
    metrics = folder / "metrics.jsonl"
    done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    metrics.write_text("".join(lines))
    with (folder.parent / "trained.txt").open("a") as trained:
        trained.writelines(f"{folder.name} {step}\n" for step in range(done + 1, until + 1))
    print("step 1", flush=True)
    time.sleep(fault.get("seconds", 0))
    if "fail" in fault:
        print(f"error: {fault['fail']}\n  and a second line", file=sys.stderr)
        return 2
    figures = {
        "status": "finished" if until == steps else "paused",
        "steps": until,
        "eval_loss": float("nan") if fault.get("nan") else loss + (0 if until == steps else 1 / until),
        "final_loss": loss + 1,
        "evaluations": {"eval/heldout/accuracy": 1 / (1 + loss)},
        "train_seconds": 1.0,
    }
    (folder / "result.json").write_text(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
