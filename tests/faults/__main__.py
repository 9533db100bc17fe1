"""Run a campaign of faults and print its figures: JSON on stdout, one readable line on stderr.

python -m tests.faults kill|lost|damage|disk|fuzz|soak|all [seed=0] [count=N] [minutes=M]
python -m tests.faults fuzz target=NAME [seed=0] [count=N] [minutes=M]

seed: where and when faults happen. count: cases; steps for soak. minutes: stop early; `all` divides them.
The exit code is 1 if a case was lost.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time

# Before anything imports torch: a campaign uses one core, and never the network.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}

# Command -> (module, cases of the full campaign, share of the minutes of `all`). A module has
# `run(seed: int, count: int, minutes: float | None) -> Figures`.
CAMPAIGNS = {
    "kill": ("kills", 200, 0.3),
    "lost": ("lost_ranks", 6, 0.1),
    "damage": ("damage", 10_000, 0.2),
    "disk": ("disk", 200, 0.15),
    "fuzz": ("fuzz", 20_000, 0.15),
    "soak": ("soak", 20_000, 0.1),
}


def main(words: list[str]) -> int:
    command, *rest = words or [""]
    options = dict(word.partition("=")[::2] for word in rest)
    allowed = {"seed", "count", "minutes"} | ({"target"} if command == "fuzz" else set())
    if command not in (*CAMPAIGNS, "all") or options.keys() - allowed:
        print(__doc__, file=sys.stderr)
        return 2
    seed, minutes = int(options.get("seed", 0)), float(options["minutes"]) if "minutes" in options else None
    lost = 0
    for name in CAMPAIGNS if command == "all" else [command]:
        module, full, share = CAMPAIGNS[name]
        budget = minutes if minutes is None or command != "all" else minutes * share
        began = time.monotonic()
        campaign = importlib.import_module(f"tests.faults.{module}")
        own = {key: options[key] for key in options.keys() & {"target"}}
        figures = campaign.run(seed, int(options.get("count", full)), budget, **own)
        figures = {"campaign": name, "seed": seed, **figures, "seconds": round(time.monotonic() - began)}
        print(json.dumps(figures), flush=True)
        print(f"{name}: " + ", ".join(f"{key}={value}" for key, value in figures.items()), file=sys.stderr)
        lost += figures["lost"]
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
