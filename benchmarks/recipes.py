"""Write the figures of the recipes to configs/recipes/figures.json: predicted for a card, measured in a training.

python -m benchmarks.recipes                   # the predictions again; seconds
python -m benchmarks.recipes measure=classify  # also the training of these recipes; minutes
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.models import write_random_model
from benchmarks.processes import ROOT, parse
from finetune.cli import main
from finetune.config.recipes import FIGURES, recipe_names
from finetune.system.resources import packaged

FILE = packaged("configs") / "recipes" / FIGURES
# The card of each prediction. A plan knows the speed of a named GPU only.
CARDS = {
    "7b-8gb": "gpu_gb=8",
    "14b-16gb": "gpu=t4",
    "32b-24gb": "gpu=4090",
    "72b-48gb": "gpu=a6000",
    "32b-2x24gb": "gpu=4090 gpus=2",
    "72b-4x24gb": "gpu=4090 gpus=4",
    "classify": "gpu=t4",
    "extract-json": "gpu=t4",
    "long-documents": "gpu=4090",
    "math": "gpu=4090",
    "pretraining": "gpu=4090",
    "reasoning": "gpu=4090",
    "small-from-large": "gpu=4090",
    "tone": "gpu=4090",
    "tool-calling": "gpu=4090",
}
# What a measured training adds to its recipe. RANDOM stands for a folder of random weights: no hub is needed.
RANDOM = "qwen2.5-0.5b-random"
TRAININGS = {
    "classify": "model=tiny data=labels train.learning_rate=5e-3 train.max_steps=60",
    "extract-json": (
        "model=tiny data=sample data.held_out=0 train.learning_rate=5e-3 data.max_length=256 train.max_steps=60"
    ),
    "laptop": f"model.name={RANDOM} data=labels data.held_out=0 train.eval_every=null train.max_steps=2",
}


def predicted(name: str) -> dict[str, Any]:
    """Return what `finetune plan` predicts for the recipe on its card."""
    words = [f"config=recipes/{name}", *CARDS[name].split()]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(["plan", *words, "--json"])
    if code:
        raise SystemExit(f"{name}: does not fit {CARDS[name]}")
    plan = json.loads(out.getvalue())
    named, several = CARDS[name].startswith("gpu="), f"{plan['ranks']} x " if plan["ranks"] > 1 else ""
    return {
        "command": " ".join(["finetune plan", *words]),
        "card": f"{several}{plan['free_bytes'] / 1e9:.0f} GB" + f" ({plan['device'].split()[0]})" * named,
        "peak_bytes": round(plan["peak_bytes"]),
        "tokens_per_second": int(float(f"{plan['tokens_per_second']:.2g}")) if named else None,
    }


def measured(name: str, folder: Path) -> dict[str, Any]:
    """Train the recipe in `folder`, and return its figures."""
    words = TRAININGS[name].replace(RANDOM, str(folder / RANDOM)).split()
    if RANDOM in TRAININGS[name]:
        write_random_model("0.5B", packaged("data") / "tiny-qwen2.5", folder / RANDOM)
    train = [sys.executable, "-m", "finetune", "train", f"config=recipes/{name}", *words]
    subprocess.run([*train, f"output_dir={folder / name}"], check=True)  # A process of its own has its own peak memory.
    result, origin = (json.loads((folder / name / f"{file}.json").read_text()) for file in ("result", "run"))
    hardware, (_, load, _) = origin["hardware"], os.getloadavg()
    made = f"python -m benchmarks.models size=0.5B folder={RANDOM} && " if RANDOM in TRAININGS[name] else ""
    return {
        "command": f"{made}finetune train config=recipes/{name} {TRAININGS[name]}",
        "card": "CPU",
        "conditions": f"{hardware['cpu']}, threads={hardware['threads']}, load={load:.0f}, {origin['started'][:10]}",
        "peak_bytes": result["peak_bytes"],
        "tokens_per_second": round(result["tokens_per_second"]),
        "exact_match_before": result["exact_match_before"],
        "exact_match_after": result["exact_match_after"],
    }


def run(options: Mapping[str, str]) -> None:
    """Write the figures; those of trainings that are not measured again stay."""
    old: dict[str, dict[str, Any]] = json.loads(FILE.read_text())
    figures = {name: old.get(name, {}) for name in recipe_names()}
    with tempfile.TemporaryDirectory() as folder:
        for name in filter(None, options["measure"].split(",")):
            figures[name]["measured"] = measured(name, Path(folder))
    for name in CARDS:
        figures[name]["predicted"] = predicted(name)
    FILE.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")
    print(f"figures: {FILE.relative_to(ROOT)}")


if __name__ == "__main__":
    run(parse(sys.argv[1:], {"measure": ""}))
