"""Compare `sweep.space=auto` with a grid: the best held-out loss of 12 full runs' steps against that of 24 full runs.

    python -m benchmarks.search [seeds=0] [steps=16] [keep=FOLDER]

Both train the embedded base on its sample rows (quickstart.yaml), with sequences and steps cut so that a run takes
10 to 20 s. The grid is what a user would write: learning rates by factors of three, two ranks, three sets of targets.
A bar: the search's best loss is at most the grid's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.distill import Bar, judged, verdicts
from benchmarks.processes import ROOT, device, parse

DEFAULTS = {"seeds": "0", "steps": "16", "budget": "12", "keep": "", "results": "benchmarks/results"}
GRID = (
    "train.learning_rate=1e-3,3e-3,1e-2,3e-2",
    "lora.rank=8,32",
    "lora.target_modules=[q_proj,v_proj],[q_proj,k_proj,v_proj,o_proj],all-linear",
)
BARS: tuple[Bar, ...] = (("search", "loss_over_grid", "at_most", 1.0),)
COLUMNS = (
    ("best loss", "best_loss", 1.0, ".5f"),
    ("stored MB", "best_stored_bytes", 1e-6, ".2f"),
    ("trials", "trials", 1.0, ".0f"),
    ("steps", "steps", 1.0, ".0f"),
    ("seconds", "seconds", 1.0, ".0f"),
    ("over grid", "loss_over_grid", 1.0, ".3f"),
)


@contextmanager
def warm_launcher(folder: Path) -> Iterator[str]:
    """Yield the value of `sweep.launch` for runs that start from a process with everything imported."""
    path = folder / "warm.sock"
    server = subprocess.Popen([sys.executable, "-m", "benchmarks.warm", "serve", str(path)], cwd=ROOT)
    try:
        while not path.exists():
            time.sleep(0.1)
        yield f"{sys.executable} -m benchmarks.warm run {path}"
    finally:
        server.terminate()
        server.wait()


def sweep(folder: Path, launch: str, *words: str) -> dict[str, Any]:
    """Run a sweep and return its record and its seconds. Repeated in the same folder, it continues."""
    from finetune.cli import main

    settings = ("generation.num_examples=0", "train.batch_size=8", "data.eval.0.limit=64")
    begin = time.monotonic()
    code = main(["sweep", "config=quickstart.yaml", *settings, f"sweep.out={folder}", f"sweep.launch={launch}", *words])
    if code:
        raise SystemExit(f"the sweep in {folder} failed with exit code {code}")
    return {**json.loads((folder / "sweep.json").read_text()), "seconds": time.monotonic() - begin}


def figures_of(record: dict[str, Any], full_steps: int) -> dict[str, Any]:
    """Return the figures of a sweep: its best run, and the steps of all."""
    trials = record["trials"]
    best = min((trial for trial in trials if trial["metric"] is not None), key=lambda trial: trial["metric"])
    steps = [max(map(int, trial["rungs"]), default=0) if trial["until"] else full_steps for trial in trials]
    return {
        "best_loss": best["metric"],
        "best_settings": best["values"],
        "best_stored_bytes": (best["plan"] or {}).get("stored_bytes"),
        "trials": len(trials),
        "steps": sum(steps),
        "seconds": record["seconds"],
        "runs": [{key: trial[key] for key in ("values", "metric", "rungs", "plan")} for trial in trials],
    }


def main(words: list[str]) -> None:
    options, machine = parse(words, DEFAULTS), device()
    steps, found = f"train.max_steps={options['steps']}", {}
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as temporary, warm_launcher(Path(temporary)) as launch:
        work = Path(options["keep"] or temporary)
        work.mkdir(parents=True, exist_ok=True)
        for seed in options["seeds"].split(","):
            searched = ("sweep.space=auto", f"sweep.budget={options['budget']}", f"sweep.seed={seed}")
            for name, how in (("grid", GRID), ("search", searched)):
                record = sweep(work / f"{name}-{seed}", launch, steps, f"train.seed={seed}", *how)
                found[f"{name} {seed}"] = figures_of(record, int(options["steps"]))
            ratio = found[f"search {seed}"]["best_loss"] / found[f"grid {seed}"]["best_loss"]
            found[f"search {seed}"]["loss_over_grid"] = ratio
            report.log(report.table(found, COLUMNS))
    ratios = [figures["loss_over_grid"] for figures in found.values() if "loss_over_grid" in figures]
    bars = judged({"search": {"loss_over_grid": max(ratios)}}, BARS)
    summary = {**report.heading("search", options, machine), "sweeps": found, "bars": bars}
    report.log("\n" + "\n".join(verdicts(bars)))
    report.write(report.results_file("search", options, machine), summary)
    print(json.dumps({**summary, "sweeps": list(found)}))


if __name__ == "__main__":
    main(sys.argv[1:])
