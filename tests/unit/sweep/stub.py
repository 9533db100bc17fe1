"""Replace `finetune train` in tests of the sweep: a short run whose results follow from its settings.

FOLDER/faults.json holds faults by run: fail (a message), nan, or seconds to sleep after the first step.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

words = dict(word.split("=", 1) for word in sys.argv[1:])
folder = Path(words["output_dir"])
folder.mkdir(parents=True, exist_ok=True)
faults_file = folder.parent / "faults.json"
fault = json.loads(faults_file.read_text()).get(folder.name, {}) if faults_file.exists() else {}
with (folder.parent / "started.txt").open("a") as started:
    started.write(f"{folder.name}\n")
(folder / "config.yaml").write_text(f"name: {words['name']}\n")
rate, rank = float(words.get("train.learning_rate", "1e-3")), int(words.get("lora.rank", "8"))
loss = (rate * 1000 - 2) ** 2 + rank / 100
lines = [{"step": step, "loss": loss + 1 / step} for step in (1, 2, 3)]
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
print("step 1", flush=True)
time.sleep(fault.get("seconds", 0))
if "fail" in fault:
    print(f"error: {fault['fail']}\n  and a second line", file=sys.stderr)
    sys.exit(2)
figures = {
    "status": "finished",
    "eval_loss": float("nan") if fault.get("nan") else loss,
    "final_loss": loss + 1,
    "evaluations": {"eval/heldout/accuracy": 1 / (1 + loss)},
    "train_seconds": 1.0,
}
(folder / "result.json").write_text(json.dumps(figures))
