"""Run as one rank with other intervals of its beats.

python -m tests.faults.rank beat=0.3,lost=4                   # sums a number over the ranks until something ends it
python -m tests.faults.rank beat=0.3,lost=4 config=X.yaml …   # trains
"""

from __future__ import annotations

import sys
import time

from finetune.cli import main
from finetune.parallel import heartbeat
from finetune.system.console import report_error
from finetune.system.errors import RankLost
from finetune.system.signals import StopSignals

RUNS = "sums a number"


def sum_forever() -> int:
    """Make a collective operation twenty times a second, and return the exit code for the rank that is lost."""
    import torch
    import torch.distributed as dist

    from finetune.parallel.ranks import join_ranks

    try:
        with join_ranks() as beats, beats.explained(), StopSignals(lambda number, again: None):
            dist.all_reduce(torch.ones(1))
            print(f"rank {dist.get_rank()} {RUNS}", flush=True)
            while True:
                dist.all_reduce(torch.ones(1))
                time.sleep(0.05)
    except RankLost as error:
        report_error(str(error))
        return error.exit_code


if __name__ == "__main__":
    given = (word.partition("=") for word in sys.argv[1].split(",") if word)
    heartbeat.TIMING = heartbeat.Timing(**{name: float(value) for name, _, value in given})
    sys.exit(main(["train", *sys.argv[2:]]) if sys.argv[2:] else sum_forever())
