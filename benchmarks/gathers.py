"""Measure bare all-gathers of gloo between two hosts, as shares of the link's rate.

    python -m benchmarks.gathers [rates=100] [megabytes=1,7,30] [ranks=2,4] [seconds=4]

Needs root, as `benchmarks.links`, whose prediction uses the share of two ranks. `ranks` are divided over the two hosts.
A link carries its full rate in both directions at once; `one way` is a plain message in one direction.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

from benchmarks.processes import ROOT, device, parse

DEFAULTS = {"rates": "100", "megabytes": "1,7,30", "ranks": "2,4", "seconds": "4", "results": ""}


def measure(rank: int, ranks: int, address: str, part_bytes: int, gathers: int) -> None:
    """Print the seconds of a message in one direction and of an all-gather, each repeated, as one of the ranks."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://{address}:29555", rank=rank, world_size=ranks)
    part, whole = torch.zeros(part_bytes, dtype=torch.uint8), torch.zeros(ranks * part_bytes, dtype=torch.uint8)

    def one_way() -> None:
        # From a rank of the first host to one of the second.
        if rank == 0:
            dist.send(part, ranks - 1)
        elif rank == ranks - 1:
            dist.recv(part, 0)

    found = {}
    for name, run in (("one way", one_way), ("gather", lambda: dist.all_gather_into_tensor(whole, part))):
        dist.barrier()
        began = time.monotonic()
        for _ in range(gathers):
            run()
        dist.barrier()
        found[name] = (time.monotonic() - began) / gathers
    if rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def gather_share(rate_mbit: float, part_bytes: int, ranks: int, seconds: float) -> dict[str, float]:
    """Return the share of the link's rate that a message in one direction and an all-gather reach."""
    from tests.network import INTERFACE, two_hosts

    # In a ring, each link carries all parts but one, once per direction.
    ideal = {"one way": part_bytes * 8 / (rate_mbit * 1e6), "gather": (ranks - 1) * part_bytes * 8 / (rate_mbit * 1e6)}
    gathers = max(2, round(seconds / ideal["gather"]))
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with two_hosts(rate_mbit) as hosts:
        processes = []
        for rank in range(ranks):
            words = ["rank", rank, ranks, hosts[0].address, part_bytes, gathers]
            command = [sys.executable, "-m", "benchmarks.gathers", *map(str, words)]
            on_host = hosts[rank * 2 // ranks].command(*command)
            processes.append(subprocess.Popen(on_host, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        output = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{ranks} ranks at {rate_mbit:g} Mbit/s: failed")
    found = json.loads(output[0])
    return {name: ideal[name] / found[name] for name in ideal}


def main(words: list[str]) -> None:
    options = parse(words, DEFAULTS)
    rows = []
    for rate in map(float, options["rates"].split(",")):
        for ranks in map(int, options["ranks"].split(",")):
            for megabytes in map(float, options["megabytes"].split(",")):
                shares = gather_share(rate, int(megabytes * 1e6), ranks, float(options["seconds"]))
                rows.append({"rate_mbit": rate, "ranks": ranks, "part_megabytes": megabytes, **shares})
                print(", ".join(f"{key}={value:.3g}" for key, value in rows[-1].items()), file=sys.stderr)
    result = {"benchmark": "gathers", "date": date.today().isoformat(), "device": device(), "rows": rows}
    results = Path(options["results"] or Path(__file__).parent / "results")
    (results / f"gathers-cpu-{result['date']}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        measure(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5]), int(sys.argv[6]))
    else:
        main(sys.argv[1:])
