"""Generate the sample pairs of a preference: of two orders one is cancelled, and the record must be of the other one.

Everything is a pure function of a seed, and all text comes from data/generate.py. The embedded base writes the record
of either order. Both answers of a pair have the same form, and draws decide which order is cancelled and which comes
first. So neither length, style nor place tells the answers apart.

    python data/pairs.py     # writes data/sample/pairs.jsonl and data/sample/pairs-heldout.jsonl
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from generate import DATED_LINES, SAMPLE, order

SEED, TRAIN_ROWS, HELDOUT_ROWS = 2027, 1200, 120
FACTS = ("count", "colour", "item")
INSTRUCTION = f"As JSON with {', '.join(FACTS)}."


def pair(rng: Random) -> dict[str, str]:
    """Draw two orders that differ in every fact of the record; the order of the rejected record is cancelled."""
    valid, cancelled = order(rng, DATED_LINES), order(rng, DATED_LINES)
    if any(valid.value[fact] == cancelled.value[fact] for fact in FACTS):
        return pair(rng)
    lines = [valid.text, f"Cancelled: {cancelled.text}"]
    rng.shuffle(lines)
    chosen, rejected = (json.dumps({fact: it.value[fact] for fact in FACTS}) for it in (valid, cancelled))
    return {"prompt": "\n".join([*lines, INSTRUCTION]), "chosen": chosen, "rejected": rejected}


def write_pairs(folder: Path) -> None:
    """Write the pairs, without equal prompts."""
    rng, rows = Random(SEED), dict[str, dict[str, str]]()
    while len(rows) < TRAIN_ROWS + HELDOUT_ROWS:
        row = pair(rng)
        rows[row["prompt"]] = row
    every = list(rows.values())
    for name, part in (("pairs", every[:TRAIN_ROWS]), ("pairs-heldout", every[TRAIN_ROWS:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_pairs(SAMPLE)
