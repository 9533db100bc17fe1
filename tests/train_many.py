"""Train several configs one after the other in the processes of one launch: starting two ranks takes seconds."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Read a file of [config, overrides], and the ranks of a machine: all, or as if there were several machines."""
    sys.path.insert(0, str(ROOT))
    os.environ["LOCAL_WORLD_SIZE"] = sys.argv[2]
    from finetune import load_config, train

    for config, overrides in json.loads(Path(sys.argv[1]).read_text()):
        train(load_config(config, overrides))


if __name__ == "__main__":
    main()
