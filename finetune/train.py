"""The script that a launcher runs: `accelerate launch finetune/train.py config=X.yaml [key=value …]`.

It runs `finetune train` for accelerate and torchrun, which start a file. In Python use `from finetune import train`.
"""

from __future__ import annotations

import os
import sys

PACKAGE = os.path.dirname(os.path.abspath(__file__))


def import_from_checkout() -> None:
    """Replace the package's folder on sys.path by its parent.

    Python puts the folder of a script first, where our rooms (data, config …) would shadow other packages.
    """
    elsewhere = [entry for entry in sys.path if os.path.abspath(entry) != PACKAGE]
    sys.path[:] = [os.path.dirname(PACKAGE), *elsewhere]


def stop_with_launcher() -> None:
    """Let Linux send SIGTERM when the launcher ends, so that the run saves a checkpoint and stops.

    `accelerate launch` forwards no signal to a single process, which would go on training without it.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_RANK" in os.environ
    if launched and sys.platform == "linux":
        import ctypes
        import signal

        set_parent_death_signal = 1  # PR_SET_PDEATHSIG in linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


if __name__ == "finetune.train":
    # A module of this name would hide the function finetune.train.
    raise ImportError("finetune/train.py is a script; the function is: from finetune import train")

if __name__ == "__main__":
    import_from_checkout()
    stop_with_launcher()
    from finetune.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
