"""Measure two ranks that share a base over a link of limited rate, beside what the plan predicts.

    python -m benchmarks.links [size=0.5B] [layers=12] [length=128] [rates=100,50] [steps=3]

Needs root: two network namespaces are two hosts, joined by a virtual Ethernet link whose rate (megabits/s and
direction) tc limits. Each host runs one rank, as torchrun starts it, over gloo. `predicted` is a step on the unlimited
link, which includes computing and the copies of gathered weights, with the seconds that the plan's model waits for a
link of that rate. Bytes are those of the first host's interface, with headers and acknowledgements.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.processes import ROOT, device, parse, work_folder

DEFAULTS = {
    "size": "0.5B",
    "layers": "12",
    "length": "128",
    "rates": "100,50",
    "steps": "3",
    "tokenizer": "data/tiny-qwen2.5",
    "work": "",
    "results": "",
}
_LIMIT_SECONDS = 1800.0
_POLL_SECONDS = 0.02


def settings(model: Path, options: dict[str, str], shard: str) -> list[str]:
    """Return the overrides of quickstart.yaml."""
    return [
        f"model.name={model}",
        f"data.max_length={options['length']}",
        "data.eval=[]",
        "generation.num_examples=0",
        "train.batch_size=2",
        "train.micro_batch_size=1",
        f"train.max_steps={options['steps']}",
        "train.world_size=2",
        "train.compile=false",
        f"parallel.shard={shard}",
    ]


def sent_bytes(host: Any) -> int:
    """Return the bytes that a host's end of the link has sent."""
    from tests.network import INTERFACE

    file = f"/sys/class/net/{INTERFACE}/statistics/tx_bytes"
    done = subprocess.run(["ip", "netns", "exec", host.name, "cat", file], capture_output=True, text=True, check=True)
    return int(done.stdout)


def train_on_hosts(hosts: Sequence[Any], words: list[str], folder: Path) -> dict[str, Any]:
    """Train on both hosts; return the seconds and the sent bytes of each step but the first, and the result."""
    from tests.network import INTERFACE

    environment = {**os.environ, "GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc_per_node=1",
        "--master_port=29511",
    ]
    ranks = []
    for number, host in enumerate(hosts):
        place = [f"--node_rank={number}", f"--master_addr={hosts[0].address}"]
        script = [str(ROOT / "finetune" / "train.py"), "config=quickstart.yaml", *words, f"output_dir={folder}"]
        with (folder.parent / f"{folder.name}-{number}.log").open("w") as log:
            command = host.command(*launcher, *place, *script)
            ranks.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log))
    metrics, ends, deadline = folder / "metrics.jsonl", list[int](), time.monotonic() + _LIMIT_SECONDS
    try:
        while any(rank.poll() is None for rank in ranks):
            done = metrics.read_text().count("\n") if metrics.is_file() else 0
            if done > len(ends):
                ends.append(sent_bytes(hosts[0]))
            if time.monotonic() > deadline:
                raise SystemExit(f"{folder.name}: not done after {_LIMIT_SECONDS:.0f} s")
            time.sleep(_POLL_SECONDS)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    if any(rank.returncode for rank in ranks):
        raise SystemExit((folder.parent / f"{folder.name}-0.log").read_text()[-3000:])
    seconds = [json.loads(line)["seconds"] for line in metrics.read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    return {
        "step_seconds": seconds[1:],
        "step_bytes": [after - before for before, after in pairwise(ends)],
        "peak_bytes": result["peak_bytes"],
        "predicted_peak_bytes": result["predicted_peak_bytes"],
    }


def predicted(model: Path, options: dict[str, str], rate_mbit: float) -> dict[str, Any]:
    """Return the plan's bytes per step of a rank, and the seconds that it waits for the link."""
    from finetune import load_config
    from finetune.models.families import shape_of
    from finetune.planning.auto_batch import estimate_memory
    from finetune.planning.communication import link_of, sent_bytes, waiting_seconds
    from finetune.planning.inputs import plan_inputs

    cfg = load_config("quickstart.yaml", settings(model, options, "full"))
    inputs = plan_inputs(cfg, shape_of(str(model)), device_type="cpu", ranks=2, nodes=2)
    inputs = replace(inputs, shard_ranks=2)
    link = link_of(inputs, rate_mbit / 1000, None)
    waits = waiting_seconds(inputs, estimate_memory(inputs, None), 0.0, link)
    return {"bytes": sum(sent_bytes(inputs, 1).values()), "waiting_seconds": sum(waits.values())}


def main(words: list[str]) -> None:
    from benchmarks.models import write_random_model
    from tests.network import two_hosts

    options = parse(words, DEFAULTS)
    work, layers = work_folder(options["work"]), int(options["layers"])
    name = f"qwen2.5-{options['size']}-{layers}-links"
    model = write_random_model(options["size"], Path(options["tokenizer"]), work / name, layers=layers)
    rates = [float(rate) for rate in options["rates"].split(",")]
    with TemporaryDirectory() as scratch:
        with two_hosts() as hosts:
            whole = train_on_hosts(hosts, settings(model, options, "none"), Path(scratch, "whole"))
            unlimited = train_on_hosts(hosts, settings(model, options, "full"), Path(scratch, "unlimited"))
        alone, base = (median(run["step_seconds"]) for run in (whole, unlimited))
        rows = []
        print(f"unlimited: {base:.2f} s per step, {alone:.2f} with two whole bases", file=sys.stderr)
        for rate in rates:
            with two_hosts(rate) as hosts:
                found = train_on_hosts(hosts, settings(model, options, "full"), Path(scratch, f"rate-{rate:g}"))
            plan = predicted(model, options, rate)
            row = {"rate_mbit": rate, **found, "predicted_bytes": plan["bytes"]}
            row["predicted_seconds"] = base + plan["waiting_seconds"]
            row["seconds"], row["bytes"] = median(found["step_seconds"]), median(found["step_bytes"])
            rows.append(row)
            print(
                f"{rate:>6g} Mbit/s: {row['seconds']:.2f} s per step, predicted {row['predicted_seconds']:.2f} "
                f"({row['predicted_seconds'] / row['seconds'] - 1:+.1%}); sent {row['bytes'] / 1e6:,.1f} MB, "
                f"predicted {plan['bytes'] / 1e6:,.1f} ({row['bytes'] / plan['bytes'] - 1:+.1%} of overhead); "
                f"peak {row['peak_bytes'] / 1e9:.2f} GB, predicted {row['predicted_peak_bytes'] / 1e9:.2f}",
                file=sys.stderr,
            )
    result = {
        "benchmark": "links",
        "date": date.today().isoformat(),
        "device": device(),
        **{key: options[key] for key in ("size", "layers", "length", "steps")},
        "whole": whole,
        "unlimited": unlimited,
        "rates": rows,
    }
    results = Path(options["results"] or Path(__file__).parent / "results")
    (results / f"links-cpu-{result['date']}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
